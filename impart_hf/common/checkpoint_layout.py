"""How the tensors in a checkpoint's files become a model's parameters, by transformers' own conversions.

Files of one model differ: keys lack the prefix of the causal model, experts are stored one by one or as a stack, names
are those of an older version, buffers are stored that no model reads any more. transformers' loader knows all of it.
Its parts are called here as the loader calls them; they are no private names, and PEFT uses them in the same way.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ..modeling.checkpoints import config_for
from ..modeling.modeling_delta_compressed import inner_class
from ..modeling.tensors import Tensors

TensorMap = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Member:
    """One tensor of a group.

    Attributes:
        name: its name in the checkpoint.
        renamed: its name after transformers' renamings, before a converter combines it with others.
        pattern: the converter's pattern that it matches; None without a converter.
    """

    name: str
    renamed: str
    pattern: str | None


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of a checkpoint that become parameters together; usually one tensor and one parameter.

    Attributes:
        key: the name that transformers gives the group: that of its first parameter.
        members: the tensors, in the order in which transformers reads them.
        converter: what makes the parameters of them; None if the only tensor is the parameter.
        parameters: shape and dtype of every parameter, by name, as tensors on the meta device.
        model: the model on the meta device, which some conversions read.
    """

    key: str
    members: tuple[Member, ...]
    converter: WeightConverter | None
    parameters: Mapping[str, torch.Tensor]
    model: PreTrainedModel

    def places(self) -> dict[str, tuple[str, str | None, int]]:
        """Return what each tensor stands for, by its name: equal for the same tensor of another checkpoint."""
        counts: dict[str | None, int] = {}
        places = {}
        for member in self.members:
            number = counts.get(member.pattern, 0)
            places[member.name] = (self.key, member.pattern, number)
            counts[member.pattern] = number + 1
        return places

    def to_parameters(self, tensors: Mapping[str, torch.Tensor]) -> TensorMap:
        """Return the parameters that transformers makes of the checkpoint's tensors, which are given by name."""
        if self.converter is None:
            return {self.key: tensors[self.members[0].name]}
        return _convert(self.converter, self.key, self.members, tensors, self.model)

    def to_tensors(self, parameters: Mapping[str, torch.Tensor]) -> TensorMap:
        """Return the checkpoint's tensors for these parameters: the inverse of `to_parameters`.

        Raises:
            ValueError: if transformers cannot reverse the conversion.
        """
        if self.converter is None:
            return {self.members[0].name: parameters[self.key]}
        try:
            reverse: Any = copy.deepcopy(self.converter).reverse_transform()
            members, keys = [], set()
            for name in self.parameters:
                key, pattern = rename_source_key(name, [], [reverse], reverse=True)
                members.append(Member(name, name, pattern))
                keys.add(key)
            made = _convert(reverse, min(keys), tuple(members), parameters, self.model)
        except (NotImplementedError, AttributeError, RuntimeError) as error:
            raise ValueError(f"transformers cannot undo how it makes {self.key} of a checkpoint: {error}") from error
        prefix = f"{self.model.base_model_prefix}."
        tensors = {}
        for member in self.members:
            found = [name for name in (member.renamed, prefix + member.renamed) if name in made]
            if not found:
                raise ValueError(f"transformers cannot undo how it makes {self.key} of {member.name}")
            tensors[member.name] = made[found[0]]
        return tensors


class CheckpointLayout:
    """What the tensors of one checkpoint become in its model; no weights are read.

    Attributes:
        model: the model on the meta device.
        groups: the tensors that become parameters, by the name of their first parameter.
        tied: the parameters that share another one's values unless a checkpoint has their own, with that other one.
    """

    def __init__(self, tensors: Tensors, model: PreTrainedModel, names: Iterable[str] | None = None):
        """Find every tensor's parameters as transformers' loader does.

        Args:
            tensors: the checkpoint; only its names, shapes and dtypes are read.
            model: its model on the meta device.
            names: the tensors to look at; those of `tensors.names()` if None.
        """
        self.model = model
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys)
        self.groups = _groups(tensors, model, tensors.names() if names is None else names)
        self._group_of = {member.name: group for group in self.groups.values() for member in group.members}

    @property
    def is_complete(self) -> bool:
        """Whether every parameter of the model comes from the checkpoint or is tied to another."""
        found = {name for group in self.groups.values() for name in group.parameters} | self.tied.keys()
        return self.model.state_dict().keys() <= found

    def group(self, name: str) -> TensorGroup | None:
        """Return the group of a checkpoint's tensor; None if no model reads the tensor."""
        return self._group_of.get(name)

    def parameters(self, name: str) -> tuple[str, ...]:
        """Return the names of the parameters (or stored buffers) that a checkpoint's tensor becomes or is a part of.

        Empty if no model reads the tensor.
        """
        group = self._group_of.get(name)
        return () if group is None else tuple(group.parameters)


def known_layout(
    tensors: Tensors, config: PreTrainedConfig, names: Iterable[str] | None = None
) -> CheckpointLayout | None:
    """Return the layout of a checkpoint; None if transformers has no model that generates text for its configuration.

    Args:
        tensors, names: as for `CheckpointLayout`.

    Raises:
        ValueError: if the configuration describes no model.
    """
    try:
        model_class = inner_class(config)
    except ValueError:
        return None
    return class_layout(tensors, model_class, config, names)


def class_layout(
    tensors: Tensors, model_class: Any, config: PreTrainedConfig, names: Iterable[str] | None = None
) -> CheckpointLayout:
    """Return the layout of a checkpoint for one of transformers' classes; arguments as for `known_layout`."""
    with torch.device("meta"):
        model = model_class._from_config(config_for(model_class, config))
    return CheckpointLayout(tensors, model, names)


def _groups(tensors: Tensors, model: PreTrainedModel, names: Iterable[str]) -> dict[str, TensorGroup]:
    """Assign the tensors to parameters; the same steps, in the same order, as transformers' loader."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, known = model.base_model_prefix, model.state_dict()
    found: dict[str, list[Member]] = {}
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if key not in known and name in known:
            key, pattern = rename_source_key(name, [], [], prefix, known)
        if key not in known:
            continue
        renamed = key if pattern is None else rename_source_key(name, renamings, [], prefix, known)[0]
        members = found.setdefault(key, [])
        # Of two tensors for one parameter, transformers takes the first.
        if not members or (pattern is not None and members[0].pattern is not None):
            members.append(Member(name, renamed, pattern))
    groups = {}
    for key, listed in found.items():
        group, pattern = tuple(listed), listed[0].pattern
        converter = None if pattern is None else by_pattern[pattern]
        empty = {m.name: torch.empty(tensors.shape(m.name), dtype=tensors.dtype(m.name), device="meta") for m in listed}
        if converter is None:
            parameters = {key: empty[group[0].name]}
        else:
            try:
                parameters = _convert(converter, key, group, empty, model)
            except (RuntimeError, ValueError, KeyError, IndexError):
                continue  # tensors that cannot be combined, for instance because some are missing: not read
        groups[key] = TensorGroup(key, group, converter, parameters, model)
    return groups


def _convert(
    converter: WeightConverter,
    key: str,
    members: tuple[Member, ...],
    tensors: Mapping[str, torch.Tensor],
    model: PreTrainedModel,
) -> TensorMap:
    """Apply a converter, which is not changed, to a group's tensors."""
    own: Any = copy.deepcopy(converter)
    for member in members:
        own.add_tensor(key, member.name, member.pattern, tensors[member.name])
    made = own.convert(key, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
