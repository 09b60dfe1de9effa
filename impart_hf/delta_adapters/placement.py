"""From a delta repository to what it does to the modules of a base that is in memory."""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..common.checkpoint_layout import CheckpointLayout, TensorGroup, class_layout
from ..common.configs import VOCABULARY_FIELDS, differing_fields
from ..modeling.delta_decode import add_delta
from ..modeling.delta_repository import DeltaRepository, WrongBaseError
from ..modeling.modeling_delta_compressed import inner_class
from ..modeling.transfer import to_device
from .effects import Addition, Effect, Replacement, plain_linear, with_values
from .linear_deltas import linear_delta

# Methods that no forward pass calls, although they name weights.
_NOT_FORWARD = re.compile(r"__init__|_?init_.*|_?tie_.*|[gs]et_(in|out)put_embeddings|resize_.*|_?(load|save)_.*")
_LINEAR = {nn.Linear.forward, Conv1D.forward}


@dataclass
class _Unit:
    """A module that gets one effect, with the parameters in it that have changed.

    Attributes:
        groups: by the parameter's name in the module, the tensors that it is made of.
    """

    module: nn.Module
    groups: dict[str, TensorGroup] = field(default_factory=dict)


class Placement:
    """The effects of one delta on the modules of a base.

    Attributes:
        layout: how the fine-tune's tensors become its parameters.
    """

    def __init__(self, model: PreTrainedModel, repository: DeltaRepository, packed: bool, is_quantised: bool):
        """Read headers; weights are read by `effects`.

        Args:
            model: the base.
            packed: whether matrices stay packed.
            is_quantised: whether the base is; its weights cannot be read then.

        Raises:
            ValueError: if the fine-tune computes something else with its weights than the base.
        """
        self._model, self._repository = model, repository
        if differing := list(differing_fields(model.config, repository.text_config, VOCABULARY_FIELDS)):
            raise ValueError(
                f"'{repository.source}' differs from the base in more than weights: its config.json has other "
                f"{', '.join(differing[:5])}; load it by AutoModelForCausalLM"
            )
        self._packed, self._is_quantised = packed, is_quantised
        self.layout: CheckpointLayout = class_layout(
            repository, inner_class(repository.text_config), repository.text_config
        )
        self._modules = dict(model.named_modules())
        self._state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}

    def changed(self) -> dict[str, TensorGroup]:
        """Return the parameters whose values differ from the base's, by name, with the tensors that they come from."""
        found = {
            parameter: group
            for group in self.layout.groups.values()
            if any(self._differs(member.name) for member in group.members)
            for parameter in group.parameters
        }
        own = {parameter for group in self.layout.groups.values() for parameter in group.parameters}
        for alias, source in self.layout.tied.items():
            if alias in own or (group := self._group_of(source)) is None:
                continue
            untied = self._state.get(alias) is not self._state.get(source)
            if source in found or (untied and not self._is_quantised):
                found[alias] = group
        return found

    def _group_of(self, parameter: str) -> TensorGroup | None:
        return next((group for group in self.layout.groups.values() if parameter in group.parameters), None)

    def _differs(self, name: str) -> bool:
        base = self._repository.base
        return self._repository.is_changed(name) or name in base.row_counts

    def effects(self) -> dict[str, Effect]:
        """Read the delta and return its effects by module.

        Raises:
            ValueError: if the base has not the modules that the delta changes.
            DeltaFormatError, WrongBaseError: if the delta is damaged, or its base is another.
        """
        return {name: self._effect(name, unit) for name, unit in self._units().items()}

    def _units(self) -> dict[str, _Unit]:
        changed = self.changed()
        places: dict[str, str] = {}  # by the module that has parameters, the one that gets their effect
        for parameter in changed:
            owner = parameter.rpartition(".")[0]
            if owner not in self._modules:
                raise ValueError(
                    f"'{self._repository.source}' changes {parameter}, but the base model has no module {owner}: load "
                    "the base that the delta was made against, with the class that its config.json names"
                )
            outermost = min(places.get(owner, owner), self._reader_of(parameter), key=len)
            if not outermost:
                raise ValueError(
                    f"{type(self._model).__name__} reads {parameter} itself: it cannot have deltas beside it"
                )
            places[owner] = outermost
        # A module on the way from a place to what it reads is copied there, so that it can have no effect of its own.
        for place, read in sorted((place, owner) for owner, place in places.items()):
            between = [
                owner for owner in places if owner.startswith(f"{place}.") and f"{read}.".startswith(f"{owner}.")
            ]
            places |= dict.fromkeys(between, place)
        units: dict[str, _Unit] = {}
        for parameter, group in changed.items():
            place = places[parameter.rpartition(".")[0]]
            unit = units.setdefault(place, _Unit(self._modules[place]))
            unit.groups[parameter.removeprefix(f"{place}.")] = group
        return units

    def _reader_of(self, parameter: str) -> str:
        """Return the module whose forward method reads a parameter: its own, or one above that takes it from there."""
        owner, _, attribute = parameter.rpartition(".")
        path = owner.split(".")
        for depth in range(len(path)):
            above = ".".join(path[:depth])
            reader: Any = type(self._modules[above])
            if _reads(reader, path[-1], attribute):
                return above
        return owner

    def _effect(self, place: str, unit: _Unit) -> Effect:
        module, groups = unit.module, unit.groups
        if not _is_linear(module) or not groups.keys() <= {"weight", "bias"}:
            return self._replacement(place, unit)
        device, dtype = self._device_of(module), self._dtype_of(module)
        weight = None
        if (group := groups.get("weight")) is not None:
            name = group.members[0].name
            if not self._is_added(f"{place}.weight", group):
                return self._plain_linear(unit, device, dtype) if self._is_quantised else self._replacement(place, unit)
            shape: Any = self._repository.shape(name)
            weight = linear_delta(
                self._repository.file.read_records(name), shape, name,
                transposed=isinstance(module, Conv1D), packed=self._packed, device=device, dtype=dtype,
            )  # fmt: skip
        bias = None
        if (group := groups.get("bias")) is not None:
            before = self._repository.base_tensor(group.members[0].name)
            bias = (self._value(group, "bias").float() - before.float()).to(device, dtype)
        return Addition(weight, bias)

    def _is_added(self, parameter: str, group: TensorGroup) -> bool:
        """Return whether a weight is the base's, as it is in memory, plus one record."""
        if group.converter is not None:
            return False
        name, repository = group.members[0].name, self._repository
        parts, base = repository.parts[name], repository.base
        if not parts.records or parts.added_rows or name in base.row_counts or len(repository.shape(name)) != 2:
            return False
        if self._is_quantised:
            return True
        # A tensor of one name may rest on another of the base, or go into a second parameter.
        rests_on = base.stored_name(name)
        source = group.key if rests_on == name else (self.layout.parameters(rests_on) or ("",))[0]
        return self._state[parameter] is self._state.get(source)

    def _plain_linear(self, unit: _Unit, device: torch.device, dtype: torch.dtype) -> Replacement:
        """Return what stands for a quantised layer whose weight is replaced."""
        bias: Any = getattr(unit.module, "bias", None)
        if "bias" in unit.groups:
            bias = self._value(unit.groups["bias"], "bias").to(device, dtype)
        return Replacement(plain_linear(self._value(unit.groups["weight"], "weight").to(device, dtype), bias), {})

    def _replacement(self, place: str, unit: _Unit) -> Replacement:
        held: dict[str, Tensor] = {}
        made: dict[str, Callable[[], Tensor]] = {}
        for name, group in unit.groups.items():
            before = self._state.get(f"{place}.{name}")
            dtype = self._dtype_of(unit.module) if before is None or self._is_quantised else before.dtype
            if (decoder := self._decoder(unit.module, name, group, dtype)) is not None:
                made[name] = decoder
            else:
                held[name] = self._value(group, name).to(self._device_of(unit.module), dtype)
        return Replacement(with_values(unit.module, held), made)

    def _decoder(
        self, module: nn.Module, name: str, group: TensorGroup, dtype: torch.dtype
    ) -> Callable[[], Tensor] | None:
        """Return what decodes a parameter from the base's and a packed record; None if it is to be held."""
        tensor, repository = group.members[0].name, self._repository
        parts = repository.parts[tensor]
        if not self._packed or self._is_quantised or group.converter is not None or not parts.records:
            return None
        if parts.added_rows or repository.base.stored_name(tensor) != tensor:
            return None
        # It may be below the module, or another's that the fine-tune ties it to.
        base: Any = self._state.get(group.key)
        is_own = any(held is base for held in (*module._parameters.values(), *module._buffers.values()))
        if base is None or not is_own or tuple(base.shape) != repository.shape(tensor):
            return None
        return functools.partial(add_delta, base.detach(), repository.file.read_records(tensor), tensor, dtype)

    def _value(self, group: TensorGroup, parameter: str) -> Tensor:
        """Return a parameter of the fine-tune, made of the repository's tensors.

        Args:
            parameter: the end of its name, of which a group has one.
        """
        made = group.to_parameters({member.name: self._repository.tensor(member.name) for member in group.members})
        if len(made) == 1:
            return next(iter(made.values()))
        (name,) = (name for name in made if name == parameter or name.endswith(f".{parameter}"))
        return made[name]

    def _device_of(self, module: nn.Module) -> torch.device:
        tensors = [*module.parameters(), *module.buffers()]
        device = tensors[0].device if tensors else self._model.device
        if device.type == "meta":
            raise ValueError("a base that is offloaded to the CPU or to disk cannot have deltas: load it on one device")
        return device

    def _dtype_of(self, module: nn.Module) -> torch.dtype:
        if not self._is_quantised:
            dtypes = [parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()]
            if dtypes:
                return dtypes[0]
        return self._model.dtype

    def write_into_base(self) -> None:
        """Give the base's parameters, vocabulary and special tokens the fine-tune's values; errors as for `effects`.

        All are read before the first is written.
        """
        changed = self.changed()
        values: dict[str, nn.Parameter] = {}
        of_group: dict[int, nn.Parameter] = {}  # for parameters that are tied
        for parameter, group in changed.items():
            before = self._state[parameter]
            if len(group.parameters) > 1 or id(group) not in of_group:
                value = self._value(group, parameter).to(before.device, before.dtype)
                of_group[id(group)] = nn.Parameter(value, requires_grad=before.requires_grad)
            values[parameter] = of_group[id(group)]
        for parameter, value in values.items():
            owner, _, attribute = parameter.rpartition(".")
            module: Any = self._modules[owner]
            if isinstance(self._state[parameter], nn.Parameter):
                setattr(module, attribute, value)
            else:
                self._state[parameter].copy_(value)
            if attribute == "weight" and isinstance(module, nn.Embedding):
                module.num_embeddings = len(module.weight)
            elif attribute == "weight" and isinstance(module, nn.Linear):
                module.out_features = len(module.weight)
        own, wanted = self._model.config, self._repository.text_config
        for name in (*sorted(VOCABULARY_FIELDS), "bos_token_id", "eos_token_id", "pad_token_id"):
            if hasattr(wanted, name) and hasattr(own, name):
                setattr(own, name, getattr(wanted, name))

    def check_base(self) -> None:
        """Check that the base in memory is the one that the delta was made against, in whatever dtype it is.

        Raises:
            ValueError: if the base lacks a part.
            WrongBaseError: if it is another.
        """
        repository = self._repository
        for group in self.layout.groups.values():
            names = [member.name for member in group.members]
            if any(repository.base.stored_name(name) != name for name in names):
                continue  # an output projection of the fine-tune's own, where the base has none
            fewer_rows = any(name in repository.base.row_counts for name in names)
            for parameter, value in group.to_parameters({n: repository.base_tensor(n) for n in names}).items():
                own = self._state.get(parameter)
                if own is None:
                    raise ValueError(
                        f"the base model in memory has no {parameter}: load it with the class that config.json of "
                        f"'{repository.source}' names"
                    )
                if not _same(own, value, fewer_rows):
                    advice = "Load the base anew, without changes"
                    if len(repository.chain) > 1:  # its base is a delta itself
                        advice = (
                            "Load that delta and call its merge_and_unload, or write this one against the first base "
                            "with `impart-hf flatten`"
                        )
                    raise WrongBaseError(
                        f"the base model in memory is not the base of '{repository.source}': its {parameter} "
                        f"differs from that of '{repository.base.source}'. {advice}"
                    )


