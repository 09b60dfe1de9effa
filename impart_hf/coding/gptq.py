"""Quantising a matrix with dropped entries so that the layer's output changes least: ImPart's sparse GPTQ.

GPTQ (arXiv 2210.17323) rounds a matrix column by column. The columns that are not yet rounded compensate for the error
of each, as far as the layer's inputs are correlated. ImPart's algorithm 2 (arXiv 2504.13237) does so with a mask: the
error of a dropped entry is not compensated. Yet it relies on dropped entries to compensate for others, so if few are
kept it gains little over rounding. Coordinate descent (QuantEase, arXiv 2309.01885) would rely on kept entries alone.

A weight of shape (rows, columns) acts as `y = weight @ x`; its Hessian, (columns, columns), is the mean of `x x^T` over
calibration inputs. All have one dtype, float32 or float64, which is also that of the computation. Masks are bool, true
where an entry is kept; None keeps all. Rows do not influence each other. scripts/benchmark_gptq.py measures time and
error.

On an accelerator, everything may be a stack of matrices, one more axis in front of all that is said here. Those of a
lower rank than others have absent components: rows or columns of zeros at the end, with a mask that drops them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.last_result import LastResult
from ..modeling.codebook import Levels, level_codebook
from ..modeling.width_codes import NORMAL_LEVELS
from .records import runs
from .stacked_levels import StackRounder, stacked_codes, stacked_values
from .torch_gptq import TorchRounder
from .triton_gptq import BLOCK, BlockRounder, rounds_on

DAMPING = 0.01  # added to a Hessian's diagonal, in units of its mean, as in GPTQ
_DAMPINGS = (1, 10, 100)  # multiples of the damping, tried until the Hessian can be factored


@dataclass(frozen=True)
class Grid:
    """The levels of each row, or of each column: its codebook's levels times its scale.

    Attributes:
        scale: positive, (rows, 1) or (1, columns).
        widths: width codes of levels, one for each scale; int64 (rows,) or (columns,).
    """

    scale: Tensor
    widths: np.ndarray

    @property
    def by_row(self) -> bool:
        return self.scale.shape[-1] == 1

    def codes(self, values: Tensor) -> Tensor:
        """Return the codes, uint8, of the levels nearest to values (rows, columns)."""
        if values.dim() == 3:
            return stacked_codes(values / self.scale, self.widths, self.by_row)
        units, codes = values / self.scale, torch.empty_like(values, dtype=torch.uint8)
        for book, part in self.parts():
            codes[part] = book.nearest(units[part])
        return codes

    def values(self, codes: Tensor) -> Tensor:
        """Return the levels of codes (rows, columns), in the scale's dtype."""
        if codes.dim() == 3:
            return stacked_values(codes, self.widths, self.by_row).mul_(self.scale)
        values = torch.empty_like(codes, dtype=self.scale.dtype)
        for book, part in self.parts():
            values[part] = book.values(codes[part], values.dtype)
        return values.mul_(self.scale)

    def parts(self) -> list[tuple[Levels, Any]]:
        """Return each run of rows or columns with one width code as its codebook and its index."""
        parts = [(level_codebook(width), part) for width, part in runs(self.widths)]
        if len(parts) == 1:
            return [(parts[0][0], ...)]
        return parts if self.by_row else [(book, (slice(None), part)) for book, part in parts]


@dataclass(frozen=True)
class Factor:
    """An upper triangular U: U^T U is the inverse of the damped Hessian with its columns in `order`, int64.

    Attributes:
        notes: on unusual damping.
    """

    upper: Tensor
    order: Tensor
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quantised:
    """Codes, uint8, and their values, both (rows, columns) and 0 where dropped; notes on unusual damping."""

    codes: Tensor
    values: Tensor
    notes: tuple[str, ...] = ()


class StackError(ValueError):
    """A stack has a matrix that needs more damping than others: they must be encoded one by one."""


def reordered(matrix: Tensor, order: Tensor) -> Tensor:
    """Return the rows of a matrix (..., rows, columns) in an order, int64 (..., rows)."""
    return matrix[order] if order.dim() == 1 else matrix.gather(1, order[..., None].expand(-1, -1, matrix.shape[2]))


