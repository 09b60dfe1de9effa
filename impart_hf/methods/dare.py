"""DARE: drop entries of the delta at random and rescale the rest (arXiv 2311.03099)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..modeling.seeded_mask import keep_mask
from .base import Encoded, MethodConfig
from .records import OVERHEAD_BYTES, VALUE_BYTES, check_value_dtype, direct_record, thresholds_of

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

    def encode(self, delta: torch.Tensor, max_bytes: int, mask_seed: int) -> Encoded:
        rows, columns = delta.shape
        allowed = (max_bytes - _FIXED_BYTES) // VALUE_BYTES
        threshold = int(thresholds_of(np.array([min(1.0, allowed / delta.numel())]))[0])
        while threshold > 0:
            mask = keep_mask(mask_seed, 0, np.full(rows, threshold, np.uint16), columns, delta.device)
            excess = int(mask.sum()) - allowed
            if excess <= 0:
                break
            threshold -= max(1, int(excess / delta.numel() * 65536))
        return Encoded(direct_record(delta, max(0, threshold), mask_seed, self.value_dtype))
