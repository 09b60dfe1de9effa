"""The largest of many numbers."""

import numpy as np
import torch


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of the largest entries, of equal ones the first: bool, (entries,), on the values' device.

    It takes linear time, where a sort of an embedding with its positions would take minutes and several times the
    memory.

    Args:
        values: (entries,), none of them NaN.
        count: how many, from 0 to all.
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    rank = len(values) - count  # of the smallest that is kept
    if values.device.type == "cpu":
        threshold = float(np.partition(values.numpy(), rank)[rank])
    else:
        threshold = float(values.kthvalue(rank + 1).values)
    kept = values > threshold
    equal = (values == threshold).nonzero().squeeze(1)
    kept[equal[: count - int(kept.sum())]] = True
    return kept
