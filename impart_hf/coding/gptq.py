"""Quantising a matrix with dropped entries so that the layer's output changes least: ImPart's sparse GPTQ.

GPTQ (arXiv 2210.17323) rounds a matrix column by column. The columns that are not yet rounded compensate for the error
of each, as far as the layer's inputs are correlated. ImPart's algorithm 2 (arXiv 2504.13237) does so with a mask: the
error of a dropped entry is not compensated. Yet it relies on dropped entries to compensate for others, so if few are
kept it gains little over rounding. Coordinate descent (QuantEase, arXiv 2309.01885) would rely on kept entries alone.

A weight of shape (rows, columns) acts as `y = weight @ x`; its Hessian, (columns, columns), is the mean of `x x^T` over
calibration inputs. All have one dtype, float32 or float64, which is also that of the computation. Masks are bool, true
where an entry is kept; None keeps all. Rows do not influence each other. scripts/benchmark_gptq.py measures time and
error.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..modeling.codebook import EvenLevels, Levels, level_codebook
from .records import runs

DAMPING = 0.01  # added to a Hessian's diagonal, in units of its mean, as in GPTQ
_BLOCK, _INNER = 128, 16  # columns per update by one matrix product, and per update one by one in a core's cache
_DAMPINGS = (1, 10, 100)  # multiples of the damping, tried until the Hessian can be factored
# Numbers of scales that are tried: first up to the largest entry, then around the best. For long tails the best is as
# little as _LEAST times the best scale for normally distributed values, which is _NORMAL times their root mean square
# for 1 to 8 bits.
_COARSE, _FINE, _LEAST, _NORMAL = 9, 6, 0.3, (0.798, 1.494, 2.051, 2.514, 2.9, 3.25, 3.6, 3.9)
_TINY = 1e-12  # scale of a row of zeros


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
        return self.scale.shape[1] == 1

    def codes(self, values: Tensor) -> Tensor:
        """Return the codes, uint8, of the levels nearest to values (rows, columns)."""
        units, codes = values / self.scale, torch.empty_like(values, dtype=torch.uint8)
        for book, part in self.parts():
            codes[part] = book.nearest(units[part])
        return codes

    def values(self, codes: Tensor) -> Tensor:
        """Return the levels of codes (rows, columns), in the scale's dtype."""
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


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Factor:
    """Order the columns and factor the inverse of the damped Hessian H without forming the inverse.

    With H = R R^T for an upper triangular R, H^-1 = R^-T R^-1, so U is R^-1. R is the reversed Cholesky factor of H
    with rows and columns reversed.

    Args:
        hessian: (columns, columns), symmetric, positive semidefinite.
        damping: added to the diagonal, in units of its mean; raised up to a hundredfold if that is too little.

    Raises:
        ValueError: if the Hessian has entries that are not finite, or is far from positive semidefinite.
    """
    if not bool(torch.isfinite(torch.linalg.vector_norm(hessian, torch.inf))):
        raise ValueError("the Hessian has entries that are not finite: check the calibration inputs")
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    damped = hessian[order.flip(0)[:, None], order.flip(0)]
    diagonal = damped.diagonal().clone()
    unit = float(diagonal.double().mean()) or 1.0  # if all inputs are zero, any damping will do
    for times in _DAMPINGS:
        damped.diagonal().copy_(diagonal + times * damping * unit)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            notes = () if times == 1 else (f"singular Hessian: damping raised to {times * damping:g}",)
            return Factor(_inverse_of_lower(lower).flip(0, 1), order, notes)
    raise ValueError(f"the Hessian is not positive semidefinite, even with damping {times * damping:g}")


def _inverse_of_lower(lower: Tensor, step: int = 512) -> Tensor:
    """Return the inverse of a lower triangular matrix; skipping its zeros saves two thirds of the work."""
    inverse = torch.zeros_like(lower)
    for start in range(0, len(lower), step):
        rest = lower[start:, start:]
        identity = torch.eye(len(rest), min(step, len(rest)), dtype=lower.dtype, device=lower.device)
        inverse[start:, start : start + step] = torch.linalg.solve_triangular(rest, identity, upper=False)
    return inverse


