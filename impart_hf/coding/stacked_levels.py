"""Rounding a stack of matrices to levels: every row or column of every matrix has a width code of its own.

What levels a width code has is looked up in tables, so that the launches do not depend on how many matrices or width
codes there are.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..modeling.codebook import level_codebook
from ..modeling.packed_tables import normal_levels
from ..modeling.width_codes import BITS, FLOAT16, NORMAL_LEVELS

LAST_EVEN = FLOAT16 - 1  # width codes up to here are evenly spaced levels
MOST_LEVELS = 16  # of a width code that is not evenly spaced


@functools.lru_cache
def width_tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return, by width code, the largest code (codes,), and the edges and levels (codes, 16) of uneven levels."""
    count = max(NORMAL_LEVELS) + 1
    tops, levels = np.zeros(count, np.float32), np.zeros((count, MOST_LEVELS), np.float32)
    edges = np.full((count, MOST_LEVELS), np.inf, np.float32)
    for width, bits in BITS.items():
        if width <= LAST_EVEN:
            tops[width] = (1 << bits) - 1
        elif width in NORMAL_LEVELS:
            levels[width] = normal_levels()[bits]
            own = level_codebook(width).edges().numpy()
            edges[width, : len(own)] = own
    tops_on, edges_on, levels_on = (torch.from_numpy(table).to(device) for table in (tops, edges, levels))
    return tops_on, edges_on, levels_on


@dataclass(frozen=True)
class _Tables:
    """What is known of width codes (b, r): the largest code of even levels (b, r), edges and levels (b, r, 16)."""

    uneven: Tensor | None
    tops: Tensor
    edges: Tensor
    levels: Tensor

    @classmethod
    def of(cls, widths: Tensor, has_uneven: bool) -> "_Tables":
        numbers = widths.long()
        tops, edges, levels = (table[numbers] for table in width_tables(widths.device))
        return cls(widths > LAST_EVEN if has_uneven else None, tops, edges, levels)


def stacked_codes(units: Tensor, widths: np.ndarray, by_row: bool) -> Tensor:
    """Return the codes, uint8, of the levels nearest to values in units of their scale.

    Args:
        units: float32 (b, rows, columns).
        widths: width codes, (b, rows) if `by_row`, otherwise (b, columns).
    """
    if not by_row:
        return stacked_codes(units.mT, widths, True).mT
    tables = _tables_of(widths, units.device)
    half = tables.tops[..., None] / 2
    codes = torch.minimum((units + 1).mul_(half).round_().clamp_(min=0), tables.tops[..., None])
    if tables.uneven is not None:
        above = torch.zeros_like(codes)
        for edge in tables.edges.split(1, -1):
            above += units > edge
        codes = torch.where(tables.uneven[..., None], above, codes)
    return codes.to(torch.uint8)


def stacked_values(codes: Tensor, widths: np.ndarray, by_row: bool) -> Tensor:
    """Return the levels, float32, of codes, uint8 (b, rows, columns); `widths` as for `stacked_codes`."""
    if not by_row:
        return stacked_values(codes.mT, widths, True).mT.contiguous()
    tables = _tables_of(widths, codes.device)
    values = codes.float() * (2.0 / tables.tops.clamp_min(1))[..., None] - 1
    if tables.uneven is None:
        return values
    rows = tables.levels.expand(*codes.shape[:2], -1)
    uneven = rows.gather(-1, codes.clamp(max=MOST_LEVELS - 1).long())
    return torch.where(tables.uneven[..., None], uneven, values)


def _tables_of(widths: np.ndarray, device: torch.device) -> _Tables:
    uneven = bool(np.isin(widths, list(NORMAL_LEVELS)).any())
    return _Tables.of(torch.from_numpy(widths.astype(np.int32)).to(device), uneven)


class StackRounder:
    """Rounds blocks of a stack of matrices column by column, where GPTQ's kernel does not run (`BlockRounder`)."""

    def __init__(
        self, codes: Tensor, order: Tensor, widths: Tensor, by_row: bool, uneven: bool, kept: Tensor | None
    ) -> None:
        """Set up the rounding; the arguments are those of `BlockRounder`, with an axis for the matrices in front."""
        self._codes, self._order, self._by_row, self._kept = codes, order, by_row, kept
        self._tables = _Tables.of(widths, uneven)

    def round(self, left: Tensor, here: slice, share: Tensor, ahead: Tensor) -> Tensor:
        """Round the columns `here`; see `BlockRounder.round`. `left` is overwritten."""
        codes, errors = torch.empty_like(left), torch.empty_like(left)
        tables = self._tables
        for j in range(left.shape[1]):
            number = slice(None) if self._by_row else slice(here.start + j, here.start + j + 1)
            value, top = left[:, j], tables.tops[:, number]
            code = torch.minimum(value.clamp(min=0), top).round_()
            level = code
            if tables.uneven is not None:
                above = (value[..., None] > tables.edges[:, number]).sum(-1)
                table = tables.levels[:, number].expand(*value.shape, -1)
                normal = tables.uneven[:, number]
                level = torch.where(normal, table.gather(-1, above[..., None])[..., 0], level)
                code = torch.where(normal, above, code)
            codes[:, j] = code
            torch.mul(value - level, share[:, j, None], out=errors[:, j])
            if self._kept is not None:
                errors[:, j] *= self._kept[:, here.start + j]
            factors = ahead[:, j, j + 1 : left.shape[1], None]
            left[:, j + 1 :].baddbmm_(factors, errors[:, j, None], alpha=-1)
        whole = codes.to(torch.uint8)
        if self._kept is not None:
            whole *= self._kept[:, here]
        order = self._order[:, here, None].expand_as(whole)
        self._codes.scatter_(1, order, whole)
        return errors
