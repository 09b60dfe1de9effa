"""ImPart's keep ratios of the singular components by importance (arXiv 2504.13237, section 3)."""

import numpy as np


def with_margin(kept: int) -> int:
    """Return how many components to compute so that `kept` can be kept although singular values are estimates."""
    return kept + 1 + kept // 16  # one more than kept, because the first dropped component is the boundary


def keep_ratios(sigma: np.ndarray, full_rank: int, sparsity: float, beta: float, c: float | None) -> np.ndarray:
    """Return the keep ratios q_k = 1 - p_k of the components that are not pruned (eq. 7, algorithm 1).

    The paper's loop prunes components from the last one backwards while the mean of p over the remaining ones is below
    gamma ("shifting the boundary"). What remains is the longest prefix whose ratios sum to no more than the budget.

    Args:
        sigma: float64, the leading singular values in falling order; more of them than are kept, or all.
        full_rank: min(m, n).
        sparsity: alpha_uv, the mean of p over all components.
        beta: share of components that is pruned first; lowered to `sparsity` if it is larger.
        c: exponent of the importance; None gives all components that are not pruned the same ratio (the paper's
            ablation "w/o importance-aware", table 3).

    Returns:
        float64 of shape (r,), r at least 1 and at most floor(full_rank * (1 - beta)).
    """
    beta = min(beta, sparsity)
    unpruned = max(1, int(full_rank * (1 - beta) + 1e-9))
    gamma = (sparsity - beta) / (1 - beta) if beta < 1 else 1.0
    importance = (sigma[:unpruned] / sigma[0]) ** c if c is not None else np.zeros(len(sigma[:unpruned]))
    ratios = 1 - (1 - importance) * gamma
    # 1e-9, because rounding errors may raise the sum of many ratios above the budget.
    kept = int(np.searchsorted(np.cumsum(ratios), unpruned * (1 - gamma) + 1e-9, side="right"))
    return ratios[: max(1, kept)]
