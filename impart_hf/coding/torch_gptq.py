"""GPTQ's rounding of one block of columns by torch, column by column: `triton_gptq` without Triton.

Each column is a few small operations, so what counts is how many. Evenly spaced levels of all widths are rounded
together, and so are the others.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..modeling.codebook import EvenLevels, level_codebook
from ..modeling.width_codes import NORMAL_LEVELS
from .record_sizes import runs

_INNER = 16  # columns per update one by one in a core's cache


@dataclass(frozen=True)
class _Part:
    """Levels to which some rows of a column are rounded.

    Attributes:
        rows: the rows.
        top: the largest code of evenly spaced levels, whose positions are the whole numbers: of all rows, or (rows,).
        edges, steps: of other levels, where each begins, from minus infinity on, and its distance from the one before,
            that of the first from zero: (levels, rows) or (levels, 1). None if the levels are evenly spaced.
    """

    rows: slice
    top: float | Tensor = 0.0
    edges: Tensor | None = None
    steps: Tensor | None = None

    @classmethod
    def of(cls, rows: slice, widths: np.ndarray, like: Tensor) -> "_Part":
        """Make the part of rows with one width code, (1,), or their own: all of evenly spaced levels, or none."""
        books = [level_codebook(width) for width in widths.tolist()]
        if isinstance(books[0], EvenLevels):
            tops = [float(book.top) for book in books]
            return cls(rows, tops[0] if len(set(tops)) == 1 else torch.tensor(tops).to(like))
        books = books[:1] if len(set(widths.tolist())) == 1 else books
        edges = torch.full((max(book.top for book in books) + 1, len(books)), torch.inf, dtype=like.dtype)
        steps = torch.zeros_like(edges)
        for row, book in enumerate(books):
            levels = book.levels(dtype=like.dtype)
            edges[0, row], edges[1 : book.top + 1, row] = -torch.inf, book.edges(dtype=like.dtype)
            steps[: book.top + 1, row] = torch.cat([levels[:1], levels.diff()])
        return cls(rows, 0.0, edges.to(like.device), steps.to(like.device))

    def round(self, column: Tensor, level: Tensor, error: Tensor) -> None:
        """Write the levels nearest to positions (rows,), and the differences."""
        if self.edges is not None and self.steps is not None:
            above = column.new_empty(len(self.edges), len(column))
            torch.sum(torch.gt(column, self.edges, out=above).mul_(self.steps), 0, out=level)
        elif isinstance(self.top, float):
            torch.clamp(column, 0, self.top, out=level).round_()
        else:
            torch.minimum(torch.clamp(column, min=0, out=level), self.top, out=level).round_()
        torch.sub(column, level, out=error)


@dataclass(frozen=True)
class TorchRounder:
    """Rounds blocks of a matrix (rows, columns), of which everything here has one column after the other in memory.

    Attributes:
        codes: uint8 (columns, rows), written.
        order: int64 (columns,): where column j's codes are written.
        widths: width codes of levels: of all rows if `by_row`, otherwise of the columns. Rows with evenly spaced levels
            should follow each other: every change from them or to them makes each column slower.
        kept: bool (columns, rows), or None.
        like: of the matrix's dtype and device.
    """

    codes: Tensor
    order: Tensor
    widths: np.ndarray
    by_row: bool
    kept: Tensor | None
    like: Tensor

    @cached_property
    def _parts(self) -> dict[int, list[_Part]]:
        """The parts of a column by its width code; those of all columns under 0 if the rows have the width codes."""
        if self.by_row:
            parts = runs(np.isin(self.widths, list(NORMAL_LEVELS)))
            return {0: [_Part.of(rows, self.widths[rows], self.like) for _, rows in parts]}
        each = set(self.widths.tolist())
        return {width: [_Part.of(slice(None), np.array([width]), self.like)] for width in each}

    def round(self, left: Tensor, here: slice, share: Tensor, ahead: Tensor) -> Tensor:
        """Round the columns `here`; see `BlockRounder.round`. `left` is overwritten."""
        size = len(left)
        levels, errors = torch.empty_like(left), torch.empty_like(left)
        kept = None if self.kept is None else self.kept[here]
        shares = (share[:, None] if kept is None else kept * share[:, None]).unbind()
        rows, factors = errors.unbind(), ahead[:, :size].unbind()
        keys = [0] * size if self.by_row else self.widths[here].tolist()
        # What every part rounds in every column, sliced at once.
        pieces = {
            part.rows.start: [tensor[:, part.rows].unbind() for tensor in (left, levels, errors)]
            for part in next(iter(self._parts.values()))
        }
        for start in range(0, size, _INNER):
            stop = min(size, start + _INNER)
            for j in range(start, stop):
                for part in self._parts[keys[j]]:
                    part.round(*(piece[j] for piece in pieces[part.rows.start]))
                rows[j].mul_(shares[j])
                if j + 1 < stop:
                    left[j + 1 : stop].addr_(factors[j][j + 1 : stop], rows[j], alpha=-1)
            if stop < size:
                left[stop:].addmm_(ahead[start:stop, stop:size].t(), errors[start:stop], alpha=-1)
        codes = self._codes(levels, here)
        self.codes[self.order[here]] = codes if kept is None else codes.mul_(kept)
        return errors

    def _codes(self, levels: Tensor, here: slice) -> Tensor:
        """Return the codes of the levels, as positions, of some columns."""
        codes = levels.to(torch.uint8)
        widths = self.widths if self.by_row else self.widths[here]
        for width in set(widths.tolist()) & NORMAL_LEVELS.keys():
            where = torch.from_numpy(np.flatnonzero(widths == width)).to(levels.device)
            part = (slice(None), where) if self.by_row else where
            codes[part] = level_codebook(width).nearest(levels[part])
        return codes