def _same(own: Tensor, stored: Tensor, fewer_rows: bool) -> bool:
    """Return whether a parameter is a stored tensor in the parameter's dtype, whatever dtype it has been in before.

    Args:
        fewer_rows: whether the stored one may be its first rows.
    """
    mine = own.detach()[: len(stored)] if fewer_rows else own.detach()
    if mine.shape != stored.shape:
        return False
    stored = to_device(stored, own.device)
    as_bytes = mine.contiguous().view(-1).view(torch.uint8)  # NaN equals itself so
    return any(
        torch.equal(as_bytes, stored.to(dtype).to(own.dtype).contiguous().view(-1).view(torch.uint8))
        for dtype in dict.fromkeys((own.dtype, torch.bfloat16, torch.float16))
    )


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module multiplies its input by its weight and adds its bias, whatever form these have."""
    if type(module).forward in _LINEAR or type(module).__module__.startswith("bitsandbytes."):
        return True
    # GPTQ's layers have packed weights under other names.
    return all(hasattr(module, name) for name in ("in_features", "out_features")) and not hasattr(module, "weight")


@functools.cache
def _reads(owner: Any, child: str, attribute: str) -> bool:
    """Return whether a forward method of a class reads a child's parameter itself, as Mamba's does."""
    pattern = re.compile(rf"\.{re.escape(child)}\.{re.escape(attribute)}\b(?!\.(dtype|device|shape)\b)")
    return any(pattern.search(source) for source in _forward_sources(owner))


@functools.cache
def _forward_sources(owner: Any) -> tuple[str, ...]:
    return tuple(_sources(owner))


def _sources(owner: type) -> Iterator[str]:
    for cls in owner.__mro__:
        if cls in (PreTrainedModel, nn.Module):
            return
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):
            continue
        for node in tree.body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.FunctionDef) and not _NOT_FORWARD.fullmatch(node.name):
                yield ast.unparse(node)
