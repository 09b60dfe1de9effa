"""Teacher and student models; the student keeps its deltas separate from the base's weights."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..common.attention import with_capped_attention
from ..common.checkpoint_layout import CheckpointLayout
from ..common.expert_stacks import ExpertStack, expert_stack
from ..common.meta_model import meta_model, reads_text
from ..modeling.checkpoints import config_fields
from ..modeling.deferred_tensor import Index
from ..modeling.delta_decode import add_delta, decode_record
from ..modeling.delta_record import Record, pack_record, parse_stack
from ..modeling.model_files import CheckpointError
from ..modeling.tensors import LazyTensor, Model, Tensors
from ..modeling.transfer import to_device
from .trained_delta import StackedDeltas, TrainedDelta


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a student.

    Attributes:
        names: all names of its parameter: more than one if modules share it.
        stack: how the parameter is made of tensors, if it is a stack of experts and not stored as it is.
    """

    names: list[str]
    stack: ExpertStack | None = None


def empty_model(finetuned: Model) -> PreTrainedModel:
    """Make a model of the fine-tune's architecture on the meta device."""
    return meta_model(_config(finetuned))


def _config(finetuned: Model) -> PreTrainedConfig:
    return AutoConfig.for_model(**config_fields(finetuned.config))


def load_model(finetuned: Model, tensors: Mapping[str, LazyTensor], dtype: torch.dtype, device: torch.device) -> Any:
    """Make a frozen model of the fine-tune's architecture on a device, from tensors with the checkpoint's names.

    Raises:
        CheckpointError: if a tensor is missing.
    """
    model_class: Any = type(empty_model(finetuned))
    model, info = model_class.from_pretrained(
        None,
        config=_config(finetuned),
        state_dict=dict(tensors),
        dtype=dtype,
        device_map={"": device},
        output_loading_info=True,
    )
    if info["missing_keys"]:  # transformers would initialise them at random
        raise CheckpointError(
            f"'{finetuned.source}' lacks the tensor {min(info['missing_keys'])}: check that the checkpoint is complete"
        )
    return with_capped_attention(model).eval().requires_grad_(False)


def owners_of(model: Any) -> dict[str, list[str]]:
    """Return, for every parameter's name, all names of that parameter: more than one if modules share it."""
    names = defaultdict(list)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names[id(parameter)].append(name)
    return {name: names[id(parameter)] for name, parameter in parameters.items()}


def trainable(model: Any, base: Tensors, finetuned: Model) -> dict[str, Place]:
    """Return the tensors that can be trained, each with its place in the model.

    Each must be a parameter of the model, as it is stored or as a part of a stack of experts, that is needed for text,
    and have the shape of the base's tensor. If several modules share it, all must be embeddings or linear layers.

    Args:
        model: the fine-tune's model; its values are not read.
    """
    owners, groups, needed = owners_of(model), CheckpointLayout(finetuned, model).groups, reads_text(model)
    found: dict[str, Place] = {}
    for key, group in groups.items():
        names = [member.name for member in group.members]
        if key not in owners or not needed(key) or any(finetuned.shape(n) != base.shape(n) for n in names):
            continue
        if group.converter is not None:
            stack = expert_stack(group, finetuned, model.get_submodule(key.rpartition(".")[0]))
            found |= {} if stack is None else dict.fromkeys(names, Place([key], stack))
            continue
        modules = [model.get_submodule(owner.rpartition(".")[0]) for owner in owners[key]]
        if len(modules) == 1 or all(isinstance(module, nn.Embedding | nn.Linear) for module in modules):
            found[names[0]] = Place(owners[key])
    return found


def student_tensors(
    base: Tensors, finetuned: Model, records: Mapping[str, np.ndarray], trained: Iterable[str]
) -> dict[str, LazyTensor]:
    """Return the compressed model's tensors, with the base's for `trained` names, to which deltas will be attached."""

    def decoded(name: str, index: Index, device: torch.device) -> torch.Tensor:
        return compressed(base, finetuned, name, records[name], device)[index]

    tensors, trained = finetuned_tensors(finetuned), set(trained)
    for name in records:
        tensors[name] = LazyTensor(base, name) if name in trained else LazyTensor(finetuned, name, decoded)
    return tensors


