"""From a record's bytes to the delta it stands for: unpacking, planes, and the product U diag(sigma) V^T.

All arithmetic is float32. The product is a dense one though most entries of U and V are zeros: a sparse product's
multiply-adds cost 5 to 40 times as much, which pays where fewer than a tenth are kept, and not where a fifth is
(scripts/benchmark_load.py prints the factor).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch

from .checkpoints import all_finite
from .delta_record import (
    BFLOAT16,
    FACTORED,
    FLOAT16,
    MAX_THRESHOLD,
    NORMAL_LEVELS,
    DeltaFormatError,
    Record,
    code_bits,
    code_bytes,
    parse_record,
)
from .seeded_mask import keep_mask

# Rows of a matrix that are decoded and added to the base at once on a CPU. A whole matrix in float32 would need the
# memory, and is no faster; with fewer rows the product becomes slower (with 128 by a tenth to a quarter).
_TILE_ROWS = 512
# Columns with a mask and columns without take turns no more often than this in a plane that is decoded in runs:
# writers put those with a mask last
_MOST_TURNS = 64


@dataclass
class _Run:
    """Neighbouring columns of a plane.

    Attributes:
        columns, rows: how many columns, and entries of each when nothing is dropped.
        values: float32, shape (kept,), column by column, rows ascending within a column.
        positions: int64, shape (kept,): column * rows + row of every kept entry, the run's first column being 0; None
            if they have no mask, so that all are kept.
    """

    columns: int
    rows: int
    values: torch.Tensor
    positions: torch.Tensor | None

    def dense(self) -> torch.Tensor:
        """float32, shape (columns, rows), zeros where entries were dropped; without a mask the values' own memory."""
        if self.positions is None:
            return self.values.view(self.columns, self.rows)
        out = torch.zeros(self.columns * self.rows, dtype=torch.float32, device=self.values.device)
        out[self.positions] = self.values
        return out.view(self.columns, self.rows)

    def select(self, start: int, stop: int) -> "_Run":
        """The run of the columns from `start` to before `stop`."""
        bounds = torch.tensor([start * self.rows, stop * self.rows], device=self.values.device)
        first, last = (bounds if self.positions is None else torch.searchsorted(self.positions, bounds)).tolist()
        positions = None if self.positions is None else self.positions[first:last] - start * self.rows
        return _Run(stop - start, self.rows, self.values[first:last], positions)


@dataclass
class Plane:
    """U, V or a direct plane, as it is decoded.

    Attributes:
        columns, rows: the plane's shape; a column holds `rows` entries when nothing is dropped.
        runs: at least one; of them the columns are made up.
    """

    columns: int
    rows: int
    runs: list[_Run]

    def __post_init__(self) -> None:
        # The first column of each run
        self._starts = list(accumulate([run.columns for run in self.runs[:-1]], initial=0))

    def dense(self) -> torch.Tensor:
        """float32, shape (columns, rows), zeros where entries were dropped; it may be the memory of its run."""
        return self.runs[0].dense() if len(self.runs) == 1 else torch.cat([run.dense() for run in self.runs])

    def values(self) -> torch.Tensor:
        """float32, shape (kept,): the kept entries, column by column, rows ascending within a column."""
        return torch.cat([run.values for run in self.runs])

    def positions(self) -> torch.Tensor:
        """int64, shape (kept,): column * rows + row of every kept entry."""
        parts = []
        for at, run in zip(self._starts, self.runs, strict=True):
            every = torch.arange(len(run.values), device=run.values.device)
            parts.append(at * self.rows + (every if run.positions is None else run.positions))
        return torch.cat(parts)

    def select(self, columns: slice) -> "Plane":
        """The plane of a contiguous range of columns."""
        start, stop, _ = columns.indices(self.columns)
        first = bisect_right(self._starts, start) - 1
        last = max(first + 1, bisect_left(self._starts, stop))
        runs = [
            run.select(max(start - at, 0), min(stop - at, run.columns))
            for at, run in zip(self._starts[first:last], self.runs[first:last], strict=True)
        ]
        return Plane(stop - start, self.rows, runs)


