"""ImPart: importance-aware sparsification of the delta's singular vectors (arXiv 2504.13237, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

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
    """

    name: ClassVar[str] = "impart"

    value_dtype: str = setting("float16", "dtype of stored values, float16 or bfloat16")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value_dtype(self.value_dtype)

    def widths(self, count: int) -> np.ndarray:
        return np.full(count, VALUE_WIDTHS[self.value_dtype])

    def least_bytes(self, rows: int, columns: int) -> int:
        # All entries of the first component are kept, because its importance is 1.
        return OVERHEAD_BYTES + COMPONENT_BYTES + VALUE_BYTES * (rows + columns)

    def _encode(self, task: EncodingTask) -> Encoded:
        from ..coding.records import factored, pack_measured

        (u, sigma, v), thresholds, notes = self.sparsify(task.delta, task.max_bytes, task.mask_seed, task.svd)
        rescaled = sigma.double().cpu().numpy() / kept_ratios(thresholds) ** 2
        widths = self.widths(len(thresholds))
        return Encoded(pack_measured(factored(u, rescaled, v, thresholds, widths, task.mask_seed), task.delta), notes)
