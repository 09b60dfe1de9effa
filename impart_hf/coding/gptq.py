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

import torch
from torch import Tensor

from ..modeling.delta_decode import normal_levels
from ..modeling.delta_record import NORMAL_LEVELS
from .records import midpoints

DAMPING = 0.01  # added to a Hessian's diagonal, in units of its mean, as in GPTQ
_BLOCK, _INNER = 128, 16  # columns that wait for a matrix product, and that are updated one by one, in a core's cache
_DAMPINGS = (1, 10, 100)  # times the damping asked for, until the Hessian can be factored
# Scales tried up to the largest entry, and then around the best; long tails want as little as 0.3 times the scale that
# is best for normally distributed values (here for 1 to 8 bits, in units of their root mean square)
_COARSE, _FINE, _LEAST, _NORMAL = 9, 6, 0.3, (0.798, 1.494, 2.051, 2.514, 2.9, 3.25, 3.6, 3.9)
_NORMAL_WIDTHS = {2 * len(levels): width for width, levels in NORMAL_LEVELS.items()}
_TINY = 1e-12  # scale of a row that has nothing but zeros; an input's power, relative to the largest, that counts as 0


@dataclass(frozen=True)
class Grid:
    """The levels of each row, or of each column: evenly spaced ones, or those for normally distributed numbers.

    Code c of evenly spaced levels stands for (2 c / top - 1) scale.

    Attributes:
        scale: positive, (rows, 1) or (1, columns).
        top: 2^width - 1, the largest code, at most 255; shape and dtype of the scale.
        normal: bool, of that shape too: where levels are `NORMAL_LEVELS`, times the scale. None: nowhere.
    """

    scale: Tensor
    top: Tensor
    normal: Tensor | None = None

    def codes(self, values: Tensor) -> Tensor:
        """Codes, uint8, of the levels nearest to values (rows, columns); beyond the outermost, of that one."""
        position = (values / self.scale).add_(1).mul_(self.top / 2)
        codes = position.round_().clamp_(torch.zeros_like(self.top), self.top).to(torch.uint8)
        for part, table in self._tables():
            codes[part] = table.codes(values[part] / self.scale.expand(values.shape)[part])
        return codes

    def values(self, codes: Tensor) -> Tensor:
        """What codes (rows, columns) stand for, in the scale's dtype."""
        values = (codes * (2 / self.top)).sub_(1).mul_(self.scale)
        for part, table in self._tables():
            values[part] = table.levels[codes[part].int()] * self.scale.expand(values.shape)[part]
        return values

    def kinds(self) -> list[tuple[Tensor, "Table | None"]]:
        """The rows, or columns, that have the same levels, int64, and what these are; None if evenly spaced."""
        top = self.top.flatten()
        normal = torch.zeros_like(top, dtype=torch.bool) if self.normal is None else self.normal.flatten()
        found: list[tuple[Tensor, Table | None]] = [(part, None) for part in [(~normal).nonzero()[:, 0]] if len(part)]
        for most in top[normal].unique().tolist():
            found.append(((normal & (top == most)).nonzero()[:, 0], Table.of(int(most) + 1, self.scale)))
        return found

    def _tables(self) -> "list[tuple[Any, Table]]":
        if self.normal is None:
            return []
        by_row = self.scale.shape[1] == 1
        return [(part if by_row else (slice(None), part), table) for part, table in self.kinds() if table is not None]


