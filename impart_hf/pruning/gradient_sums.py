"""Running sums over the gradients of one matrix, each given as a product of two low-rank factors."""

from __future__ import annotations

import numpy as np
import torch

from ..common.largest import largest
from .importance_report import masked_entries


class MatrixSums:
    """Running sums over the gradients G = B A of one matrix.

    Attributes:
        steps: how many gradients were added.
        squares: float64, (units,): sum of G² over the steps and the entries of each unit, a block of rows or columns.
        norms: float64, (units,): sum over the steps of each unit's ‖G‖_F.
        norm: sum over the steps of the whole matrix's ‖G‖_F.
    """

    def __init__(self, units: int, by_rows: bool, keep: bool):
        """Set all sums to zero.

        Args:
            units: number of equal blocks that the rows or columns are divided into.
            by_rows: True for blocks of rows, False for blocks of columns.
            keep: whether to keep the sum of G² for every entry, which the mask needs.
        """
        self.steps, self.norm = 0, 0.0
        self.squares, self.norms = torch.zeros(2, units, dtype=torch.float64)
        self._by_rows, self._keep = by_rows, keep
        self._factors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._sum: torch.Tensor | None = None

    def add(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Add one gradient G = B A.

        Args:
            a, b: float32, on the CPU: (rank, in) and (out, rank).

        Returns:
            False, with nothing added, if the gradient is not finite.
        """
        left, right = (b, a) if self._by_rows else (a.t(), b.t())
        left, right = left.double(), right.double()
        # Rounding can make a sum of squares slightly negative
        squares = ((left @ (right @ right.t())) * left).sum(1).clamp_min(0).view(len(self.squares), -1).sum(1)
        if not torch.isfinite(squares).all():
            return False
        self.steps += 1
        self.squares += squares
        self.norms += squares.sqrt()
        self.norm += float(squares.sum().sqrt())
        if self._keep:
            self._add_entries(a, b)
        return True

    def _add_entries(self, a: torch.Tensor, b: torch.Tensor) -> None:
        if self._sum is None:
            self._factors.append((a, b))
            # The factors of the first steps take less memory than the matrix itself
            if self.held > b.shape[0] * a.shape[1]:
                self._sum, self._factors = _sum_of_squares(self._factors), []
        else:
            self._sum += (b @ a).square_()

    @property
    def held(self) -> int:
        """The number of values kept for the mask: gradient factors, or one sum per entry."""
        return self._sum.numel() if self._sum is not None else sum(a.numel() + b.numel() for a, b in self._factors)

    def total(self, score: str) -> float:
        """Return the matrix's part of its layer's score."""
        return float(self.squares.sum()) / self.steps if score == "igia" else self.norm

    def units(self, score: str) -> torch.Tensor:
        """Return the units' scores in this matrix: float64, (units,)."""
        return self.squares / self.steps if score == "igia" else self.norms

    def mask(self, top_percent: float) -> np.ndarray | None:
        """Return the packed mask of the entries with the largest sums, of equal ones the first; None without `keep`.

        The sums over the entries are freed.
        """
        if not self._keep:
            return None
        entries = (_sum_of_squares(self._factors) if self._sum is None else self._sum).reshape(-1)
        self._factors, self._sum = [], None
        return np.packbits(largest(entries, masked_entries(top_percent, entries.numel())).numpy())


def _sum_of_squares(factors: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    (a, b), *others = factors
    total = (b @ a).square_()
    for a, b in others:
        total += (b @ a).square_()
    return total