def mean_diagonal(matrix: Tensor, ranks: Tensor | None = None) -> Tensor:
    """Return the mean of the diagonal (...,); of those of a stack with absent rows, over the first `ranks`."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    return diagonal.mean(-1) if ranks is None else diagonal.sum(-1) / ranks


def inverse_factor(hessian: Tensor, damping: float = DAMPING, ranks: Tensor | None = None) -> Factor:
    """Order the columns and factor the inverse of the damped Hessian H without forming the inverse.

    With H = R R^T for an upper triangular R, H^-1 = R^-T R^-1, so U is R^-1. R is the reversed Cholesky factor of H
    with rows and columns reversed.

    Args:
        hessian: (columns, columns), symmetric, positive semidefinite.
        damping: added to the diagonal, in units of its mean; raised up to a hundredfold if that is too little.
        ranks: of a stack with absent rows and columns, how many there are of each matrix.

    Raises:
        ValueError: if the Hessian has entries that are not finite, or is far from positive semidefinite.
        StackError: if that, or more damping, is so with one of a stack.
    """
    if hessian.dim() == 3:
        return _stacked_factor(hessian, damping, ranks)
    finite = torch.isfinite(torch.linalg.vector_norm(hessian, torch.inf))
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    damped = hessian[order.flip(0)[:, None], order.flip(0)]
    diagonal = damped.diagonal().clone()
    unit = diagonal.double().mean()
    unit = torch.where(unit == 0, 1.0, unit)  # if all inputs are zero, any damping will do
    for times in _DAMPINGS:
        damped.diagonal().copy_(diagonal + times * damping * unit)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if bool(finite & (failed == 0)):  # the host waits for both at once
            notes = () if times == 1 else (f"singular Hessian: damping raised to {times * damping:g}",)
            return Factor(_inverse_of_lower(lower).flip(0, 1), order, notes)
        if not bool(finite):
            raise ValueError("the Hessian has entries that are not finite: check the calibration inputs")
    raise ValueError(f"the Hessian is not positive semidefinite, even with damping {times * damping:g}")


def _stacked_factor(hessians: Tensor, damping: float, ranks: Tensor | None) -> Factor:
    order = torch.argsort(hessians.diagonal(dim1=1, dim2=2), dim=1, descending=True, stable=True)
    damped = reordered(reordered(hessians, order.flip(1)).mT, order.flip(1))
    unit = mean_diagonal(hessians.double(), ranks)
    unit = torch.where(unit == 0, 1.0, unit)
    damped.diagonal(dim1=1, dim2=2).add_((damping * unit)[:, None])
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not bool((torch.isfinite(unit) & (failed == 0)).all()):
        raise StackError("a Hessian is not positive definite")
    return Factor(_inverse_of_lower(lower).flip(1, 2), order)


def _inverse_of_lower(lower: Tensor, step: int = 512) -> Tensor:
    """Return the inverse of a lower triangular matrix; skipping its zeros saves two thirds of the work."""
    inverse = torch.zeros(lower.shape, dtype=lower.dtype, device=lower.device)  # one row after the other
    for start in range(0, lower.shape[-1], step):
        rest = lower[..., start:, start:]
        side = rest.shape[-1]
        identity = torch.eye(side, min(step, side), dtype=lower.dtype, device=lower.device)
        inverse[..., start:, start : start + step] = torch.linalg.solve_triangular(rest, identity, upper=False)
    return inverse


# `inverse_factor` of the last Hessian, for the matrices that share their inputs.
shared_factor = LastResult(inverse_factor)


def sparse_gptq(weight: Tensor, mask: Tensor | None, factor: Factor, grid: Grid, block: int = BLOCK) -> Tensor:
    """Quantise by ImPart's algorithm 2: return codes, uint8, (rows, columns), 0 where dropped.

    Args:
        factor: `inverse_factor` of the Hessian.
        block: columns, at most 128, whose errors are compensated for in all later columns by one matrix product.
    """
    order, upper = factor.order, factor.upper.to(weight.dtype)
    left, unit = (reordered(part, order) if part.stride(-2) else part for part in _in_positions(weight, grid))
    # The later columns compensate for a column's error times this.
    share = 1 / (upper.diagonal(dim1=-2, dim2=-1)[..., None] * unit)
    kept = None if mask is None else reordered(mask.mT.contiguous(), order)
    codes = torch.empty_like(left, dtype=torch.uint8)
    round_block = _rounder(codes, order, grid, kept, weight)
    for start in range(0, left.shape[-2], block):
        here = slice(start, start + block)
        ahead = upper[..., here, start:] if grid.by_row else upper[..., here, start:] * unit[..., None, start:, 0]
        errors = round_block(left[..., here, :], here, share[..., here, 0], ahead)
        rest, factors = left[..., start + block :, :], ahead[..., block:].mT
        (rest.addmm_ if rest.dim() == 2 else rest.baddbmm_)(factors, errors, alpha=-1)
    return codes.mT.contiguous()


def _rounder(codes: Tensor, order: Tensor, grid: Grid, kept: Tensor | None, like: Tensor) -> Callable[..., Tensor]:
    """Return what rounds a block of columns (`BlockRounder.round`): a kernel, or torch."""
    shape = (*grid.widths.shape[:-1], codes.shape[-1])
    widths = np.broadcast_to(grid.widths, shape) if grid.by_row else grid.widths
    by_kernel = rounds_on(like.device, like.dtype)
    if not by_kernel and codes.dim() == 2:
        in_order = widths if grid.by_row else widths[order.cpu().numpy()]
        return TorchRounder(codes, order, in_order, grid.by_row, kept, like).round
    there = torch.from_numpy(widths.astype(np.int32)).to(like.device)
    there = there if grid.by_row else reordered(there[..., None], order)[..., 0]
    uneven = bool(np.isin(widths, list(NORMAL_LEVELS)).any())
    return (BlockRounder if by_kernel else StackRounder)(codes, order, there, grid.by_row, uneven, kept).round


def _in_positions(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the weight as positions (`Levels.density`), and the positions per unit of weight, both columns first.

    The unit of a row cancels in all equations, so only columns have one.
    """
    books = [level_codebook(width) for width in grid.widths.ravel().tolist()]
    density, zero = (
        torch.tensor(numbers, dtype=weight.dtype, device=weight.device).view(grid.scale.shape)
        for numbers in ([book.density for book in books], [book.zero for book in books])
    )
    density = density / grid.scale
    left = (weight * density).add_(zero).mT.contiguous()
    unit = left.new_ones(1, 1) if grid.by_row else density.mT
    return left, unit.expand(*left.shape[:-1], 1)