def finetuned_tensors(finetuned: Model) -> dict[str, LazyTensor]:
    """Return the fine-tune's tensors."""
    return {name: LazyTensor(finetuned, name) for name in finetuned.names()}


def compressed(
    base: Tensors, finetuned: Model, name: str, data: np.ndarray, device: torch.device | str
) -> torch.Tensor:
    """Decode a tensor from its records on a device and append its added rows: float32."""
    before = base.tensor(name, device)
    added = finetuned.tensor(name)[len(before) :].to(device)
    return torch.cat([add_delta(before, data, name, torch.float32), added.float()])


def attach(student: Any, name: str, data: np.ndarray, exact: torch.Tensor | None, place: Place) -> TrainedDelta:
    """Add a tensor's delta to its parameter in the student, which holds the base's weights.

    Args:
        data: the tensor's records.
        exact: the exact delta, float32 (matrices, m, n), if kept values are trained; otherwise None.
        place: where its parameter is.
    """
    parameter = student.get_parameter(place.names[0]) if place.stack is None else _original(student, place.names[0])
    delta = TrainedDelta(parse_stack(data, name), name, exact, parameter.device)
    add_to(student, place, name, delta)
    return delta


def _original(student: Any, parameter: str) -> torch.Tensor:
    """Return a parameter as it was before deltas were added to it."""
    path, _, leaf = parameter.rpartition(".")
    owner = student.get_submodule(path)
    return owner.parametrizations[leaf].original if parametrize.is_parametrized(owner, leaf) else getattr(owner, leaf)


def add_to(student: Any, place: Place, name: str, delta: TrainedDelta) -> None:
    """Add the delta of the tensor of this name to its parameter in the student."""
    for own_name in place.names:
        path, _, leaf = own_name.rpartition(".")
        owner = student.get_submodule(path)
        if place.stack is not None:
            if not parametrize.is_parametrized(owner, leaf):
                parametrize.register_parametrization(owner, leaf, StackedDeltas(place.stack), unsafe=True)
            owner.parametrizations[leaf][0].deltas[name] = delta
            continue
        base = getattr(owner, leaf)
        kind = type(owner)
        # Code that reads the weight directly gets base plus delta.
        parametrize.register_parametrization(owner, leaf, delta, unsafe=True)
        if kind is nn.Linear:
            owner.forward = partial(delta.linear, base=base, bias=owner.bias)
        elif kind is nn.Embedding and owner.max_norm is None:
            owner.forward = partial(delta.embedding, base=base, padding=owner.padding_idx)


def head_delta(student: Any) -> TrainedDelta | None:
    """Return the delta of the student's output projection, if it has one."""
    head = student.get_output_embeddings()
    if head is None or not parametrize.is_parametrized(head, "weight"):
        return None
    (delta,) = head.parametrizations.weight
    return delta


def exact_delta(base: Tensors, finetuned: Model, name: str) -> torch.Tensor:
    """Return a tensor's exact delta, without added rows: float32 (matrices, m, n)."""
    before, after = base.tensor(name), finetuned.tensor(name)
    return (after[: len(before)].float() - before.float()).reshape(-1, *before.shape[-2:])


def packed(stack: list[Record], exact: torch.Tensor, name: str, device: torch.device) -> bytes:
    """Update the relative errors in a tensor's records, decoded on a device, and return the records' bytes."""
    for record, delta in zip(stack, exact, strict=True):
        # A matrix of a stack may equal the base's; its delta is zero and has no relative error.
        if (size := delta.norm()) > 0:
            difference = decode_record(record, name, device) - to_device(delta, device)
            record.relative_error = float(difference.norm() / size)
    return b"".join(map(pack_record, stack))
