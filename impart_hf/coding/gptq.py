"""Quantising a matrix with dropped entries so that the layer's output changes least: ImPart's sparse GPTQ.

GPTQ (arXiv 2210.17323) rounds a matrix column by column, and the columns still to come make up for each one's error as
far as the layer's inputs are correlated. ImPart's algorithm 2 (arXiv 2504.13237) does so under a mask: dropped entries
pass on no error. But it still counts on them to make up for the others', so where few are kept it gains little on
rounding. Coordinate descent (QuantEase, arXiv 2309.01885) afterwards counts on what is there alone.

A weight of shape (rows, columns) acts as `y = weight @ x`; its Hessian, (columns, columns), is the mean of `x x^T` over
calibration inputs. All are of one dtype, float32 or float64, in which everything is computed. Masks are bool, true
where an entry is kept; None keeps all. Rows do not influence each other. scripts/benchmark_gptq.py measures.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..modeling.codebook import EvenLevels, Levels, level_codebook
from .records import runs

DAMPING = 0.01  # added to a Hessian's diagonal, in units of its mean, as in GPTQ
_BLOCK, _INNER = 128, 16  # columns that wait for a matrix product, and that are updated one by one, in a core's cache
_DAMPINGS = (1, 10, 100)  # times the damping asked for, until the Hessian can be factored
# Scales tried up to the largest entry, and then around the best; long tails want as little as 0.3 times the scale that
# is best for normally distributed values (here for 1 to 8 bits, in units of their root mean square)
_COARSE, _FINE, _LEAST, _NORMAL = 9, 6, 0.3, (0.798, 1.494, 2.051, 2.514, 2.9, 3.25, 3.6, 3.9)
_TINY = 1e-12  # scale of a row that has nothing but zeros; an input's power, relative to the largest, that counts as 0


@dataclass(frozen=True)
class Grid:
    """The levels of each row, or of each column: those of its codebook, times its scale.

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
        """Codes, uint8, of the levels nearest to values (rows, columns); beyond the outermost, of that one."""
        units, codes = values / self.scale, torch.empty_like(values, dtype=torch.uint8)
        for book, part in self.parts():
            codes[part] = book.nearest(units[part])
        return codes

    def values(self, codes: Tensor) -> Tensor:
        """What codes (rows, columns) stand for, in the scale's dtype."""
        values = torch.empty_like(codes, dtype=self.scale.dtype)
        for book, part in self.parts():
            values[part] = book.values(codes[part], values.dtype)
        return values.mul_(self.scale)

    def parts(self) -> list[tuple[Levels, Any]]:
        """The codebooks, each with an index of the rows or columns, in runs, that have it."""
        found = [(level_codebook(width), part) for width, part in runs(self.widths)]
        if len(found) == 1:
            return [(found[0][0], ...)]
        return found if self.by_row else [(book, (slice(None), part)) for book, part in found]


@dataclass(frozen=True)
class Factor:
    """An upper triangular U: U^T U is the inverse of the damped Hessian with its columns in `order`, int64. Notes."""

    upper: Tensor
    order: Tensor
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quantised:
    """Codes, uint8, and their values, both (rows, columns) and 0 where dropped. Notes on what was unusual."""

    codes: Tensor
    values: Tensor
    notes: tuple[str, ...] = ()


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Factor:
    """Order the columns and factor the inverse of the damped Hessian H, of which no inverse is formed.

    With H = R R^T for an upper triangular R, H^-1 = R^-T R^-1, so U is R^-1; and R is the Cholesky factor of H with
    rows and columns reversed, reversed again.

    Args:
        hessian: (columns, columns), symmetric, positive semidefinite.
        damping: what is added to the diagonal, in units of its mean. Raised up to a hundredfold if that is too little.

    Raises:
        ValueError: if the Hessian has entries that are not finite, or is far from positive semidefinite.
    """
    if not bool(torch.isfinite(torch.linalg.vector_norm(hessian, torch.inf))):
        raise ValueError("the Hessian has entries that are not finite: check the calibration inputs")
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    damped = hessian[order.flip(0)[:, None], order.flip(0)]
    diagonal = damped.diagonal().clone()
    unit = float(diagonal.double().mean()) or 1.0  # of inputs that are always zero, no column makes up for another
    for times in _DAMPINGS:
        damped.diagonal().copy_(diagonal + times * damping * unit)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            notes = () if times == 1 else (f"singular Hessian: damping raised to {times * damping:g}",)
            return Factor(_inverse_of_lower(lower).flip(0, 1), order, notes)
    raise ValueError(f"the Hessian is not positive semidefinite, not even damped by {times * damping:g}")


def _inverse_of_lower(lower: Tensor, step: int = 512) -> Tensor:
    """The inverse of a lower triangular matrix; its zeros save two thirds of the work."""
    inverse = torch.zeros_like(lower)
    for start in range(0, len(lower), step):
        rest = lower[start:, start:]
        one = torch.eye(len(rest), min(step, len(rest)), dtype=lower.dtype, device=lower.device)
        inverse[start:, start : start + step] = torch.linalg.solve_triangular(rest, one, upper=False)
    return inverse


