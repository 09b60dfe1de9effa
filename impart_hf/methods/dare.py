"""DARE: drop entries of the delta at random and rescale the rest (arXiv 2311.03099)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from .base import Encoded, MethodConfig, Svd
from .records import (
    OVERHEAD_BYTES,
    VALUE_BYTES,
    VALUE_WIDTHS,
    check_value_dtype,
    direct_record,
    fit_threshold,
    kept_ratios,
)
from .svd import leading_svd

_FIXED_BYTES = OVERHEAD_BYTES + 2  # one threshold for the whole matrix


@dataclass
class DareConfig(MethodConfig):
    """DARE's settings.

    Attributes:
        value_dtype: "float16" or "bfloat16", the storage of kept values.
    """

    name: ClassVar[str] = "dare"

    value_dtype: str = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value_dtype(self.value_dtype)

    def least_bytes(self, rows: int, columns: int) -> int:
        return _FIXED_BYTES + VALUE_BYTES * 16

    def encode(
        self,
        delta: torch.Tensor,
        max_bytes: int,
        mask_seed: int,
        *,
        hessian: torch.Tensor | None = None,
        svd: Svd = leading_svd,
    ) -> Encoded:
        rows, columns = delta.shape
        threshold = fit_threshold(rows, columns, (max_bytes - _FIXED_BYTES) // VALUE_BYTES, mask_seed, delta.device)
        # Deltas are small numbers: relative to the largest they stay clear of float16's subnormal range.
        largest = float(delta.abs().max())
        scale = largest / float(kept_ratios(np.array([threshold]))[0])
        width = VALUE_WIDTHS[self.value_dtype]
        return Encoded(direct_record(delta, delta / largest, scale, threshold, width, mask_seed))
