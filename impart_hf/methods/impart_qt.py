"""ImPart-Qt: ImPart with mixed-precision quantisation by sparse GPTQ (arXiv 2504.13237, section 4.1, appendix B)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .allocation import ImportanceAllocation
from .base import Encoded, Svd
from .mixed_precision import MixedPrecision
from .records import COMPONENT_BYTES, OVERHEAD_BYTES, factored_record
from .svd import leading_svd


@dataclass
class ImPartQtConfig(MixedPrecision, ImportanceAllocation):
    """ImPart-Qt's settings: those of ImPart's allocation and of the mixed precision.

    The default C is lower than ImPart's: cheap values are better spread over more components (docs/benchmarks.md).
    """

    name: ClassVar[str] = "impart-qt"

    c: float = 0.5

    def least_bytes(self, rows: int, columns: int) -> int:
        # The first component is always kept whole: its importance is 1.
        return OVERHEAD_BYTES + COMPONENT_BYTES + 2 + self.bits[0] * (rows + columns) // 8

    def encode(
        self,
        delta: torch.Tensor,
        max_bytes: int,
        mask_seed: int,
        *,
        hessian: torch.Tensor | None = None,
        svd: Svd = leading_svd,
    ) -> Encoded:
        factors, thresholds, notes = self.sparsify(delta, max_bytes, mask_seed, svd)
        u, weights, v, more = self.quantised(*factors, thresholds, mask_seed, hessian)
        widths = self.widths(len(thresholds))
        return Encoded(factored_record(delta, u, weights, v, thresholds, widths, mask_seed), notes + more)
