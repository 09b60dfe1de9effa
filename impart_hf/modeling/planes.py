"""Planes: the matrices U, V or ΔW of a record, made of columns of which only some entries are kept.

A column of U or V is a singular vector. A column of a direct record's only plane is a row of the matrix, so that its
entries are contiguous in memory.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch

from .delta_record import MAX_THRESHOLD, Record
from .seeded_mask import keep_mask

# A plane is decoded in runs if columns with and without a mask alternate at most this often; writers put the columns
# with a mask last.
MOST_TURNS = 64


@dataclass
class Run:
    """Neighbouring columns of a plane.

    Attributes:
        columns, rows: the run's shape; a column has `rows` entries if nothing is dropped.
        values: float32, shape (kept,), column by column, rows ascending within a column.
        positions: int64, shape (kept,): column * rows + row of every kept entry, the run's first column being 0; None
            if there is no mask, so that all are kept.
    """

    columns: int
    rows: int
    values: torch.Tensor
    positions: torch.Tensor | None

    def dense(self) -> torch.Tensor:
        """Return float32 (columns, rows), with zeros for dropped entries; a view of `values` if there is no mask."""
        if self.positions is None:
            return self.values.view(self.columns, self.rows)
        out = torch.zeros(self.columns * self.rows, dtype=torch.float32, device=self.values.device)
        out[self.positions] = self.values
        return out.view(self.columns, self.rows)

    def select(self, start: int, stop: int) -> "Run":
        """Return the run of columns `start` to `stop` - 1."""
        bounds = torch.tensor([start * self.rows, stop * self.rows], device=self.values.device)
        first, last = (bounds if self.positions is None else torch.searchsorted(self.positions, bounds)).tolist()
        positions = None if self.positions is None else self.positions[first:last] - start * self.rows
        return Run(stop - start, self.rows, self.values[first:last], positions)


@dataclass
class Plane:
    """U, V or a direct plane, decoded.

    Attributes:
        columns, rows: the plane's shape; a column has `rows` entries if nothing is dropped.
        runs: the columns in order; at least one run.
    """

    columns: int
    rows: int
    runs: list[Run]

    def __post_init__(self) -> None:
        # The first column of each run.
        self._starts = list(accumulate([run.columns for run in self.runs[:-1]], initial=0))

    def dense(self) -> torch.Tensor:
        """Return float32 (columns, rows), with zeros for dropped entries; it may be a view of a run's values."""
        return self.runs[0].dense() if len(self.runs) == 1 else torch.cat([run.dense() for run in self.runs])

    def values(self) -> torch.Tensor:
        """Return the kept entries, float32 (kept,), column by column, rows ascending within a column."""
        return torch.cat([run.values for run in self.runs])

    def positions(self) -> torch.Tensor:
        """Return column * rows + row of every kept entry, int64 (kept,)."""
        parts = []
        for at, run in zip(self._starts, self.runs, strict=True):
            every = torch.arange(len(run.values), device=run.values.device)
            parts.append(at * self.rows + (every if run.positions is None else run.positions))
        return torch.cat(parts)

    def select(self, columns: slice) -> "Plane":
        """Return the plane of a contiguous range of columns."""
        start, stop, _ = columns.indices(self.columns)
        first = bisect_right(self._starts, start) - 1
        last = max(first + 1, bisect_left(self._starts, stop))
        runs = [
            run.select(max(start - at, 0), min(stop - at, run.columns))
            for at, run in zip(self._starts[first:last], self.runs[first:last], strict=True)
        ]
        return Plane(stop - start, self.rows, runs)


class KeptEntries:
    """The kept entries of a plane.

    Positions are computed only for columns with a mask, because finding and scattering entries takes longer than
    unpacking them. If columns with and without a mask alternate too often, all count as columns with a mask.

    Attributes:
        counts: int64, shape (plane columns,): number of kept entries of each column.
    """

    def __init__(self, record: Record, side: int, device: torch.device | str):
        self.rows = record.plane_rows(side)
        self.counts = np.full(record.plane_columns, self.rows)
        self._masked = record.thresholds < MAX_THRESHOLD
        if np.count_nonzero(np.diff(self._masked)) > MOST_TURNS:
            self._masked[:] = True
        numbers = np.flatnonzero(self._masked)
        # For each column, the number of masked columns before it.
        self._masked_before = np.concatenate([[0], np.cumsum(self._masked)])
        mask = keep_mask(record.mask_seed, side, record.thresholds[numbers], self.rows, device, numbers)
        self._positions = mask.view(-1).nonzero().view(-1)
        # This is much faster than summing the mask.
        ends = torch.searchsorted(self._positions, self.rows * torch.arange(len(numbers) + 1, device=device))
        self._ends = ends.tolist()
        self.counts[numbers] = np.diff(self._ends)

    def runs(self, start: int, stop: int, values: torch.Tensor) -> list[Run]:
        """Return columns `start` to `stop` - 1 as runs; `values` are their kept entries."""
        edges = start + 1 + np.flatnonzero(np.diff(self._masked[start:stop]))
        bounds = list(pairwise([start, *edges.tolist(), stop]))
        parts = values.split([int(self.counts[first:last].sum()) for first, last in bounds])
        return [
            Run(last - first, self.rows, part, self._run_positions(first, last) if self._masked[first] else None)
            for (first, last), part in zip(bounds, parts, strict=True)
        ]

    def _run_positions(self, first: int, last: int) -> torch.Tensor:
        masked_first = self._masked_before[first]
        kept = slice(self._ends[masked_first], self._ends[self._masked_before[last]])
        return self._positions[kept] - int(masked_first) * self.rows
