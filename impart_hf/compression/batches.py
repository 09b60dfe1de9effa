"""Matrices of one kind that an accelerator works on together: small ones alone would leave it idle."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

_BYTES = 4 << 30  # of an accelerator's memory, for a batch and what is computed from it

Item = TypeVar("Item")


class Batches(Generic[Item]):
    """Collects items until there are enough of a kind. A CPU gains nothing by batches: there, every item is one."""

    def __init__(self, device: torch.device, work: Callable[[list[Item]], None]):
        """Set up empty batches; `work` gets each one when it is full."""
        self._most = 0 if device.type == "cpu" else _BYTES
        self._work = work
        self._waiting: dict[Hashable, tuple[list[Item], int]] = {}

    def add(self, kind: Hashable, item: Item, size: int) -> None:
        """Add an item that takes `size` bytes of memory while its batch is worked on."""
        items, total = self._waiting.pop(kind, ([], 0))
        if items and total + size > self._most:
            self._work(items)
            items, total = [], 0
        self._waiting[kind] = ([*items, item], total + size)
        if total + size >= self._most:
            self._work(self._waiting.pop(kind)[0])

    def finish(self) -> None:
        """Work on what is left."""
        while self._waiting:
            self._work(self._waiting.pop(next(iter(self._waiting)))[0])
