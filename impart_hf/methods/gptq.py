"""Quantising a matrix with dropped entries so that the layer's output changes least: ImPart's sparse GPTQ, and more.

GPTQ (arXiv 2210.17323) rounds a matrix column by column, and the columns still to come make up for each one's error as
far as the layer's inputs are correlated. ImPart's algorithm 2 (arXiv 2504.13237) does so under a mask: dropped entries
pass on no error. But it still counts on them to take part in making up for the others', and where few entries are kept
it gains little on rounding. Coordinate descent afterwards counts on what is there alone.

A weight of shape (rows, columns) acts as `y = weight @ x`; its Hessian, (columns, columns), is the mean of `x x^T` over
calibration inputs. Rows do not influence each other. scripts/benchmark_gptq.py measures speed and errors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK, _INNER = 128, 16  # columns that wait for a matrix product, and that are updated one by one, in a core's cache
_DAMPINGS = (1, 10, 100)  # times the damping asked for, until the Hessian can be factored
_COARSE, _FINE = 9, 6  # scales tried over the whole range, and then around the best
# The scale, in units of the root mean square, that is best for normally distributed values, for 1 to 8 bits
_NORMAL_CLIP = (0.798, 1.494, 2.051, 2.514, 2.9, 3.25, 3.6, 3.9)
_LOWEST = 0.3  # of that: values with long tails want less
_TINY = 1e-12  # scale of a row that has nothing but zeros


@dataclass(frozen=True)
class Grid:
    """Evenly spaced levels: code c stands for (2 c / top - 1) scale.

    Attributes:
        scale: positive, (rows, 1) or (1, columns), of the weight's dtype.
        top: 2^width - 1, the largest code, at most 255; same shape and dtype.
    """

    scale: Tensor
    top: Tensor

    def codes(self, values: Tensor) -> Tensor:
        """Codes, uint8, of the levels nearest to values (rows, columns); beyond the outermost, of that one."""
        position = (values / self.scale).add_(1).mul_(self.top / 2)
        return position.round_().clamp_(torch.zeros_like(self.top), self.top).to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """What codes (rows, columns) stand for, in the scale's dtype."""
        return (codes * (2 / self.top)).sub_(1).mul_(self.scale)


@dataclass(frozen=True)
class Factor:
    """What sparse GPTQ needs of a Hessian.

    Attributes:
        upper: U, (columns, columns), upper triangular: U^T U is the inverse of the damped Hessian, reordered.
        order: int64, (columns,), the columns in the order in which they are quantised: by falling diagonal.
        notes: what was out of the ordinary, a line each.
    """

    upper: Tensor
    order: Tensor
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quantised:
    """Codes, uint8, and their values, both (rows, columns) and 0 where dropped; what was out of the ordinary."""

    codes: Tensor
    values: Tensor
    notes: tuple[str, ...] = ()


def inverse_factor(hessian: Tensor, damping: float = 0.01) -> Factor:
    """Order the columns and factor the inverse of the damped Hessian H.

    With H = R R^T for an upper triangular R, H^-1 = R^-T R^-1, so U is R^-1; and R is the Cholesky factor of H with
    rows and columns reversed, reversed again. No inverse is formed and factored.

    Args:
        hessian: float32 or float64, (columns, columns), symmetric, positive semidefinite.
        damping: what is added to the diagonal, in units of its mean. Raised up to a hundredfold if that is too little.

    Raises:
        ValueError: if the Hessian has entries that are not finite, or is far from positive semidefinite.
    """
    if not bool(torch.isfinite(torch.linalg.vector_norm(hessian, torch.inf))):
        raise ValueError("the Hessian has entries that are not finite: check the calibration inputs")
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    backwards = order.flip(0)
    damped = hessian[backwards[:, None], backwards]
    unit = float(diagonal.double().mean()) or 1.0  # of inputs that are always zero, no column makes up for another
    added = 0.0
    for times in _DAMPINGS:
        damped.diagonal().add_(times * damping * unit - added)
        added = times * damping * unit
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
    """ImPart's algorithm 2.

    Args:
        weight: float32 or float64, (rows, columns), in whose dtype it is computed.
        mask: bool, (rows, columns), true where an entry is kept; None keeps all, which is GPTQ.
        factor: `inverse_factor` of the Hessian of the layer's input.
        block: columns after which the errors are passed on to all that follow.

    Returns:
        Codes, uint8, (rows, columns); 0 where dropped.
    """
    order, upper = factor.order, factor.upper.to(weight.dtype)
    left, unit, most = _in_codes(weight, grid)
    left, unit, most = left[order], unit[order], most[order]
    share = 1 / (upper.diagonal()[:, None] * unit)  # a column's error times this is what the others make up for
    kept = None if mask is None else mask.t().contiguous()[order]
    codes = torch.empty_like(left, dtype=torch.uint8)
    for start in range(0, len(left), block):
        here = slice(start, start + block)
        column = left[here]
        ahead = upper[here, start:] if grid.scale.shape[1] == 1 else upper[here, start:] * unit[start:, 0]
        passed_on = share[here] if kept is None else kept[here] * share[here]
        found, errors = _one_block(column, column, passed_on, ahead, most[here])
        codes[order[here]] = found.to(torch.uint8) if kept is None else found.to(torch.uint8).mul_(kept[here])
        left[start + block :].addmm_(ahead[:, block:].t(), errors, alpha=-1)
    return codes.t().contiguous()