class _Kept:
    """Which entries of a plane are kept.

    Nothing is computed for columns without a mask, unless these and others take turns too often: finding and
    scattering their entries takes longer than unpacking them.

    Attributes:
        counts: int64, shape (plane columns,): entries kept of each column.
    """

    def __init__(self, record: Record, side: int, device: torch.device | str):
        self.rows = record.plane_rows(side)
        self.counts = np.full(record.plane_columns, self.rows)
        self._partial = record.thresholds < MAX_THRESHOLD
        if np.count_nonzero(np.diff(self._partial)) > _MOST_TURNS:
            self._partial[:] = True
        numbers = np.flatnonzero(self._partial)
        # Of each column, the partial ones before it
        self._before = np.concatenate([[0], np.cumsum(self._partial)])
        mask = keep_mask(record.mask_seed, side, record.thresholds[numbers], self.rows, device, numbers)
        self._positions = mask.view(-1).nonzero().view(-1)
        # Much faster than summing the mask
        ends = torch.searchsorted(self._positions, self.rows * torch.arange(len(numbers) + 1, device=device))
        self._ends = ends.tolist()
        self.counts[numbers] = np.diff(self._ends)

    def runs(self, start: int, stop: int, values: torch.Tensor) -> list[_Run]:
        """The columns from `start` to before `stop`, whose kept entries are `values`."""
        edges = start + 1 + np.flatnonzero(np.diff(self._partial[start:stop]))
        bounds = list(pairwise([start, *edges.tolist(), stop]))
        parts = values.split([int(self.counts[first:last].sum()) for first, last in bounds])
        return [
            _Run(last - first, self.rows, part, self._run_positions(first, last) if self._partial[first] else None)
            for (first, last), part in zip(bounds, parts, strict=True)
        ]

    def _run_positions(self, first: int, last: int) -> torch.Tensor:
        among_partial = self._before[first]
        kept = slice(self._ends[among_partial], self._ends[self._before[last]])
        return self._positions[kept] - int(among_partial) * self.rows


