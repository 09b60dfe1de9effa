"""ImPart: importance-aware sparsification of the delta's singular vectors (arXiv 2504.13237, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..coding.keep_ratios import keep_ratios
from ..coding.record_sizes import (
    COMPONENT_BYTES,
    OVERHEAD_BYTES,
    VALUE_BYTES,
    VALUE_WIDTHS,
    check_value_dtype,
    kept_ratios,
)
from .base import Encoded, EncodingTask
from .importance_allocation import ImportanceAllocation
from .settings import setting


@dataclass
class ImPartConfig(ImportanceAllocation):
    """ImPart's settings.

    Attributes:
        value_dtype: dtype of the stored values, "float16" or "bfloat16".
        importance: whether keep ratios follow importance; if not, all components that are not pruned have the same.
            With `rescale`, and `beta` 0, it is a switch for the ablations of the paper's table 3.
        rescale: whether kept values are divided by their keep ratio (eq. 4, 5).
    """

    name: ClassVar[str] = "impart"

    value_dtype: str = setting("float16", "dtype of stored values, float16 or bfloat16")
    importance: bool = setting(True, "whether keep ratios follow importance, true or false")
    rescale: bool = setting(True, "whether kept values are divided by their keep ratio, true or false")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value_dtype(self.value_dtype)
        for name in ("importance", "rescale"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if not self.importance and self.c != type(self).c:
            raise ValueError(f"c is the exponent of importance, which is false: leave c at {type(self).c}")

    def widths(self, count: int) -> np.ndarray:
        return np.full(count, VALUE_WIDTHS[self.value_dtype])

    def least_bytes(self, rows: int, columns: int) -> int:
        # All entries of the first component are kept, because its importance is 1.
        return OVERHEAD_BYTES + COMPONENT_BYTES + VALUE_BYTES * (rows + columns)

    def _keep_ratios(self, spectrum: np.ndarray, full_rank: int, sparsity: float) -> np.ndarray:
        return keep_ratios(spectrum, full_rank, sparsity, self.beta, self.c if self.importance else None)

    def _encode(self, task: EncodingTask) -> Encoded:
        from ..coding.records import factored, pack_measured

        (u, sigma, v), thresholds, notes = self.sparsify(task.delta, task.max_bytes, task.mask_seed, task.svd)
        values = sigma.double().cpu().numpy()
        if self.rescale:
            values /= kept_ratios(thresholds) ** 2  # of U and of V
        widths = self.widths(len(thresholds))
        return Encoded(pack_measured(factored(u, values, v, thresholds, widths, task.mask_seed), task.delta), notes)
