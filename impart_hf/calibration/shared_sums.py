"""Sums over calibration text that the processes of a job share, with the bits that one process gives."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..common import processes

# Batches are dealt out to this many sums, and those to the processes; more processes than that would not help. The sums
# are added in their order, so the rounded result does not depend on who computed which.
_SUMS = 16

# By key, such as an expert's number: a sum, float32 of shape (size, size), and how many inputs it is of.
Sums = Mapping[int, tuple[Tensor, int]]


def own_batches(count: int) -> list[int]:
    """Return which of a text's batches this process runs, of `count`."""
    return [batch for batch in range(count) if batch % _SUMS % processes.count() == processes.number()]


def shared_sums(batches: int, sums_of: Callable[[range], Sums], device: torch.device, alone: bool = False) -> Sums:
    """Return sums over all batches of a text, in every process.

    Args:
        batches: number of batches.
        sums_of: returns the sums over some batches, on the device; it must not communicate.
        alone: compute everything in this process, which is not to wait for others.
    """
    totals: dict[int, tuple[Tensor, int]] = {}

    def add(key: int, value: Tensor, count: int) -> None:
        old = totals.get(key)
        totals[key] = (value, count) if old is None else (old[0].add_(value), old[1] + count)

    parts = [range(start, batches, _SUMS) for start in range(min(_SUMS, batches))]
    if alone or not processes.is_distributed():
        for part in parts:
            for key, (value, count) in sums_of(part).items():
                add(key, value, count)
        return totals
    own = processes.each(lambda: {n: sums_of(part) for n, part in enumerate(parts) if _owner(n) == processes.number()})
    found = processes.together(lambda: {n: _sizes(sums) for n, sums in own.items()})
    for n in range(len(parts)):
        for key, (size, count) in found[_owner(n)][n].items():
            value = own[n][key][0] if n in own else torch.empty(size, size, device=device)
            processes.broadcast(value, _owner(n))
            add(key, value, count)
    return totals


def _sizes(sums: Sums) -> dict[int, tuple[int, int]]:
    return {key: (len(value), count) for key, (value, count) in sums.items()}


def _owner(part: int) -> int:
    return part % processes.count()