def unpack_levels(packed: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """`count` unsigned codes of `width` bits (1 to 8), packed least significant bit first, as int64."""
    groups = -(-count // 8)  # eight codes fill exactly `width` bytes
    padded = torch.zeros(groups * width, dtype=torch.uint8, device=packed.device)
    padded[: len(packed)] = packed
    lanes = torch.zeros(groups, 8, dtype=torch.uint8, device=packed.device)
    lanes[:, :width] = padded.view(groups, width)
    shifts = width * torch.arange(8, device=packed.device)
    return ((lanes.view(torch.int64) >> shifts) & ((1 << width) - 1)).view(-1)[:count]


def evenly_spaced(codes: torch.Tensor, width: int) -> torch.Tensor:
    """float32: the levels between -1 and 1 that codes of 1 to 8 bits stand for."""
    return codes.float() * (2.0 / ((1 << width) - 1)) - 1.0


def normal_levels(width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """float32: the rising levels for normally distributed numbers, by code."""
    above = torch.tensor(NORMAL_LEVELS[width], device=device)
    return torch.cat([-above.flip(0), above])


def _unpacked(packed: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """float32: the levels that `count` packed codes of a width stand for."""
    bits, device = code_bits(width), packed.device
    codes = torch.arange(1 << bits, device=device)
    levels = normal_levels(width, device) if width in NORMAL_LEVELS else evenly_spaced(codes, bits)
    if 8 % bits:
        return levels[unpack_levels(packed, bits, count)]
    # A byte holds whole codes: a table of all bytes gives several values at once
    every_byte = torch.arange(256, device=device).to(torch.uint8)
    table = levels[unpack_levels(every_byte, bits, 256 * 8 // bits)].view(256, -1)
    return torch.nn.functional.embedding(packed.int(), table).view(-1)[:count]


def _segment_values(
    packed: torch.Tensor, width: int, per_column: np.ndarray, scales: np.ndarray | None
) -> torch.Tensor:
    """float32 values of one side of one segment; `per_column` is the number kept in each column."""
    if width in (FLOAT16, BFLOAT16):
        # A copy is at an address that 16-bit loads allow; contiguous, since numpy gives an empty array the stride 0
        aligned = packed.clone(memory_format=torch.contiguous_format)
        values = aligned.view(torch.float16 if width == FLOAT16 else torch.bfloat16).float()
    else:
        values = _unpacked(packed, width, int(per_column.sum()))
    if scales is None:
        return values
    repeats = torch.from_numpy(per_column).to(packed.device)
    return values * torch.from_numpy(scales.astype(np.float32)).to(packed.device).repeat_interleave(repeats)


def decode_planes(record: Record, name: str, device: torch.device | str = "cpu") -> list[Plane]:
    """The planes of a record: [U, V] of a factored one, [P] of a direct one, on `device`.

    Raises:
        DeltaFormatError: if the codes are not exactly as many as the masks keep, or a value is not finite.
    """
    kept = [_Kept(record, side, device) for side in range(record.sides)]
    codes = torch.from_numpy(np.array(record.codes)).to(device)
    runs: list[list[_Run]] = [[] for _ in kept]
    at = start = 0
    for segment, scales in zip(record.segments, record.column_scales, strict=True):
        stop = start + segment.columns
        for side, width in enumerate(segment.widths()):
            per_column = kept[side].counts[start:stop]
            size = code_bytes(int(per_column.sum()), width)
            if at + size > len(codes):
                raise DeltaFormatError(f"{name}: {len(codes)} bytes of codes are fewer than the masks keep")
            side_scales = None if scales is None else scales[side]
            values = _segment_values(codes[at : at + size], width, per_column, side_scales)
            # Levels are finite, and so is a level times a scale
            if width in (FLOAT16, BFLOAT16) and not all_finite(values):
                raise DeltaFormatError(f"{name}: a stored value is not finite")
            runs[side] += kept[side].runs(start, stop, values)
            at += size
        start = stop
    if at != len(codes):
        raise DeltaFormatError(f"{name}: {len(codes)} bytes of codes are more than the masks keep ({at})")
    rows = [record.plane_rows(side) for side in range(record.sides)]
    nothing = torch.empty(0, device=device)
    return [
        Plane(record.plane_columns, length, found or [_Run(0, length, nothing, None)])
        for length, found in zip(rows, runs, strict=True)
    ]


def _row_adder(record: Record, name: str, device: torch.device | str) -> Callable[[torch.Tensor, slice], object]:
    """A function that adds a range of rows of the matrix a record stands for to a float32 tensor on `device`."""
    planes = decode_planes(record, name, device)
    if record.layout != FACTORED:
        return lambda tile, rows: tile.add_(planes[0].select(rows).dense(), alpha=record.scale)
    sigma = torch.from_numpy(record.sigma.astype(np.float32) * np.float32(record.scale)).to(device)
    u, v = (planes[0].dense() * sigma[:, None]).t(), planes[1].dense()
    return lambda tile, rows: tile.addmm_(u[rows], v)


def decode_record(record: Record, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """The matrix that a record stands for: float32, shape (rows, columns), on `device`."""
    decoded = torch.zeros(record.rows, record.columns, device=device)
    _row_adder(record, name, device)(decoded, slice(0, record.rows))
    return decoded


def add_delta(base: torch.Tensor, data: np.ndarray, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Base plus decoded delta, summed in float32 and rounded once to `dtype`.

    Args:
        base: shape (m, n), or (s, m, n) for a stack of s matrices, on the device where the work is to be done.
        data: uint8: the tensor's record, or its s records one after the other.
        name: the tensor's name, for messages.
        dtype: the fine-tuned tensor's dtype.

    Raises:
        DeltaFormatError: if the records do not fit the base's shape, do not end where the data ends, or give a number
            that is not finite.
    """
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    at = 0
    for target, matrix in zip(_matrices(out), _matrices(base), strict=True):
        record, length = parse_record(data[at:], (matrix.shape[0], matrix.shape[1]), name)
        add_rows = _row_adder(record, name, base.device)
        # On an accelerator one launch over everything is best
        step = _TILE_ROWS if base.device.type == "cpu" else max(1, record.rows)
        for start in range(0, record.rows, step):
            rows = slice(start, min(start + step, record.rows))
            tile = matrix[rows].to(torch.float32, copy=True)
            add_rows(tile, rows)
            target[rows].copy_(tile)
            if not all_finite(target[rows]):
                raise DeltaFormatError(f"{name} decodes to NaN or infinity in {dtype}")
        at += length
    if at != len(data):
        raise DeltaFormatError(f"{name}: {len(data) - at} bytes follow the last record")
    return out


def _matrices(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor] if tensor.dim() == 2 else list(tensor.flatten(0, -3))
