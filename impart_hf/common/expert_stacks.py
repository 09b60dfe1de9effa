"""Parameters that hold a matrix for each expert of a mixture: in files as such a stack, or as a tensor an expert."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

from ..modeling.tensors import Tensors
from .checkpoint_layout import TensorGroup


@dataclass(frozen=True)
class ExpertStack:
    """A parameter (experts, m, n), and the tensors of a checkpoint that become it.

    Attributes:
        parameter: its name in the model.
        shape: its shape.
        fused: the name of the tensor that holds all experts; None if each has its own.
        parts: without `fused`, the tensors that are joined along m, each as its names by expert.
        part_shapes: the shape of each part's tensors.
        flipped: whether the tensors are stored as (n, m).
    """

    parameter: str
    shape: tuple[int, int, int]
    fused: str | None
    parts: tuple[tuple[str, ...], ...] = ()
    part_shapes: tuple[tuple[int, ...], ...] = ()
    flipped: bool = False

    @property
    def is_as_stored(self) -> bool:
        """Whether the parameter is a tensor of the checkpoint, unchanged."""
        return self.fused is not None and not self.flipped

    def of_expert(self, number: int) -> tuple[str, ...]:
        """Return the names of an expert's own tensors."""
        return tuple(names[number] for names in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, expert after expert."""
        if self.fused is not None:
            return (self.fused,)
        return tuple(name for number in range(self.shape[0]) for name in self.of_expert(number))

    def assembled(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the parameter made of tensors, with a gradient, which transformers' own conversions do not give.

        Args:
            tensors: by name, (experts, m, n) or of one expert; a missing one is zero.
        """
        if self.fused is not None:
            return tensors[self.fused].transpose(1, 2) if self.flipped else tensors[self.fused]
        some = next(iter(tensors.values()))
        stacks = []
        for names, shape in zip(self.parts, self.part_shapes, strict=True):
            stacks.append(torch.stack([tensors[n] if n in tensors else some.new_zeros(shape) for n in names]))
        return torch.cat(stacks, 1)


def expert_stack(group: TensorGroup, tensors: Tensors, owner: nn.Module) -> ExpertStack | None:
    """Return the stack that a group of tensors becomes; None if it becomes anything else, or in another way.

    Args:
        tensors: the checkpoint; only shapes are read.
        owner: the module that has the parameter.
    """
    if len(group.parameters) != 1 or type(owner).__module__.startswith("torch.nn"):  # a convolution is no stack
        return None
    shape: Any = tuple(group.parameters[group.key].shape)
    if len(shape) != 3:
        return None
    first = group.members[0].name
    if group.converter is None:
        return ExpertStack(group.key, shape, first)
    operations: list[Any] = list(group.converter.operations)
    if isinstance(operations[0], Transpose) and len(operations) == len(group.members) == 1:
        (op,) = operations
        flipped = not op.check_dims or tensors.shape(first) != shape
        return ExpertStack(group.key, shape, first, flipped=flipped) if {op.dim0, op.dim1} == {1, 2} else None
    joined = [op.dim for op in operations[1:] if isinstance(op, Concatenate)]
    if not isinstance(operations[0], MergeModulelist) or operations[0].dim != 0 or len(joined) != len(operations) - 1:
        return None
    by_pattern: dict[str | None, list[str]] = {}
    for member in group.members:
        by_pattern.setdefault(member.pattern, []).append(member.name)
    parts = tuple(tuple(by_pattern[p]) for p in group.converter.source_patterns if p in by_pattern)
    if any(dim != 1 for dim in joined) or any(len(names) != shape[0] for names in parts):
        return None
    return ExpertStack(group.key, shape, None, parts, tuple(tensors.shape(names[0]) for names in parts))
