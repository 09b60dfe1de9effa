"""Tensors that are made where they are used: on the device and in the dtype to which a loader moves them."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

Index = Any  # what selects a part of a tensor: `...`, a slice, or a tuple of slices

_MOVE = torch.ops.aten._to_copy.default


class DeferredTensor(torch.Tensor):
    """A tensor that is made when it is used.

    `to(device, dtype)` makes it on that device and returns a plain tensor; any other operation makes it on the CPU. It
    says that it is on the meta device, as it has no values yet.

    transformers slices a lazy tensor and calls `to` with the place where the result is wanted: a device of the device
    map, this rank's device under a tensor-parallel plan, the default device. Nothing else tells that place for sure.
    """

    _make: Callable[[torch.device], torch.Tensor]

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[torch.device], torch.Tensor]
    ) -> "DeferredTensor":
        """Wrap a function that makes the tensor, of this shape and dtype, on a device."""
        deferred = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=torch.device("meta"))
        deferred._make = make
        return deferred

    def __repr__(self) -> str:  # type: ignore[override]  # torch adds a parameter of its own
        return f"DeferredTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch names the first parameter otherwise
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if operation is _MOVE and isinstance(args[0], cls):
            place = torch.device(kwargs.get("device") or "cpu")
            # Converted there, after the copy: fewer bytes go over.
            return args[0]._make(place).to(place, kwargs.get("dtype") or args[0].dtype)
        args, kwargs = tree_map_only(cls, lambda deferred: deferred._make(torch.device("cpu")), (args, kwargs))
        return operation(*args, **kwargs)


def part_ranges(index: Index, shape: tuple[int, ...]) -> list[range] | None:
    """Return the range of each axis that an index selects; None if it selects anything but whole, forward ranges.

    Args:
        index: as in `tensor[index]`.
        shape: the tensor's shape.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    if parts and parts[-1] is ...:
        parts.pop()
    if len(parts) > len(shape) or not all(isinstance(part, slice) for part in parts):
        return None
    ranges = [range(*part.indices(size)) for part, size in zip(parts, shape, strict=False)]
    ranges += [range(size) for size in shape[len(parts) :]]
    return ranges if all(chosen.step == 1 for chosen in ranges) else None


__all__ = ["DeferredTensor", "Index", "part_ranges"]
