"""ImPart's keep ratios of the singular components by importance (arXiv 2504.13237, section 3)."""

import numpy as np


def with_margin(kept: int) -> int:
    """How many components to ask for, to keep so many by leading singular values that are estimates as yet."""
    return kept + 1 + kept // 16  # the boundary is where the first component is left out


def keep_ratios(sigma: np.ndarray, full_rank: int, sparsity: float, beta: float, c: float) -> np.ndarray:
    """Keep ratios q_k = 1 - p_k of the components that are not pruned (eq. 7, algorithm 1).

    The paper's loop prunes un-pruned components from the last one backwards while the mean of p over them is under
    gamma ("shifting the boundary"). That leaves the longest prefix whose ratios sum to no more than the budget.

    Args:
        sigma: float64, the leading singular values in falling order; more of them than are kept, or all.
        full_rank: min(m, n).
        sparsity: alpha_uv, the mean of p over all components.
        beta: share pruned beforehand; lowered to `sparsity` where it exceeds that.
        c: exponent of the importance.

    Returns:
        float64 of shape (r,), r at least 1 and at most floor(full_rank * (1 - beta)).
    """
    beta = min(beta, sparsity)
    unpruned = max(1, int(full_rank * (1 - beta) + 1e-9))
    gamma = (sparsity - beta) / (1 - beta) if beta < 1 else 1.0
    ratios = 1 - (1 - (sigma[:unpruned] / sigma[0]) ** c) * gamma
    # 1e-9: the sum of many ratios may exceed the budget by rounding alone
    kept = int(np.searchsorted(np.cumsum(ratios), unpruned * (1 - gamma) + 1e-9, side="right"))
    return ratios[: max(1, kept)]
