"""Task vectors: one fine-tune's delta of a tensor, sparsified and trimmed, and the combination of several."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from ..coding.keep_ratios import keep_ratios, with_margin
from ..coding.record_sizes import kept_ratios, thresholds_of
from ..coding.svd import Svd
from ..common.largest import largest
from ..modeling.precision import full_float32
from ..modeling.seeded_mask import keep_mask

TaskVector = Callable[[slice], torch.Tensor]  # float32 rows of W_finetuned - W_base, on the device


def dare(delta: torch.Tensor, density: float, rescale: bool, seed: int) -> torch.Tensor:
    """Apply DARE (arXiv 2311.03099): keep each entry with probability `density`, and divide it by that if `rescale`.

    Args:
        delta: float32, of any shape.
        seed: 32 bits; the same seed on the same kind of device drops the same entries.
    """
    from peft.utils.merge_utils import prune

    with torch.random.fork_rng(devices=[delta.device] if delta.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return prune(delta, density, "random", rescale)


@full_float32()
def impart(delta: torch.Tensor, density: float, beta: float, c: float, seed: int, svd: Svd) -> torch.Tensor:
    """Apply ImPart (arXiv 2504.13237, section 3): sparsify U and V by importance to `density` m n entries in all.

    Args:
        delta: float32 (m, n), not all zero.
        density: kept entries of U and V together, divided by m n.
        beta, c: as in `ImPartConfig`.
        seed: 32 bits, for the masks.
        svd: returns the leading singular components, as `leading_svd` does.

    Returns:
        U diag(sigma) V^T of the kept entries, rescaled (eq. 4, 5), float32 (m, n).
    """
    rows, columns = delta.shape
    full_rank = min(rows, columns)
    sparsity = 1 - density * rows * columns / ((rows + columns) * full_rank)

    def ratios(spectrum: np.ndarray) -> np.ndarray:
        return keep_ratios(spectrum, full_rank, sparsity, beta, c)

    u, sigma, v = svd(delta, lambda spectrum: with_margin(len(ratios(spectrum))))
    thresholds = thresholds_of(ratios(sigma.double().cpu().numpy()))
    sigma = sigma[: len(thresholds)] * torch.from_numpy(kept_ratios(thresholds) ** -2.0).to(sigma)
    u, v = (
        vectors[:, : len(thresholds)] * keep_mask(seed, side, thresholds, len(vectors), delta.device).t()
        for side, vectors in enumerate((u, v))
    )
    return (u * sigma) @ v.t()


def trim_vector(vector: TaskVector, rows: int, density: float) -> TaskVector:
    """Return the vector with only its largest entries, a share of `density` (TIES, arXiv 2306.01708, "trim").

    Only a mask is stored, because a model's largest tensor would not fit into memory once for each model.

    Args:
        vector: the task vector to trim.
        rows: number of its rows.
    """
    sizes = vector(slice(rows)).abs_()
    kept = largest(sizes.flatten(), max(1, int(density * sizes.numel()))).view(sizes.shape)
    return partial(_masked, vector, kept.logical_and_(sizes > 0))  # a zero is never kept


def _masked(vector: TaskVector, kept: torch.Tensor, rows: slice) -> torch.Tensor:
    return vector(rows) * kept[rows]


def combined_deltas(deltas: list[torch.Tensor], weights: list[float], consensus: bool, normalize: bool) -> torch.Tensor:
    """Return the weighted sum of deltas, or of their entries that agree with the elected sign (TIES).

    Args:
        deltas: float32, of one shape.
        weights: one for each delta.
        consensus: whether to add up only the entries that have the sign of the weighted sum.
        normalize: whether to divide each sum by the sum of the weights that went into it.
    """
    from peft.utils.merge_utils import calculate_majority_sign_mask, reshape_weight_task_tensors, task_arithmetic

    factors = torch.tensor(weights, device=deltas[0].device)
    if not consensus:
        total = task_arithmetic(deltas, factors)
        divisor = float(factors.sum())
        return total / divisor if normalize and abs(divisor) >= 1e-8 else total
    stacked = torch.stack(deltas)
    factors = reshape_weight_task_tensors(stacked, factors)
    stacked *= factors
    agreeing = calculate_majority_sign_mask(stacked)
    total = (stacked * agreeing).sum(0)
    if normalize:
        divisors = (factors * agreeing).sum(0)
        total /= divisors.masked_fill(divisors == 0, 1)
    return total