def descend(
    weight: Tensor, mask: Tensor | None, hessian: Tensor, grid: Grid, codes: Tensor, block: int = _BLOCK
) -> Tensor:
    """Once through all columns: replace each code by the best one, all others being what they are (QuantEase,
    arXiv 2309.01885). No row's output error grows, whatever is dropped. Arguments and result as `sparse_gptq`."""
    left, unit, most = _in_codes(weight, grid)
    current = codes.t().to(left.dtype)
    errors = (left - current) / unit
    kept = None if mask is None else mask.t().contiguous()
    if kept is not None:
        errors *= kept
    diagonal = hessian.diagonal()
    # How many codes to move for a gradient of 1; inputs that are always zero have no gradient
    pace = torch.where(diagonal > 0, 1 / diagonal, 0)[:, None] * unit
    for start in range(0, len(left), block):
        here = slice(start, start + block)
        base = current[here]
        target = torch.addcmul(base, hessian[here] @ errors, pace[here])
        moved = -1 / unit[here] if kept is None else kept[here] * (-1 / unit[here])
        found, changes = _one_block(target, base, moved, hessian[here, here] * pace[here, 0], most[here])
        errors[here] -= changes
        base.copy_(found)
    if kept is not None:
        current *= kept
    return current.t().to(torch.uint8, memory_format=torch.contiguous_format)


