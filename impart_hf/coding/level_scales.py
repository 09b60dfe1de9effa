"""The scale at which levels round the values of a row best, and how well they do.

A row x is rounded to a scale times levels q. With given levels, the scale <x, q> / <q, q> has the least squared error,
which is that of the angle between x and q. So some scales are tried, the one whose levels have the smallest angle is
taken, and what is returned is the best scale of these levels. Levels are symmetric about zero: sizes are rounded.

All rows of a plane are looked at together, whatever their widths. On a device the number of launches does not depend on
how many widths there are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..modeling.codebook import level_codebook
from ..modeling.width_codes import BITS, NORMAL_LEVELS

# Scales that are tried for evenly spaced levels: _COARSE up to the largest entry, then _FINE around the best, up to
# _FARTHEST of the way to its neighbours. For long tails the best is as little as _LEAST times the best scale for
# normally distributed values, which is _NORMAL times their root mean square for 0 to 8 bits.
_COARSE, _FINE, _FARTHEST, _LEAST = 9, 5, 2 / 3, 0.3
_NORMAL = (0.0, 0.798, 1.494, 2.051, 2.514, 2.9, 3.25, 3.6, 3.9)
_STEPS = 3  # by which levels and scale are improved in turn where the first scale is nearly right
_TINY = 1e-12  # scale of a row of zeros
# Entries of a row that are looked at. With many levels the few largest values decide, so more are needed.
_FEW, _MANY, _FEW_BITS = 4096, 65536, 3
_TILE, _DEVICE_TILE = 1 << 16, 1 << 23  # entries at once: on a CPU, what fits in a core's cache


@dataclass(frozen=True)
class LevelFit:
    """The scale of each row, (r,), positive, and the cosine between its values and their levels, (r,)."""

    scale: Tensor
    cosine: Tensor


def fit_levels(plane: Tensor, mask: Tensor | None, widths: np.ndarray | int, start: Tensor | None = None) -> LevelFit:
    """Fit scales with about the least squared error to the rows of a plane; of long rows, to a part of the entries.

    The result is deterministic, and a scale is positive even if nothing of its row is kept.

    Args:
        plane: float32 or float64, (r, length).
        mask: bool (r, length), true where an entry is kept; None keeps all.
        widths: width codes of levels, (r,), or one for all rows.
        start: (r,), scales that are nearly right; they are improved, and no others are tried.
    """
    widths = np.broadcast_to(np.asarray(widths), len(plane))
    scale, cosine = (plane.new_empty(len(plane)) for _ in range(2))
    many = np.array([BITS[width] > _FEW_BITS for width in widths.tolist()], bool) | (plane.shape[1] <= _FEW)
    normal, signs = np.isin(widths, list(NORMAL_LEVELS)), widths == 1
    others = ~normal & ~signs
    for chosen in (signs, normal & many, normal & ~many, others & many, others & ~many):
        for numbers, rows in _tiles(chosen, plane.shape[1], plane.device):
            sizes, counts = _sample(
                plane[rows], None if mask is None else mask[rows], _MANY if many[numbers[0]] else _FEW
            )
            fitted = _Rows.of(sizes.abs_(), counts, widths[numbers])
            if signs[numbers[0]]:  # the levels of signs are the same at any scale
                product, square = fitted.rounded(fitted.unit)
            elif start is not None or normal[numbers[0]]:
                product, square = fitted.improved(fitted.root_mean_square() if start is None else start[rows])
            else:
                product, square = fitted.searched()
            scale[rows] = (fitted.unit * product / square).clamp_min_(_TINY)
            cosine[rows] = product / (square * fitted.energy).sqrt_().clamp_min_(_TINY)
    return LevelFit(scale, cosine)


def _tiles(chosen: np.ndarray, length: int, device: torch.device) -> Iterator[tuple[np.ndarray, Any]]:
    """Return the numbers of some rows, in tiles, each with an index for them: a slice if they follow each other."""
    rows = np.flatnonzero(chosen)
    step = max(1, (_TILE if device.type == "cpu" else _DEVICE_TILE) // max(1, min(length, _MANY)))
    for start in range(0, len(rows), step):
        tile = rows[start : start + step]
        together = tile[-1] - tile[0] == len(tile) - 1
        yield tile, slice(tile[0], tile[-1] + 1) if together else torch.from_numpy(tile).to(device)


@dataclass(frozen=True)
class _Rows:
    """Rows whose scales are fitted. Levels are in units in which neighbours of evenly spaced ones are 1 apart.

    Attributes:
        sizes: (r, s), absolute values, 0 where nothing is.
        energy: (r,), the sum of their squares.
        counts: int64 (r,), how many are there.
        unit: (r,), levels in a scale (`Levels.density`).
        lowest: (r, 1), the lowest level above zero.
        edges, steps: (r, levels above zero - 1): the edges of levels above zero, and the distances of the levels at
            them; None if the levels are evenly spaced.
        highest: (r, 1), the highest of evenly spaced levels.
        normal: (r, 1), their best scale for normally distributed values of variance 1.
    """

    sizes: Tensor
    energy: Tensor
    counts: Tensor
    unit: Tensor
    lowest: Tensor
    edges: Tensor | None
    steps: Tensor | None
    highest: Tensor
    normal: Tensor

    @classmethod
    def of(cls, sizes: Tensor, counts: Tensor, widths: np.ndarray) -> "_Rows":
        """Make the rows of width codes that are all of one kind."""
        above = [NORMAL_LEVELS.get(width) for width in widths.tolist()]
        most = max(0 if levels is None else len(levels) for levels in above)
        table = np.zeros((len(widths), 4 + 2 * most))
        table[:, 0] = [level_codebook(width).density for width in widths.tolist()]
        table[:, 1], table[:, 2] = 0.5, table[:, 0]
        table[:, 3] = [
            0.0 if levels is not None else _NORMAL[width] for width, levels in zip(widths, above, strict=True)
        ]
        for row, levels in zip(table, above, strict=True):
            if levels is not None:
                row[1] = levels[0]
                row[4 : 4 + most] = np.inf
                row[4 : 3 + len(levels)] = (np.array(levels[1:]) + levels[:-1]) / 2
                row[4 + most : 3 + most + len(levels)] = np.diff(levels)
        unit, lowest, highest, normal, rest = torch.from_numpy(table).to(sizes).split([1, 1, 1, 1, 2 * most], 1)
        edges, steps = rest.split(most, 1) if most else (None, None)
        return cls(sizes, sizes.square().sum(1), counts, unit[:, 0], lowest, edges, steps, highest, normal)

    def root_mean_square(self) -> Tensor:
        return (self.energy / self.counts.clamp_min(1)).sqrt_().clamp_min_(_TINY)

    def rounded(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return <x, q> and <q, q> for the levels q nearest to sizes x at scales (r,), or at several, (s, r)."""
        positions = self.sizes * (self.unit / scale)[..., None]
        if self.edges is None or self.steps is None:
            levels = torch.minimum(positions.floor_().add_(0.5), self.highest, out=positions)
        else:
            levels, above = torch.empty_like(positions).copy_(self.lowest), torch.empty_like(positions)
            for edge, step in zip(self.edges.split(1, 1), self.steps.split(1, 1), strict=True):
                levels.addcmul_(torch.gt(positions, edge, out=above), step)
        product = (self.sizes * levels).sum(-1)
        absent = self.sizes.shape[1] - self.counts
        square = levels.square_().sum(-1).sub_(absent * self.lowest[:, 0].square())
        return product, square.clamp_min_(_TINY)

    def improved(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return `rounded` at a scale that is improved from the given one."""
        for _ in range(_STEPS - 1):
            product, square = self.rounded(scale)
            scale = (self.unit * product / square).clamp_min_(_TINY)
        return self.rounded(scale)

    def searched(self) -> tuple[Tensor, Tensor]:
        """Return `rounded` at the best of many scales."""
        largest = self.sizes.amax(1).clamp_min_(_TINY)
        lowest = torch.minimum(self.root_mean_square() * (_LEAST * self.normal[:, 0]), largest)
        step = (largest / lowest) ** (1 / (_COARSE - 1))
        coarse = torch.arange(_COARSE, dtype=step.dtype, device=step.device)
        fine = torch.linspace(-_FARTHEST, _FARTHEST, _FINE, dtype=step.dtype, device=step.device)
        middle = self._best(lowest * step ** coarse[:, None])[0]
        return self._best(middle * step ** fine[:, None])[1:]

    def _best(self, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return for each row the best of the scales (s, r), and `rounded` there."""
        if scales.device.type == "cpu":  # one after the other, in the cache
            products, squares = (torch.stack(parts) for parts in zip(*map(self.rounded, scales), strict=True))
        else:
            products, squares = self.rounded(scales)
        best = (products.square() / squares).argmax(0, keepdim=True)
        scale, product, square = (part.gather(0, best)[0] for part in (scales, products, squares))
        return scale, product, square


def _sample(values: Tensor, mask: Tensor | None, most: int) -> tuple[Tensor, Tensor]:
    """Return at most `most` kept entries of each row, evenly spaced and padded with 0, and their number per row."""
    if mask is None:
        sample = values[:, :: -(-values.shape[1] // most)].clone(memory_format=torch.contiguous_format)
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
