"""ImPart: importance-aware sparsification of the delta's singular vectors (arXiv 2504.13237, section 3)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..modeling.seeded_mask import keep_mask
from .base import Encoded, MethodConfig, check_number
from .records import OVERHEAD_BYTES, VALUE_BYTES, check_value_dtype, factored_record, kept_ratios, thresholds_of
from .svd import leading_svd

_COLUMN_BYTES = 4  # sigma and threshold
_MAX_FITS = 16


@dataclass
class ImPartConfig(MethodConfig):
    """ImPart's settings.

    Attributes:
        beta: share of the singular components that is pruned beforehand, from the smallest, in [0, 1). Lowered for a
            matrix whose budget asks for less sparsity than that.
        c: exponent C of the importance sigma_k / sigma_1 (eq. 7), above 0.
        value_dtype: "float16" or "bfloat16", the storage of kept values.
    """

    name: ClassVar[str] = "impart"

    beta: float = 0.6
    c: float = 1.0
    value_dtype: str = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta)
        check_number("c", self.c)
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must lie in [0, 1), got {self.beta}")
        if not 0 < self.c < float("inf"):
            raise ValueError(f"c must be above 0, got {self.c}")
        check_value_dtype(self.value_dtype)

    def least_bytes(self, rows: int, columns: int) -> int:
        # The first component is always kept whole: its importance is 1.
        return OVERHEAD_BYTES + _COLUMN_BYTES + VALUE_BYTES * (rows + columns)

    def encode(self, delta: torch.Tensor, max_bytes: int, mask_seed: int) -> Encoded:
        rows, columns = delta.shape
        full_rank = min(rows, columns)
        budget = float(max_bytes)

        def wanted(spectrum: np.ndarray) -> int:
            sparsity = self._sparsity_for(spectrum, rows, columns, budget)
            kept = len(keep_ratios(spectrum, full_rank, sparsity, self.beta, self.c))
            # The values are estimates, and the boundary is where the first component is left out
            return kept + 1 + kept // 16

        u, sigma, v = leading_svd(delta, wanted)
        spectrum = sigma.double().cpu().numpy()
        for _ in range(_MAX_FITS):
            sparsity = self._sparsity_for(spectrum, rows, columns, budget)
            thresholds = thresholds_of(keep_ratios(spectrum, full_rank, sparsity, self.beta, self.c))
            kept = sum(
                int(keep_mask(mask_seed, side, thresholds, length, delta.device).sum())
                for side, length in enumerate((rows, columns))
            )
            excess = OVERHEAD_BYTES + _COLUMN_BYTES * len(thresholds) + VALUE_BYTES * kept - max_bytes
            if excess <= 0:
                break
            # The masks kept a few more than expected: aim lower than what was expected by that much.
            budget = _expected_bytes(kept_ratios(thresholds), rows, columns) - excess
        else:
            thresholds = thresholds[:1]
        rank = len(thresholds)
        data = factored_record(delta, u[:, :rank], sigma[:rank], v[:, :rank], thresholds, mask_seed, self.value_dtype)
        lowered = min(self.beta, sparsity)
        notes = (f"beta lowered from {self.beta} to {lowered:.3f}",) if lowered < self.beta else ()
        return Encoded(data, notes)

    def _sparsity_for(self, spectrum: np.ndarray, rows: int, columns: int, budget: float) -> float:
        """The least alpha_uv whose expected record fits the budget, by bisection (as algorithm 3 does).

        Args:
            spectrum: the leading singular values, more of them than the record is going to keep.
        """
        full_rank = min(rows, columns)
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            ratios = kept_ratios(thresholds_of(keep_ratios(spectrum, full_rank, middle, self.beta, self.c)))
            low, high = (low, middle) if _expected_bytes(ratios, rows, columns) <= budget else (middle, high)
        return high


def _expected_bytes(ratios: np.ndarray, rows: int, columns: int) -> float:
    """Size of a record whose columns keep their entries with these probabilities."""
    return OVERHEAD_BYTES + _COLUMN_BYTES * len(ratios) + VALUE_BYTES * (rows + columns) * float(ratios.sum())


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
        float64 of shape (r,), r at most floor(full_rank * (1 - beta)).
    """
    beta = min(beta, sparsity)
    unpruned = int(full_rank * (1 - beta))
    gamma = (sparsity - beta) / (1 - beta) if beta < 1 else 1.0
    ratios = 1 - (1 - (sigma[:unpruned] / sigma[0]) ** c) * gamma
    # 1e-9: the sum of many ratios may exceed the budget by rounding alone
    return ratios[: int(np.searchsorted(np.cumsum(ratios), unpruned * (1 - gamma) + 1e-9, side="right"))]