@dataclass(frozen=True)
class Table:
    """Levels that are not evenly spaced, rising, and the values between them from which on the next one is nearer."""

    levels: Tensor
    edges: Tensor

    @classmethod
    def of(cls, count: int, like: Tensor) -> "Table":
        """The levels for normally distributed numbers, so many of them, in the dtype and on the device of a tensor."""
        levels = normal_levels(_NORMAL_WIDTHS[count], like.device).to(like.dtype)
        return cls(levels, midpoints(levels))

    def codes(self, values: Tensor) -> Tensor:
        return torch.bucketize(values.contiguous(), self.edges).to(torch.uint8)


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
    kinds = grid.kinds()
    if grid.scale.shape[1] == 1 and len(kinds) > 1:  # rows do not influence each other
        codes = torch.empty_like(weight, dtype=torch.uint8)
        for rows, _ in kinds:
            normal = None if grid.normal is None else grid.normal[rows]
            own = Grid(grid.scale[rows], grid.top[rows], normal)
            codes[rows] = sparse_gptq(weight[rows], None if mask is None else mask[rows], factor, own, block)
        return codes
    tables: list[Table | None] = [None] * weight.shape[1]
    for columns, table in kinds:
        for column in columns.tolist() if grid.scale.shape[1] > 1 else range(weight.shape[1]):
            tables[column] = table
    order, upper = factor.order, factor.upper.to(weight.dtype)
    left, unit, most = (part[order] if part.stride(0) else part for part in _in_codes(weight, grid))
    share = 1 / (upper.diagonal()[:, None] * unit)  # a column's error times this is what the others make up for
    kept = None if mask is None else mask.t().contiguous()[order]
    codes = torch.empty_like(left, dtype=torch.uint8)
    for start in range(0, len(left), block):
        here = slice(start, start + block)
        ahead = upper[here, start:] if grid.scale.shape[1] == 1 else upper[here, start:] * unit[start:, 0]
        passed_on = share[here] if kept is None else kept[here] * share[here]
        own_tables = [tables[column] for column in order[here].tolist()]
        found, errors = _one_block(left[here], passed_on, ahead, most[here], own_tables)
        codes[order[here]] = found.to(torch.uint8) if kept is None else found.to(torch.uint8).mul_(kept[here])
        left[start + block :].addmm_(ahead[:, block:].t(), errors, alpha=-1)
    return codes.t().contiguous()


def _in_codes(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """The weight in the unit of its levels, that unit, and the largest codes, transposed: columns first.

    Evenly spaced levels are the integers from 0. A row's own unit drops out of all equations; only columns have one.
    """
    density, zero = grid.top / (2 * grid.scale), grid.top / 2
    if grid.normal is not None:
        density, zero = torch.where(grid.normal, 1 / grid.scale, density), torch.where(grid.normal, 0.0, zero)
    left = (weight * density).add_(zero).t().contiguous()
    unit = left.new_ones(1, 1) if density.shape[1] == 1 else density.t()
    return left, unit.expand(len(left), 1), grid.top.t().expand(len(left), -1)


def _one_block(
    left: Tensor, share: Tensor, ahead: Tensor, most: Tensor, tables: list[Table | None]
) -> tuple[Tensor, Tensor]:
    """Round a block of columns, of shape (block, rows): codes, and errors, which are (value - level) times share.

    `left` is used up: row j of `ahead` times the error of column j is taken from later columns.
    """
    size = len(left)
    codes, errors, zero = torch.empty_like(left), torch.empty_like(left), torch.zeros_like(most[0])
    columns = list(zip(*(part.unbind() for part in (left, codes, errors, share, most)), strict=True))
    for start in range(0, size, _INNER):
        stop = min(size, start + _INNER)
        for j in range(start, stop):
            column, code, error, part, top = columns[j]
            if (table := tables[j]) is None:
                torch.clamp(column, zero, top, out=code).round_()
                torch.sub(column, code, out=error).mul_(part)
            else:
                found = torch.bucketize(column, table.edges, out_int32=True)
                code.copy_(found)
                torch.sub(column, table.levels[found], out=error).mul_(part)
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
    sample, top = sample / largest[:, None], 2.0**width - 1

    def levels(scale: Tensor) -> Tensor:
        position = (sample * (top / 2 / scale[:, None])).add_(top / 2).round_().clamp_(0, top)
        return position.mul_(2 / top).sub_(1).mul_(present)

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
