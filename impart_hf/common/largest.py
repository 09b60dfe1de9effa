"""Selecting the largest entries of a tensor."""

import numpy as np
import torch

_CHUNK = 1 << 26  # entries whose bits are counted at once
_LOW = 16  # bits of the second count; the first counts the other 16


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return a mask of the largest entries, the first ones if some are equal: bool, (entries,), on the values' device.

    It takes linear time; sorting an embedding with its positions would take minutes and several times the memory.

    Args:
        values: float32 (entries,), without NaN.
        count: number of entries, from 0 to all.
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    rank = len(values) - count  # rank of the smallest entry that is kept
    on_cpu = values.device.type == "cpu"
    threshold = float(np.partition(values.numpy(), rank)[rank]) if on_cpu else kth_smallest(values, rank)
    kept = values > threshold
    equal = (values == threshold).nonzero().squeeze(1)
    kept[equal[: count - int(kept.sum())]] = True
    return kept


def kth_smallest(values: torch.Tensor, rank: int) -> float:
    """Return the entry that has `rank` entries before it in rising order, on any device.

    The bits of floats, read as integers, are in the floats' order. Two counts of 16 bits each find the entry. On
    accelerators this uses the whole device; `Tensor.kthvalue` uses one multiprocessor for a vector.

    Args:
        values: float32 (entries,), without NaN.
        rank: from 0 to entries - 1.
    """
    high, rank = _bin_of(_counts(values, None), rank)
    low, _ = _bin_of(_counts(values, high), rank)
    code = np.array([((high - (1 << 15)) << _LOW) + low], np.int32)
    return float(_ordered(torch.from_numpy(code)).view(torch.float32))


def _ordered(bits: torch.Tensor) -> torch.Tensor:
    """Map the bits of floats, int32, to integers in the floats' order; the map is its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _counts(values: torch.Tensor, high: int | None) -> torch.Tensor:
    """Count the entries by their high 16 bits; or by the low ones, those entries whose high bits are in bin `high`."""
    total = torch.zeros(1 << 16, dtype=torch.int64, device=values.device)
    for part in values.split(_CHUNK):
        part = part + 0.0  # turns -0 into 0, which is equal to it and has other bits
        codes = _ordered(part.view(torch.int32))
        bins = (codes >> _LOW) + (1 << 15)
        if high is not None:
            bins = (codes & ((1 << _LOW) - 1))[bins == high]
        total += torch.bincount(bins, minlength=1 << 16)
    return total


def _bin_of(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """Return the bin of the entry with this rank, and its rank within the bin."""
    ends = counts.cumsum(0)
    place = int(torch.searchsorted(ends, rank, right=True))
    return place, rank - (int(ends[place - 1]) if place else 0)
