"""Where an adapter in PEFT's format has room for a delta: linear layers, embeddings, and experts stored as stacks."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..common.checkpoint_layout import CheckpointLayout, TensorGroup
from ..modeling.delta_decode import add_delta, matrix_delta
from ..modeling.delta_record import FACTORED, parse_record
from ..modeling.delta_repository import DeltaRepository
from ..modeling.transfer import to_device

Part: TypeAlias = Literal["linear", "embeddings", "experts"]
PARTS: tuple[Part, ...] = ("linear", "embeddings", "experts")
_Form: TypeAlias = Literal["multiplied", "looked up", "stacked"]  # of a layer's pair of factors in the file
_INNER = ".base_layer"
_PREFIX = "base_model.model."  # PEFT puts it before the names of the model's modules


@dataclass(frozen=True)
class Place:
    """A parameter of the model that an adapter changes by B A, or by one such product for each of its experts.

    Attributes:
        name: for messages and reports: the tensor in the files, or the parameter if it is made of several tensors.
        part: which part of the model it belongs to.
        parameter: its name in the model.
        group: the tensors that it is made of.
        matrices, outputs, inputs: B is (outputs, rank) and A (rank, inputs), for each of so many matrices.
        transposed: whether the parameter is (…, inputs, outputs).
        layers: the layers that have it, two if it is tied: their names in the adapter's file, and the factors' form.
    """

    name: str
    part: Part
    parameter: str
    group: TensorGroup
    matrices: int
    outputs: int
    inputs: int
    transposed: bool
    layers: tuple[tuple[str, _Form], ...]

    @property
    def most_components(self) -> int:
        """The largest rank that its matrices can have."""
        return min(self.outputs, self.inputs)

    @property
    def numbers_per_rank(self) -> int:
        """How many numbers of the adapter's file each component takes."""
        return sum(map(math.prod, self.entry_shapes(1).values()))

    @property
    def targets(self) -> list[str]:
        """The names by which PEFT finds it: those of its layers, or its own if it is a stack of experts."""
        if self.part == "experts":
            return [self.parameter]
        return [layer.removeprefix(_PREFIX) for layer, _ in self.layers]

    def dtype(self, repository: DeltaRepository) -> torch.dtype:
        """Return the dtype of its factors: that of the fine-tune."""
        return repository.dtype(self.group.members[0].name)

    def entry_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the file's entries, by name, in the order of `entries`."""
        with torch.device("meta"):
            a, b = torch.empty(self.matrices, rank, self.inputs), torch.empty(self.matrices, self.outputs, rank)
        return {name: tuple(tensor.shape) for name, tensor in self.entries(a, b).items()}

    def entries(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """Return the entries of an adapter's file for A (matrices, rank, inputs) and B (matrices, outputs, rank)."""
        entries = {}
        for layer, form in self.layers:
            if form == "stacked":  # as PEFT's ParamWrapper has them
                entries[f"{layer}.lora_A.weight"] = a.flatten(0, 1)
                entries[f"{layer}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1)
            elif form == "looked up":  # rows of the parameter are tokens, so that the factors change places
                entries[f"{layer}.lora_embedding_A"], entries[f"{layer}.lora_embedding_B"] = b[0].t(), a[0].t()
            else:
                entries[f"{layer}.lora_A.weight"], entries[f"{layer}.lora_B.weight"] = a[0], b[0]
        return entries

    def delta(self, repository: DeltaRepository, device: torch.device) -> Tensor:
        """Return what the delta adds to it: float32 (matrices, outputs, inputs), without added rows.

        Raises:
            DeltaFormatError, WrongBaseError: if the delta is damaged or the base is another.
        """
        made = self.group.to_parameters(
            {member.name: tensor_delta(repository, member.name, device) for member in self.group.members}
        )
        delta = made[self.parameter] if len(made) > 1 else next(iter(made.values()))
        delta = delta.mT if self.transposed else delta
        return delta.reshape(self.matrices, self.outputs, self.inputs)

    def stored_factors(
        self, repository: DeltaRepository, device: torch.device, rank: int
    ) -> tuple[Tensor, Tensor] | None:
        """Return A and B of the records as they are, padded with zeros; None if they have more components or none.

        The root of a component's scale is in both.
        """
        name = self.group.members[0].name
        part = repository.parts[name]
        if not part.records or self.group.converter is not None:
            return None
        a = torch.zeros(self.matrices, rank, self.inputs, device=device)
        b = torch.zeros(self.matrices, self.outputs, rank, device=device)
        data, at = repository.file.read_records(name), 0
        shape = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        for number in range(self.matrices):
            record, length = parse_record(data[at:], shape, name)
            at += length
            if record.layout != FACTORED or record.plane_columns > rank:
                return None
            factors: Any = matrix_delta(record, name, device)
            outputs, inputs = (factors.v, factors.u) if self.transposed else (factors.u, factors.v)
            root, count = factors.sigma.abs().sqrt()[:, None], len(factors.sigma)
            a[number, :count] = root * inputs
            b[number, :, :count] = (root * factors.sigma.sign()[:, None] * outputs).t()
        return a, b


def tensor_delta(repository: DeltaRepository, name: str, device: torch.device) -> Tensor:
    """Return what a delta adds to a tensor: float32, of the base's shape.

    Records are decoded without the base, because a sum that is rounded to the fine-tune's dtype has noise of full rank.
    """
    base, part = to_device(repository.base_tensor(name), device), repository.parts[name]
    if part.records:
        return add_delta(
            torch.zeros_like(base, dtype=torch.float32), repository.file.read_records(name), name, torch.float32
        )
    if not part.holds_values:
        return torch.zeros_like(base, dtype=torch.float32)
    tuned = repository.tensor(name, device)
    return (tuned[: len(base)] if part.added_rows else tuned).float() - base.float()


def places_of(repository: DeltaRepository, model: PreTrainedModel, parts: Collection[Part]) -> list[Place]:
    """Return the changed parameters that an adapter can hold.

    Args:
        model: the fine-tune's model on the meta device.
        parts: which parts of the model to look at.
    """
    layout = CheckpointLayout(repository, model)
    places = {
        parameter: place
        for group in layout.groups.values()
        if any(repository.is_changed(member.name) for member in group.members)
        for parameter in group.parameters
        if (place := _place(repository, layout, group, parameter)) is not None and place.part in parts
    }
    ordered = [places[name] for name, _ in model.named_parameters() if name in places]
    return as_nested(ordered)


def _place(repository: DeltaRepository, layout: CheckpointLayout, group: TensorGroup, parameter: str) -> Place | None:
    owner, _, attribute = parameter.rpartition(".")
    module = layout.model.get_submodule(owner)
    as_stored = group.converter is None
    shape = repository.base.shape(group.members[0].name) if as_stored else tuple(group.parameters[parameter].shape)
    part: Part
    layers: tuple[tuple[str, _Form], ...]
    # A convolution's weight is no stack of matrices, and a vector may have three axes as well.
    if len(shape) == 3 and min(shape) > 1 and not type(module).__module__.startswith("torch.nn"):
        part, transposed = "experts", bool(getattr(module, "is_transposed", False))
        layers = ((_PREFIX + owner, "stacked"),)
    elif len(shape) != 2 or attribute != "weight":
        return None
    elif isinstance(layout.model.get_submodule(owner.rpartition(".")[0]), nn.MultiheadAttention):
        return None  # PEFT adapts such a module as a whole
    elif isinstance(module, nn.Embedding) and module is layout.model.get_input_embeddings():
        part, transposed = "embeddings", False
        tied = [alias.removesuffix(".weight") for alias, source in layout.tied.items() if source == parameter]
        layers = ((_PREFIX + owner, "looked up"), *((_PREFIX + layer, "multiplied") for layer in tied))
    elif isinstance(module, nn.Linear | Conv1D):
        part = "embeddings" if module is layout.model.get_output_embeddings() else "linear"
        transposed = isinstance(module, Conv1D)
        layers = ((_PREFIX + owner, "multiplied"),)
    else:
        return None
    rows, columns = shape[-2:]
    return Place(
        name=group.members[0].name if len(group.members) == 1 else parameter,
        part=part,
        parameter=parameter,
        group=group,
        matrices=shape[0] if len(shape) == 3 else 1,
        outputs=columns if transposed else rows,
        inputs=rows if transposed else columns,
        transposed=transposed,
        layers=layers,
    )


def as_nested(places: Sequence[Place]) -> list[Place]:
    """Return the places with the names of their layers as PEFT nests them: a wrapper each for the stacks of a module.

    Args:
        places: in the order of the model's parameters; the wrapper of the last is the outermost.
    """
    nested: list[Place] = []
    outer: dict[str, int] = {}  # wrappers around the next one, by layer
    for place in reversed(places):
        if place.part == "experts":
            ((name, form),) = place.layers
            layer = name.replace(_INNER, "")
            around = outer.get(layer, 0)
            outer[layer] = around + 1
            place = replace(place, layers=((layer + _INNER * around, form),))
        nested.append(place)
    return nested[::-1]
