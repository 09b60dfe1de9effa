"""Delta-CoMe: leading singular components at mixed precision, without dropped entries (arXiv 2406.08903)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..coding.record_sizes import factored_bytes
from ..modeling.delta_record import MAX_THRESHOLD
from .base import Encoded, EncodingTask
from .mixed_precision import MixedPrecision


@dataclass
class DeltaComeConfig(MixedPrecision):
    """Delta-CoMe's settings; the number of components of each matrix follows from the ratio."""

    name: ClassVar[str] = "delta-come"
    drops_entries = False

    def rank_for(self, spectrum: np.ndarray, rows: int, columns: int, max_bytes: int) -> int:
        def fits(rank: int) -> bool:
            # Without masks, no component has the 2 bytes of a threshold.
            size = factored_bytes(self.widths(rank), np.full(rank, rows), np.full(rank, columns))
            return size - 2 * rank <= max_bytes

        low, high = 1, min(rows, columns) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _encode(self, task: EncodingTask) -> Encoded:
        from ..coding.factor_quantisation import quantised
        from ..coding.records import factored, pack_measured

        rows, columns = task.delta.shape
        rank = self.rank_for(np.empty(0), rows, columns, task.max_bytes)
        u, sigma, v = (part[..., :rank] for part in task.svd(task.delta, lambda _: rank))
        keep_all = np.full(rank, MAX_THRESHOLD, np.uint16)
        widths = self.widths(rank)
        u, scaled_sigma, v, notes = quantised(
            u, sigma, v, keep_all, widths, task.mask_seed, task.hessian, transposed=task.transposed
        )
        return Encoded(pack_measured(factored(u, scaled_sigma, v, keep_all, widths, task.mask_seed), task.delta), notes)

    def _stack_thresholds(
        self, spectra: list[np.ndarray], tasks: list[EncodingTask]
    ) -> list[tuple[np.ndarray, tuple[str, ...]]]:
        return [(np.full(len(spectrum), MAX_THRESHOLD, np.uint16), ()) for spectrum in spectra]
