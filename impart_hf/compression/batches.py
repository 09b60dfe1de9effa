"""Matrices of one kind that an accelerator works on together: small ones alone would leave it idle."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

# Of an accelerator's memory: what a batch may take, with what is computed from it; and what a matrix takes that is
# encoded alone, about 2048 x 3072, because solvers for batches are made for small matrices.
_BATCH, _ALONE = 4 << 30, 256 << 20

Item = TypeVar("Item")


class Batches(Generic[Item]):
    """Collects items until there are enough of a kind. A CPU gains nothing by batches: there, every item is one."""

    def __init__(self, device: torch.device, work: Callable[[list[Item]], object]):
        """Set up empty batches; `work` gets each one when it is full."""
        self._alone = 0 if device.type == "cpu" else _ALONE
        self._work = work
        self._waiting: dict[Hashable, tuple[list[Item], int]] = {}

    def add(self, kind: Hashable, item: Item, size: int) -> None:
        """Add an item that takes `size` bytes of memory while its batch is worked on."""
        if size > self._alone:
            self._work([item])
            return
        items, total = self._waiting.pop(kind, ([], 0))
        if items and total + size > _BATCH:
            self._work(items)
            items, total = [], 0
        items.append(item)
        self._waiting[kind] = items, total + size

    def finish(self) -> None:
        """Work on what is left."""
        while self._waiting:
            self._work(self._waiting.pop(next(iter(self._waiting)))[0])
