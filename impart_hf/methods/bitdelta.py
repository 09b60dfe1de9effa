"""BitDelta: the delta's signs and one scale (arXiv 2402.10193); above ratio 16, entries are dropped as in DARE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..coding.record_sizes import OVERHEAD_BYTES, kept_ratios
from .base import Encoded, EncodingTask, MethodConfig

_FIXED_BYTES = OVERHEAD_BYTES + 2  # one threshold for the whole matrix


@dataclass
class BitDeltaConfig(MethodConfig):
    """BitDelta's settings, which all methods have. Ratios below 16 leave bytes unused: an entry has one bit."""

    name: ClassVar[str] = "bitdelta"

    def least_bytes(self, rows: int, columns: int) -> int:
        return _FIXED_BYTES + 16

    def _encode(self, task: EncodingTask) -> Encoded:
        import torch

        from ..coding.records import direct_record, fit_threshold

        delta = task.delta
        rows, columns = delta.shape
        threshold = fit_threshold(rows, columns, (task.max_bytes - _FIXED_BYTES) * 8, task.mask_seed, delta.device)
        signs = torch.where(delta < 0, -1.0, 1.0)
        scale = float(delta.abs().mean()) / float(kept_ratios(np.array([threshold]))[0])
        return Encoded(direct_record(delta, signs, scale, threshold, 1, task.mask_seed))