def quantise(
    weight: Tensor, mask: Tensor | None, hessian: Tensor | None, grid: Grid, factor: Factor | None = None
) -> Quantised:
    """Quantise each row of a matrix by sparse GPTQ or by rounding, whichever has the smaller output error e H e^T.

    Args:
        hessian: None for plain rounding, without calibration text.
        factor: `inverse_factor` of the Hessian, if it is known.

    Raises:
        ValueError: as for `inverse_factor`.
    """

    def values(codes: Tensor) -> Tensor:
        return grid.values(codes) if mask is None else grid.values(codes).mul_(mask)

    codes = grid.codes(weight) if mask is None else grid.codes(weight).mul_(mask)
    if hessian is None:
        return Quantised(codes, values(codes))
    factor = factor or inverse_factor(hessian)
    gptq_codes = sparse_gptq(weight, mask, factor, grid)
    rounded, gptq, exact = values(codes), values(gptq_codes), weight if mask is None else weight * mask
    # e H e^T - f H f^T as one product: (e - f) H (e + f)^T, with e the error of rounding and f that of GPTQ.
    gain = ((rounded - gptq) @ hessian).mul_(rounded.add_(gptq).sub_(exact, alpha=2)).sum(-1, keepdim=True)
    codes = torch.where(gain > 0, gptq_codes, codes)
    return Quantised(codes, values(codes), factor.notes)
