"""Planes: the matrices U, V or ΔW of a record, made of columns of which only some entries are kept.

A column of U or V is a singular vector. A column of a direct record's only plane is a row of the matrix, so that its
entries are contiguous in memory.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import torch

from .checkpoints import all_finite
from .codebook import CODEBOOKS, Codebook, Floats
from .delta_record import MAX_THRESHOLD, DeltaFormatError, Record
from .seeded_mask import kept_positions

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
        return out.scatter_(0, self.positions, self.values).view(self.columns, self.rows)

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


@dataclass
class StoredRun:
    """Neighbouring columns of a plane that are stored alike, or some of them, before their codes are looked at.

    Attributes:
        side: 0 for U and for a direct plane, 1 for V.
        columns, rows: its shape; a column has `rows` entries if nothing is dropped.
        book: what a code stands for.
        packed: uint8, the packed codes of the kept entries, after those of `lead` entries of columns before.
        lead: 0 to 7: eight codes fill whole bytes.
        positions: as of a `Run`.
        scales: float32 (columns,), factors of the columns' values; None if there are none.
        offset, total: how many columns that are stored alike come before, and how many they are altogether.
    """

    side: int
    columns: int
    rows: int
    book: Codebook
    packed: torch.Tensor
    lead: int
    positions: torch.Tensor | None
    scales: torch.Tensor | None
    offset: int
    total: int

    @property
    def kept(self) -> int:
        return self.columns * self.rows if self.positions is None else len(self.positions)

    def compact(self) -> torch.Tensor:
        """Return the kept entries in the compact form of their codebook, without the columns' scales: (kept,)."""
        return self.book.compact(self.packed, self.lead + self.kept)[self.lead :]

    def decode(self, name: str) -> Run:
        """Return the run with its values.

        Raises:
            DeltaFormatError: if a value is not finite; `name` is the tensor's, for the message.
        """
        values = self.book.unpack(self.packed, self.lead + self.kept)[self.lead :]
        if self.scales is not None and self.positions is None:
            values = (values.view(self.columns, self.rows) * self.scales[:, None]).view(-1)
        elif self.scales is not None and self.positions is not None:
            starts = self.rows * torch.arange(self.columns + 1, device=values.device)
            kept = torch.searchsorted(self.positions, starts).diff()
            values = values * self.scales.repeat_interleave(kept, output_size=len(values))
        # A level times a finite column scale is finite, so only floats need the check.
        if isinstance(self.book, Floats) and not all_finite(values):
            raise DeltaFormatError(f"{name}: a stored value is not finite")
        return Run(self.columns, self.rows, values, self.positions)

    def pieces(self, most_entries: int) -> Iterator["StoredRun"]:
        """Yield the columns some at a time, unless they have a mask: of so many entries, or of one column."""
        step = self.columns if self.positions is not None else max(1, most_entries // max(1, self.rows))
        for first in range(0, self.columns, step):
            last = min(first + step, self.columns)
            begin, lead = divmod(self.lead + first * self.rows, 8)
            end = self.book.packed_bytes(self.lead + last * self.rows) if self.positions is None else len(self.packed)
            yield replace(
                self,
                columns=last - first,
                packed=self.packed[begin * self.book.bits : end],
                lead=lead,
                scales=None if self.scales is None else self.scales[first:last],
                offset=self.offset + first,
            )


def stored_runs(
    record: Record, name: str, device: torch.device | str = "cpu", most_entries: int | None = None
) -> Iterator[StoredRun]:
    """Yield the runs of all planes in the order in which they are stored: of each segment U's, then V's.

    A mask is computed when its run's turn comes.

    Args:
        record: the record.
        name: the tensor's name, for messages.
        device: where codes and positions are.
        most_entries: of a run with a mask, unless one column has more; None for as many as are stored alike.

    Raises:
        DeltaFormatError: if there are not as many codes as kept entries. That may be known only after the last run.
    """
    masked = record.thresholds < MAX_THRESHOLD
    if np.count_nonzero(np.diff(masked)) > MOST_TURNS:
        masked[:] = True
    codes = torch.from_numpy(np.array(record.codes)).to(device)
    at = start = 0
    for segment, scales in zip(record.segments, record.column_scales, strict=True):
        stop = start + segment.columns
        turns = start + 1 + np.flatnonzero(np.diff(masked[start:stop]))
        for side, width in enumerate(segment.widths()):
            book, rows = CODEBOOKS[width], record.plane_rows(side)
            side_scales = None if scales is None else torch.from_numpy(scales[side].astype(np.float32)).to(device)
            before = 0  # kept entries of this side of the segment so far
            for begin, end in pairwise([start, *turns.tolist(), stop]):
                step = max(1, most_entries // max(1, rows)) if masked[begin] and most_entries else end - begin
                for first in range(begin, end, step):
                    last = min(first + step, end)
                    positions = None
                    if masked[first]:
                        numbers = np.arange(first, last)
                        limits = record.thresholds[numbers]
                        positions = kept_positions(record.mask_seed, side, limits, rows, device, numbers)
                    byte, lead = at + before // 8 * book.bits, before % 8
                    before += (last - first) * rows if positions is None else len(positions)
                    if at + book.packed_bytes(before) > len(codes):
                        raise DeltaFormatError(f"{name}: {len(codes)} bytes of codes are fewer than the masks need")
                    own = None if side_scales is None else side_scales[first - start : last - start]
                    packed = codes[byte : at + book.packed_bytes(before)]
                    shape = last - first, rows
                    yield StoredRun(side, *shape, book, packed, lead, positions, own, first - begin, end - begin)
            at += book.packed_bytes(before)
        start = stop
    if at != len(codes):
        raise DeltaFormatError(f"{name}: {len(codes)} bytes of codes are more than the {at} that the masks need")
