"""ImPart-Qt: ImPart with mixed-precision quantisation by sparse GPTQ (arXiv 2504.13237, section 4.1, appendix B)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Encoded, EncodingTask
from .importance_allocation import ImportanceAllocation
from .mixed_precision import MixedPrecision

if TYPE_CHECKING:
    import numpy as np


@dataclass
class ImPartQtConfig(MixedPrecision, ImportanceAllocation):
    """ImPart-Qt's settings: those of ImPart's allocation and of mixed precision.

    The default of C is lower than ImPart's, because values of few bits do better in more components
    (docs/results-toys.md).
    """

    name: ClassVar[str] = "impart-qt"

    c: float = 0.5

    def _encode(self, task: EncodingTask) -> Encoded:
        from ..coding.factor_quantisation import quantised
        from ..coding.records import factored, pack_measured

        factors, thresholds, notes = self.sparsify(task.delta, task.max_bytes, task.mask_seed, task.svd)
        widths = self.widths(len(thresholds))
        u, sigma, v, more = quantised(
            *factors, thresholds, widths, task.mask_seed, task.hessian, transposed=task.transposed
        )
        return Encoded(
            pack_measured(factored(u, sigma, v, thresholds, widths, task.mask_seed), task.delta), notes + more
        )

    def _stack_thresholds(
        self, spectra: list[np.ndarray], tasks: list[EncodingTask]
    ) -> list[tuple[np.ndarray, tuple[str, ...]]]:
        budgets, seeds = [task.max_bytes for task in tasks], [task.mask_seed for task in tasks]
        rows, columns = tasks[0].delta.shape
        return self.thresholds_for(spectra, budgets, seeds, (rows, columns), tasks[0].delta.device)