def _in_codes(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """The weight, its unit, and the largest codes, transposed to (columns, rows or 1): a column lies together.

    In units of codes every level is an integer. A row's own unit drops out of all equations: only columns have one.
    """
    density = grid.top / (2 * grid.scale)
    left = (weight * density).add_(grid.top / 2).t().contiguous()
    by_row = density.shape[1] == 1
    unit = torch.ones_like(left[:, :1]) if by_row else density.t()
    return left, unit, grid.top.t().expand(len(left), -1)


def _one_block(left: Tensor, base: Tensor, share: Tensor, ahead: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of a block of columns, and its errors: (base - codes) times share.

    Args:
        left: (block, rows), what to round, in units of codes; is used up. May be `base` itself.
        share: (block, rows or 1).
        ahead: (block, at least block): its row j times the error of column j is taken from the later columns.
        most: the largest codes, (block, rows or 1).
    """
    size = len(left)
    codes, errors, zero = torch.empty_like(left), torch.empty_like(left), torch.zeros_like(most[0])
    columns = list(zip(*(tensor.unbind() for tensor in (left, base, codes, errors, share, most)), strict=True))
    for start in range(0, size, _INNER):
        stop = min(size, start + _INNER)
        for j in range(start, stop):
            column, before, code, error, part, top = columns[j]
            torch.clamp(column, zero, top, out=code).round_()
            torch.sub(before, code, out=error).mul_(part)
            left[j + 1 : stop].addr_(ahead[j, j + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(ahead[start:stop, stop:size].t(), errors[start:stop], alpha=-1)
    return codes, errors


def quantise(
    weight: Tensor, mask: Tensor | None, hessian: Tensor | None, grid: Grid, sweeps: int = 1,
    factor: Factor | None = None,
) -> Quantised:  # fmt: skip
    """Quantise a matrix; no row's output on the calibration inputs changes more than by rounding.

    Each row by sparse GPTQ or by rounding, whichever has the smaller output error e H e^T, then coordinate descent.

    Args:
        weight: float32 or float64, (rows, columns).
        mask: bool, (rows, columns), true where an entry is kept; None keeps all.
        hessian: (columns, columns), of the weight's dtype; None where there is no calibration: plain rounding.
        sweeps: of coordinate descent; 0 for the paper's method.
        factor: `inverse_factor` of the Hessian, where several matrices share it.

    Raises:
        ValueError: as `inverse_factor`.
    """

    def values(codes: Tensor) -> Tensor:
        return grid.values(codes) if mask is None else grid.values(codes).mul_(mask)

    codes = grid.codes(weight) if mask is None else grid.codes(weight).mul_(mask)
    if hessian is None:
        return Quantised(codes, values(codes))
    factor = factor or inverse_factor(hessian)
    other = sparse_gptq(weight, mask, factor, grid)
    one, two, exact = values(codes), values(other), weight if mask is None else weight * mask
    # e H e^T - f H f^T in a single product: (e - f) H (e + f)^T
    gain = ((one - two) @ hessian).mul_(one.add_(two).sub_(exact, alpha=2)).sum(1, keepdim=True)
    codes = torch.where(gain > 0, other, codes)
    for _ in range(sweeps):
        codes = descend(weight, mask, hessian, grid, codes)
    return Quantised(codes, values(codes), factor.notes)


def best_scale(values: Tensor, mask: Tensor | None, width: int) -> Tensor:
    """For every row the scale of `Grid` with the smallest squared rounding error, to about a percent of the error.

    Args:
        values: float32 or float64, (rows, columns).
        mask: bool, (rows, columns), true for the entries that count; None counts all.
        width: bits of a code, 1 to 8.

    Returns:
        Positive scales, (rows,). The same on every call.
    """
    largest = (values if mask is None else values * mask).abs().amax(1).clamp_min(_TINY)
    # The few largest decide where there are many levels: then more has to be looked at
    sample, counts = _sample(values, mask, 1024 if width <= 4 else 16384)
    present = torch.arange(sample.shape[1], device=values.device) < counts[:, None]
    sample = sample / largest[:, None]
    top = 2.0**width - 1

    def levels(scale: Tensor) -> Tensor:
        position = (sample * (top / 2 / scale[:, None])).add_(top / 2).round_().clamp_(0, top)
        return position.mul_(2 / top).sub_(1).mul_(present)

    def best(scales: Tensor) -> Tensor:
        errors = [torch.addcmul(sample, levels(s), s[:, None], value=-1).square_().sum(1) for s in scales]
        return scales.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]

    rms = (sample.square().sum(1) / counts.clamp_min(1)).sqrt()
    lowest = (rms * (_LOWEST * _NORMAL_CLIP[width - 1])).clamp(_TINY, 1.0)
    step = lowest ** (-1 / (_COARSE - 1))
    middle = best(torch.stack([lowest * step**k for k in range(_COARSE)]))
    chosen = best(torch.stack([middle * step ** (2 * k / _FINE - 1) for k in range(_FINE + 1)]))
    # Of the levels that this chooses, the best scale is the solution of least squares: it can only improve
    used = levels(chosen)
    chosen = (used * sample).sum(1) / used.square_().sum(1).clamp_min(_TINY)
    return torch.where(counts > 0, chosen * largest, _TINY).clamp_min(_TINY)


def _sample(values: Tensor, mask: Tensor | None, most: int) -> tuple[Tensor, Tensor]:
    """At most so many entries of each row, evenly among those that the mask keeps, padded with 0; and how many."""
    rows, columns = values.shape
    if mask is None:
        sample = values[:, :: -(-columns // most)]
        return sample, torch.full((rows,), sample.shape[1], device=values.device)
    counts = mask.sum(1)
    # Every second, fourth, eighth ...: dividing integers would take longer than all the rest
    shift = (counts / most).clamp_min(1).log2().ceil().int()
    rank = mask.cumsum(1, dtype=torch.int32) - 1
    row, column = (mask & (rank & (1 << shift[:, None]) - 1 == 0)).nonzero(as_tuple=True)
    counts = (counts + (1 << shift) - 1) >> shift
    sample = values.new_zeros(rows, max(1, int(counts.max())))
    sample[row, rank[row, column] >> shift[row]] = values[row, column]
    return sample, counts
