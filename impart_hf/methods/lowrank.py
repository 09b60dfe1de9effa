"""LowRank: the delta's leading singular components without dropped entries (truncated SVD, a baseline of the paper)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..coding.record_sizes import COMPONENT_BYTES, OVERHEAD_BYTES, VALUE_BYTES, VALUE_WIDTHS, check_value_dtype
from ..modeling.delta_record import MAX_THRESHOLD
from .base import Encoded, EncodingTask, MethodConfig
from .settings import setting


@dataclass
class LowRankConfig(MethodConfig):
    """LowRank's settings; the rank of each matrix follows from the ratio.

    Attributes:
        value_dtype: dtype of the stored values, "float16" or "bfloat16".
    """

    name: ClassVar[str] = "lowrank"
    factored = True
    drops_entries = False

    value_dtype: str = setting("float16", "dtype of stored values, float16 or bfloat16")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value_dtype(self.value_dtype)

    def least_bytes(self, rows: int, columns: int) -> int:
        return OVERHEAD_BYTES + COMPONENT_BYTES + VALUE_BYTES * (rows + columns)

    def rank_for(self, spectrum: np.ndarray, rows: int, columns: int, max_bytes: int) -> int:
        # Without masks, no component has the 2 bytes of a threshold.
        component = COMPONENT_BYTES - 2 + VALUE_BYTES * (rows + columns)
        return min(rows, columns, (max_bytes - OVERHEAD_BYTES) // component)

    def _encode(self, task: EncodingTask) -> Encoded:
        from ..coding.records import factored, pack_measured

        rows, columns = task.delta.shape
        rank = self.rank_for(np.empty(0), rows, columns, task.max_bytes)
        u, sigma, v = (part[..., :rank] for part in task.svd(task.delta, lambda _: rank))
        keep_all, widths = np.full(rank, MAX_THRESHOLD, np.uint16), np.full(rank, VALUE_WIDTHS[self.value_dtype])
        return Encoded(
            pack_measured(factored(u, sigma.double().cpu().numpy(), v, keep_all, widths, task.mask_seed), task.delta)
        )