def sparse_gptq(weight: Tensor, mask: Tensor | None, factor: Factor, grid: Grid, block: int = _BLOCK) -> Tensor:
    """Quantise by ImPart's algorithm 2: return codes, uint8, (rows, columns), 0 where dropped.

    Args:
        factor: `inverse_factor` of the Hessian.
    """
    if grid.by_row and len(set(grid.widths.tolist())) > 1:  # rows do not influence each other
        codes = torch.empty_like(weight, dtype=torch.uint8)
        for width in np.unique(grid.widths):
            rows = torch.from_numpy(np.flatnonzero(grid.widths == width)).to(weight.device)
            own = Grid(grid.scale[rows], grid.widths[grid.widths == width])
            codes[rows] = sparse_gptq(weight[rows], None if mask is None else mask[rows], factor, own, block)
        return codes
    widths = np.broadcast_to(grid.widths[:1], weight.shape[1]) if grid.by_row else grid.widths
    order, upper = factor.order, factor.upper.to(weight.dtype)
    books = [_ColumnLevels.of(level_codebook(width), weight) for width in widths[order.cpu().numpy()].tolist()]
    left, unit = (part[order] if part.stride(0) else part for part in _in_positions(weight, grid))
    share = 1 / (upper.diagonal()[:, None] * unit)  # the later columns compensate for a column's error times this
    kept = None if mask is None else mask.t().contiguous()[order]
    codes = torch.empty_like(left, dtype=torch.uint8)
    for start in range(0, len(left), block):
        here = slice(start, start + block)
        ahead = upper[here, start:] if grid.by_row else upper[here, start:] * unit[start:, 0]
        kept_share = share[here] if kept is None else kept[here] * share[here]
        rounded, errors = _one_block(left[here], kept_share, ahead, books[here])
        codes[order[here]] = rounded.to(torch.uint8) if kept is None else rounded.to(torch.uint8).mul_(kept[here])
        left[start + block :].addmm_(ahead[:, block:].t(), errors, alpha=-1)
    return codes.t().contiguous()


