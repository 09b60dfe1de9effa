"""A function's last result, kept for as long as the tensor that it was computed from lives."""

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

Result = TypeVar("Result")


class LastResult(Generic[Result]):
    """A function of one tensor that returns its last result again for the same tensor object, if that is unchanged."""

    def __init__(self, function: Callable[[Tensor], Result]):
        self._function = function
        self._last: tuple[weakref.ref[Tensor], int, Result] | None = None

    def __call__(self, tensor: Tensor) -> Result:
        last = self._last
        if last is not None and last[0]() is tensor and last[1] == _version(tensor):
            return last[2]
        result = self._function(tensor)
        self._last = (weakref.ref(tensor, self._forget), _version(tensor), result)
        return result

    def _forget(self, dead: "weakref.ref[Tensor]") -> None:
        if self._last is not None and self._last[0] is dead:
            self._last = None


def _version(tensor: Tensor) -> int:
    """Return a number that changes with every write in place; tensors of inference mode have none."""
    return 0 if tensor.is_inference() else tensor._version
