"""Selecting the largest entries of a tensor."""

import numpy as np
import torch


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return a mask of the largest entries, the first ones if some are equal: bool, (entries,), on the values' device.

    It takes linear time; sorting an embedding with its positions would take minutes and several times the memory.

    Args:
        values: (entries,), without NaN.
        count: number of entries, from 0 to all.
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    rank = len(values) - count  # rank of the smallest entry that is kept
    if values.device.type == "cpu":
        threshold = float(np.partition(values.numpy(), rank)[rank])
    else:
        threshold = float(values.kthvalue(rank + 1).values)
    kept = values > threshold
    equal = (values == threshold).nonzero().squeeze(1)
    kept[equal[: count - int(kept.sum())]] = True
    return kept
