"""DARE-Qt: DARE with kept entries quantised by sparse GPTQ (a baseline in arXiv 2504.13237, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..coding.record_sizes import OVERHEAD_BYTES, kept_ratios
from .base import Encoded, EncodingTask, MethodConfig
from .mixed_precision import check_bits
from .settings import setting

_SCALE_BYTES = 2


@dataclass
class DareQtConfig(MethodConfig):
    """DARE-Qt's settings.

    Attributes:
        value_bits: bits of a kept value, 2 to 8; every row of the matrix has a column scale.
    """

    name: ClassVar[str] = "dare-qt"
    quantises = True

    value_bits: int = setting(2, "bits of a kept value, 2 to 8")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits("value_bits", self.value_bits)

    def _fixed_bytes(self, rows: int) -> int:
        return OVERHEAD_BYTES + 2 + _SCALE_BYTES * rows  # one threshold for the whole matrix

    def least_bytes(self, rows: int, columns: int) -> int:
        return self._fixed_bytes(rows) + rows

    def _encode(self, task: EncodingTask) -> Encoded:
        from ..coding.factor_quantisation import bias_correction
        from ..coding.gptq import Grid, quantise, shared_factor
        from ..coding.level_scales import fit_levels
        from ..coding.records import direct_record, fit_threshold
        from ..modeling.seeded_mask import keep_mask

        delta = task.delta
        rows, columns = delta.shape
        most_values = (task.max_bytes - self._fixed_bytes(rows)) * 8 // self.value_bits
        threshold = fit_threshold(rows, columns, most_values, task.mask_seed, delta.device)
        thresholds = np.full(rows, threshold, np.uint16)
        mask = keep_mask(task.mask_seed, 0, thresholds, columns, delta.device)
        largest_entry = float(delta.abs().max())
        plane = delta / largest_entry
        scales = fit_levels(plane, mask, self.value_bits).scale
        factor = None if task.hessian is None else shared_factor(task.hessian)
        grid = Grid(scales[:, None], np.full(rows, self.value_bits))
        if task.transposed:  # every column is an output; a scale still belongs to a row
            by_column = Grid(scales[None], grid.widths)
            result = quantise(plane.t().contiguous(), mask.t().contiguous(), task.hessian, by_column, factor)
            values, correction = result.values.t(), bias_correction(plane, result.values.t(), mask)
        else:
            result = quantise(plane, mask, task.hessian, grid, factor)
            values, correction = result.values, bias_correction(plane, result.values, mask, task.hessian)
        levels, scales = values / grid.scale, scales * correction
        largest_scale = float(scales.max()) or 1.0  # 0 if nothing was kept
        scale = largest_entry * largest_scale / float(kept_ratios(thresholds[:1])[0])
        column_scales = (scales / largest_scale).half().cpu().numpy()
        record = direct_record(delta, levels, scale, threshold, self.value_bits, task.mask_seed, column_scales)
        return Encoded(record, result.notes)