def sparse_gptq(weight: Tensor, mask: Tensor | None, factor: Factor, grid: Grid, block: int = _BLOCK) -> Tensor:
    """ImPart's algorithm 2, with `inverse_factor` of the Hessian: codes, uint8, (rows, columns), 0 where dropped."""
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
    share = 1 / (upper.diagonal()[:, None] * unit)  # a column's error times this is what the others make up for
    kept = None if mask is None else mask.t().contiguous()[order]
    codes = torch.empty_like(left, dtype=torch.uint8)
    for start in range(0, len(left), block):
        here = slice(start, start + block)
        ahead = upper[here, start:] if grid.by_row else upper[here, start:] * unit[start:, 0]
        passed_on = share[here] if kept is None else kept[here] * share[here]
        found, errors = _one_block(left[here], passed_on, ahead, books[here])
        codes[order[here]] = found.to(torch.uint8) if kept is None else found.to(torch.uint8).mul_(kept[here])
        left[start + block :].addmm_(ahead[:, block:].t(), errors, alpha=-1)
    return codes.t().contiguous()


def _in_positions(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The weight as positions (`Levels.density`), and the positions in a unit of weight, transposed: columns first.

    A row's own unit drops out of all equations; only columns have one.
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
    """How the positions of one column are rounded.

    Attributes:
        top: the largest code.
        levels, edges: None where levels are the whole numbers.
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
    """Round a block of columns, of shape (block, rows): codes, and errors, which are (value - level) times share.

    `left` is used up: row j of `ahead` times the error of column j is taken from later columns.
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
                found = torch.bucketize(column, book.edges, out_int32=True)
                code.copy_(found)
                torch.sub(column, book.levels[found], out=error).mul_(part)
            left[j + 1 : stop].addr_(ahead[j, j + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(ahead[start:stop, stop:size].t(), errors[start:stop], alpha=-1)
    return codes, errors


def quantise(weight: Tensor, mask: Tensor | None, hessian: Tensor | None, grid: Grid) -> Quantised:
    """Quantise a matrix so that no row's output on the calibration inputs changes more than by rounding.

    Each row by sparse GPTQ or by rounding, whichever has the smaller output error e H e^T.

    Args:
        hessian: None where there is no calibration: plain rounding.

    Raises:
        ValueError: as `inverse_factor`.
    """

    def values(codes: Tensor) -> Tensor:
        return grid.values(codes) if mask is None else grid.values(codes).mul_(mask)

    codes = grid.codes(weight) if mask is None else grid.codes(weight).mul_(mask)
    if hessian is None:
        return Quantised(codes, values(codes))
    factor = inverse_factor(hessian)
    other = sparse_gptq(weight, mask, factor, grid)
    one, two, exact = values(codes), values(other), weight if mask is None else weight * mask
    # e H e^T - f H f^T in a single product: (e - f) H (e + f)^T
    gain = ((one - two) @ hessian).mul_(one.add_(two).sub_(exact, alpha=2)).sum(1, keepdim=True)
    codes = torch.where(gain > 0, other, codes)
    return Quantised(codes, values(codes), factor.notes)


def best_scale(values: Tensor, mask: Tensor | None, width: int) -> Tensor:
    """For each row of values (rows, columns) the scale, (rows,), of `Grid` with about the least squared rounding error.

    Positive, also where nothing is kept; the same on every call. Codes have 1 to 8 bits: `width`.
    """
    largest = (values if mask is None else values * mask).abs().amax(1).clamp_min(_TINY)
    # The few largest decide where there are many levels: then more has to be looked at
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
    # For the levels that this chooses, the best scale is a least squares solution: it can only improve
    used = levels(chosen)
    return ((used * sample).sum(1) / used.square_().sum(1).clamp_min(_TINY) * largest).clamp_min(_TINY)


def _sample(values: Tensor, mask: Tensor | None, most: int) -> tuple[Tensor, Tensor]:
    """At most so many entries of each row, evenly among those that the mask keeps, padded with 0; and how many."""
    if mask is None:
        sample = values[:, :: -(-values.shape[1] // most)]
        return sample, torch.full_like(sample[:, 0], sample.shape[1], dtype=torch.int64)
    counts = mask.sum(1)
    # Every second, fourth, eighth ...: dividing integers would take longer than all the rest
    shift = (counts / most).clamp_min(1).log2().ceil().int()
    rank = mask.cumsum(1, dtype=torch.int32) - 1
    row, column = (mask & (rank & (1 << shift[:, None]) - 1 == 0)).nonzero(as_tuple=True)
    counts = (counts + (1 << shift) - 1) >> shift
    sample = values.new_zeros(len(values), max(1, int(counts.max())))
    sample[row, rank[row, column] >> shift[row]] = values[row, column]
    return sample, counts