def _in_positions(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the weight as positions (`Levels.density`), and the positions per unit of weight, both columns first.

    The unit of a row cancels in all equations, so only columns have one.
    """
    books = [level_codebook(width) for width in grid.widths.tolist()]
    density, zero = (
        torch.tensor(numbers, dtype=weight.dtype, device=weight.device).view(grid.scale.shape)
        for numbers in ([book.density for book in books], [book.zero for book in books])
    )
    density = density / grid.scale
    left = (weight * density).add_(zero).t().contiguous()
    unit = left.new_ones(1, 1) if grid.by_row else density.t()
    return left, unit.expand(len(left), 1)


@dataclass(frozen=True)
class _ColumnLevels:
    """The levels to which the positions of one column are rounded.

    Attributes:
        top: the largest code.
        levels, edges: the levels and their midpoints; None if the levels are the whole numbers.
    """

    top: int
    levels: Tensor | None
    edges: Tensor | None

    @classmethod
    def of(cls, book: Levels, like: Tensor) -> "_ColumnLevels":
        if isinstance(book, EvenLevels):
            return cls(book.top, None, None)
        return cls(book.top, book.levels(like.device, like.dtype), book.edges(like.device, like.dtype))


def _one_block(left: Tensor, share: Tensor, ahead: Tensor, books: list[_ColumnLevels]) -> tuple[Tensor, Tensor]:
    """Round a block of columns (block, rows): return codes, and errors, which are (value - level) times `share`.

    `left` is overwritten: row j of `ahead` times the error of column j is subtracted from the later columns.
    """
    size = len(left)
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    columns = list(zip(*(part.unbind() for part in (left, codes, errors, share)), books, strict=True))
    for start in range(0, size, _INNER):
        stop = min(size, start + _INNER)
        for j in range(start, stop):
            column, code, error, part, book = columns[j]
            if book.levels is None or book.edges is None:
                torch.clamp(column, 0, book.top, out=code).round_()
                torch.sub(column, code, out=error).mul_(part)
            else:
                nearest = torch.bucketize(column, book.edges, out_int32=True)
                code.copy_(nearest)
                torch.sub(column, book.levels[nearest], out=error).mul_(part)
            left[j + 1 : stop].addr_(ahead[j, j + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(ahead[start:stop, stop:size].t(), errors[start:stop], alpha=-1)
    return codes, errors


def quantise(weight: Tensor, mask: Tensor | None, hessian: Tensor | None, grid: Grid) -> Quantised:
    """Quantise each row of a matrix by sparse GPTQ or by rounding, whichever has the smaller output error e H e^T.

    Args:
        hessian: None for plain rounding, without calibration text.

    Raises:
        ValueError: as for `inverse_factor`.
    """

    def values(codes: Tensor) -> Tensor:
        return grid.values(codes) if mask is None else grid.values(codes).mul_(mask)

    codes = grid.codes(weight) if mask is None else grid.codes(weight).mul_(mask)
    if hessian is None:
        return Quantised(codes, values(codes))
    factor = inverse_factor(hessian)
    gptq_codes = sparse_gptq(weight, mask, factor, grid)
    rounded, gptq, exact = values(codes), values(gptq_codes), weight if mask is None else weight * mask
    # e H e^T - f H f^T as one product: (e - f) H (e + f)^T, with e the error of rounding and f that of GPTQ.
    gain = ((rounded - gptq) @ hessian).mul_(rounded.add_(gptq).sub_(exact, alpha=2)).sum(1, keepdim=True)
    codes = torch.where(gain > 0, gptq_codes, codes)
    return Quantised(codes, values(codes), factor.notes)


def best_scale(values: Tensor, mask: Tensor | None, width: int) -> Tensor:
    """Return each row's scale for `Grid`, (rows,), with about the least squared rounding error of its values.

    The result is deterministic, and positive even for rows of which nothing is kept.

    Args:
        values: (rows, columns).
        width: 1 to 8, a width code of evenly spaced levels.
    """
    largest = (values if mask is None else values * mask).abs().amax(1).clamp_min(_TINY)
    # With many levels the few largest values decide, so a larger sample is needed.
    sample, counts = _sample(values, mask, 2048 if width <= 3 else 65536)
    present = torch.arange(sample.shape[1], device=values.device) < counts[:, None]
    sample, book = sample / largest[:, None], level_codebook(width)

    def levels(scale: Tensor) -> Tensor:
        return book.round(sample / scale[:, None]).mul_(present)

    def best(scales: Tensor) -> Tensor:
        errors = [torch.addcmul(sample, levels(s), s[:, None], value=-1).square_().sum(1) for s in scales]
        return scales.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]

    rms = (sample.square().sum(1) / counts.clamp_min(1)).sqrt()
    lowest = (rms * (_LEAST * _NORMAL[width - 1])).clamp(_TINY, 1.0)
    step = lowest ** (-1 / (_COARSE - 1))
    middle = best(torch.stack([lowest * step**k for k in range(_COARSE)]))
    chosen = best(torch.stack([middle * step ** (2 * k / _FINE - 1) for k in range(_FINE + 1)]))
    # With the levels fixed, the least squares scale can only improve on the chosen one.
    used = levels(chosen)
    return ((used * sample).sum(1) / used.square_().sum(1).clamp_min(_TINY) * largest).clamp_min(_TINY)


def _sample(values: Tensor, mask: Tensor | None, most: int) -> tuple[Tensor, Tensor]:
    """Return at most `most` kept entries of each row, evenly spaced and padded with 0, and their number per row."""
    if mask is None:
        sample = values[:, :: -(-values.shape[1] // most)]
        return sample, torch.full_like(sample[:, 0], sample.shape[1], dtype=torch.int64)
    counts = mask.sum(1)
    # The spacing is a power of two, because integer division would take longer than everything else here.
    shift = (counts / most).clamp_min(1).log2().ceil().int()
    rank = mask.cumsum(1, dtype=torch.int32) - 1
    row, column = (mask & (rank & (1 << shift[:, None]) - 1 == 0)).nonzero(as_tuple=True)
    counts = (counts + (1 << shift) - 1) >> shift
    sample = values.new_zeros(len(values), max(1, int(counts.max())))
    sample[row, rank[row, column] >> shift[row]] = values[row, column]
    return sample, counts
