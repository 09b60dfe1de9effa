"""ImPart's allocation: keep ratios of the singular components by importance (arXiv 2504.13237, section 3)."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..coding.keep_ratios import keep_ratios, with_margin
from ..coding.record_sizes import factored_bytes, kept_ratios, thresholds_of
from ..common.validation import check_number
from .base import MethodConfig
from .settings import setting

if TYPE_CHECKING:
    import torch

    from ..coding.svd import Svd

BETAS = (0.6, 0.7, 0.8)  # the paper's search grids
CS = (0.5, 1.0)

_MAX_FITS = 16


@dataclass
class ImportanceAllocation(MethodConfig):
    """Settings of the methods that allocate keep ratios by importance.

    Attributes:
        beta: share of the singular components that is pruned first, starting with the smallest, in [0, 1). It is
            lowered for a matrix whose byte budget needs less sparsity than that.
        c: exponent C of the importance sigma_k / sigma_1 (eq. 7), above 0.
    """

    factored = True

    beta: float = setting(0.6, "share of the singular components that is pruned first, in [0, 1)")
    c: float = setting(1.0, "exponent of a component's importance, above 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta)
        check_number("c", self.c)
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must lie in [0, 1), got {self.beta}")
        if not 0 < self.c < float("inf"):
            raise ValueError(f"c must be above 0, got {self.c}")

    @abc.abstractmethod
    def widths(self, count: int) -> np.ndarray:
        """Return the width codes of the first `count` components' values, (count,)."""

    def rank_for(self, spectrum: np.ndarray, rows: int, columns: int, max_bytes: int) -> int:
        sparsity = self._sparsity_for(spectrum, rows, columns, max_bytes)
        return with_margin(len(self._keep_ratios(spectrum, min(rows, columns), sparsity)))

    def sparsify(
        self, delta: torch.Tensor, max_bytes: int, mask_seed: int, svd: Svd
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], np.ndarray, tuple[str, ...]]:
        """Choose the components that are kept and their thresholds so that the record takes at most `max_bytes`.

        Returns:
            U (m, r), sigma (r,), V (n, r); thresholds, uint16 (r,); notes.
        """
        rows, columns = delta.shape
        u, sigma, v = svd(delta, partial(self.rank_for, rows=rows, columns=columns, max_bytes=max_bytes))
        spectrum = sigma.double().cpu().numpy()
        ((thresholds, notes),) = self.thresholds_for(
            [spectrum], [max_bytes], [mask_seed], (rows, columns), delta.device
        )
        rank = len(thresholds)
        return (u[:, :rank], sigma[:rank], v[:, :rank]), thresholds, notes

    def thresholds_for(
        self,
        spectra: list[np.ndarray],
        max_bytes: list[int],
        seeds: list[int],
        shape: tuple[int, int],
        device: torch.device,
    ) -> list[tuple[np.ndarray, tuple[str, ...]]]:
        """Choose components and thresholds of several matrices of one shape; see `sparsify`.

        Args:
            spectra: the leading singular values of each, float64, more of them than are kept.
            max_bytes, seeds: byte budget and mask seed of each.

        Returns:
            Thresholds and notes of each.
        """
        from ..coding.records import kept_counts_of_all

        budgets = [float(most) for most in max_bytes]
        thresholds: list[np.ndarray] = [np.empty(0, np.uint16)] * len(spectra)
        sparsity = [0.0] * len(spectra)
        waiting = list(range(len(spectra)))
        for _ in range(_MAX_FITS):
            for i in waiting:
                sparsity[i] = self._sparsity_for(spectra[i], *shape, budgets[i])
                thresholds[i] = thresholds_of(self._keep_ratios(spectra[i], min(shape), sparsity[i]))
            kept = kept_counts_of_all([seeds[i] for i in waiting], [thresholds[i] for i in waiting], shape, device)
            too_large = []
            for i, counts in zip(waiting, kept, strict=True):
                excess = factored_bytes(self.widths(len(thresholds[i])), *counts) - max_bytes[i]
                if excess > 0:
                    # The masks kept more entries than expected: lower the budget by the excess.
                    budgets[i] = self._expected_bytes(kept_ratios(thresholds[i]), *shape) - excess
                    too_large.append(i)
            waiting = too_large
            if not waiting:
                break
        for i in waiting:
            thresholds[i] = thresholds[i][:1]
        lowered = [min(self.beta, own) for own in sparsity]
        notes = [(f"beta lowered from {self.beta} to {own:.3f}",) if own < self.beta else () for own in lowered]
        return list(zip(thresholds, notes, strict=True))

    def _sparsity_for(self, spectrum: np.ndarray, rows: int, columns: int, budget: float) -> float:
        """Return the least alpha_uv whose expected record fits the budget, by bisection (algorithm 3).

        Args:
            spectrum: the leading singular values, more of them than the record will keep.
        """
        full_rank = min(rows, columns)
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            ratios = kept_ratios(thresholds_of(self._keep_ratios(spectrum, full_rank, middle)))
            low, high = (low, middle) if self._expected_bytes(ratios, rows, columns) <= budget else (middle, high)
        return high

    def _keep_ratios(self, spectrum: np.ndarray, full_rank: int, sparsity: float) -> np.ndarray:
        """Return the keep ratios of the components that are not pruned; see `coding.keep_ratios.keep_ratios`."""
        return keep_ratios(spectrum, full_rank, sparsity, self.beta, self.c)

    def _expected_bytes(self, ratios: np.ndarray, rows: int, columns: int) -> float:
        """Return the expected size of a record whose columns keep entries with these probabilities."""
        return factored_bytes(self.widths(len(ratios)), rows * ratios, columns * ratios)
