"""DARE: drop entries of the delta at random and rescale the rest (arXiv 2311.03099)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..coding.record_sizes import OVERHEAD_BYTES, VALUE_BYTES, VALUE_WIDTHS, check_value_dtype, kept_ratios
from .base import Encoded, EncodingTask, MethodConfig
from .settings import setting

_FIXED_BYTES = OVERHEAD_BYTES + 2  # one threshold for the whole matrix


@dataclass
class DareConfig(MethodConfig):
    """DARE's settings.

    Attributes:
        value_dtype: dtype of the stored values, "float16" or "bfloat16".
    """

    name: ClassVar[str] = "dare"

    value_dtype: str = setting("float16", "dtype of stored values, float16 or bfloat16")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value_dtype(self.value_dtype)

    def least_bytes(self, rows: int, columns: int) -> int:
        return _FIXED_BYTES + VALUE_BYTES * 16

    def _encode(self, task: EncodingTask) -> Encoded:
        from ..coding.records import direct_record, fit_threshold

        delta = task.delta
        rows, columns = delta.shape
        threshold = fit_threshold(
            rows, columns, (task.max_bytes - _FIXED_BYTES) // VALUE_BYTES, task.mask_seed, delta.device
        )
        # Deltas are small; divided by the largest entry, they are not in float16's subnormal range.
        largest = float(delta.abs().max())
        scale = largest / float(kept_ratios(np.array([threshold]))[0])
        width = VALUE_WIDTHS[self.value_dtype]
        return Encoded(direct_record(delta, delta / largest, scale, threshold, width, task.mask_seed))
