"""The record: the bytes that hold the compressed delta of one matrix (docs/FORMAT.md, "Records").

This module reads, checks and writes the byte layout; `delta_decode` decodes the numbers. No number is trusted before it
has been checked against the shape that the record must have.
"""

import struct
from dataclasses import dataclass, field

import numpy as np

from .width_codes import BITS

FACTORED, DIRECT = 1, 2  # layouts
KEEP_ALL, KEEP_SHARED, KEEP_PER_COLUMN = 0, 1, 2  # how a segment states its thresholds
MAX_THRESHOLD = 0xFFFF

_HEADER = struct.Struct("<BBHIIIIffI")
_SEGMENT = struct.Struct("<IBBBB")
HEADER_BYTES = _HEADER.size
SEGMENT_BYTES = _SEGMENT.size


class DeltaFormatError(ValueError):
    """A delta file that is damaged, hostile, or written by a newer version of the format."""


@dataclass(frozen=True)
class Segment:
    """A run of consecutive columns that are stored in the same way.

    Attributes:
        columns: number of columns.
        width_u: width code of U's values (of the only plane's values in a direct record).
        width_v: width code of V's values; 0 in a direct record.
        keep: keep mode: KEEP_ALL, KEEP_SHARED (one threshold for the segment) or KEEP_PER_COLUMN.
        scaled: 1 if the columns of each side have column scales, 0 if not.
    """

    columns: int
    width_u: int
    width_v: int = 0
    keep: int = KEEP_ALL
    scaled: int = 0

    def widths(self) -> tuple[int, ...]:
        return (self.width_u, self.width_v) if self.width_v else (self.width_u,)


@dataclass
class Record:
    """One matrix's delta, parsed but not decoded.

    Factored: delta = scale * U diag(sigma) V^T, U of shape (rows, rank), V of shape (columns, rank).
    Direct: delta^T = scale * P, P of shape (columns, rows): plane column c is row c of the matrix.

    Attributes:
        sigma: float16, shape (rank,); empty in a direct record. It includes the 1/q rescale factors and the scales of
            levels.
        thresholds: uint16, shape (plane columns,): one for every column, whatever its segment's keep mode.
        column_scales: for each segment, float16 of shape (sides, segment columns), or None if it has none.
        codes: the packed codes of all segments and sides, uint8.
        relative_error: ||delta - decoded|| / ||delta|| that the writer measured (Frobenius norm); information only.
    """

    layout: int
    rows: int
    columns: int
    rank: int
    mask_seed: int
    scale: float
    relative_error: float
    segments: list[Segment]
    sigma: np.ndarray
    thresholds: np.ndarray
    column_scales: list[np.ndarray | None]
    codes: np.ndarray = field(repr=False)

    @property
    def plane_columns(self) -> int:
        return self.rank if self.layout == FACTORED else self.rows

    def plane_rows(self, side: int) -> int:
        """Return the entries per column of U (side 0) or V (side 1), or of the direct plane (side 0)."""
        return self.rows if self.layout == FACTORED and side == 0 else self.columns

    @property
    def sides(self) -> int:
        return 2 if self.layout == FACTORED else 1

    def keep_ratios(self) -> np.ndarray:
        """Return each column's probability of keeping an entry: float64, shape (plane columns,)."""
        return (self.thresholds.astype(np.float64) + 1) / (MAX_THRESHOLD + 1)


def pack_record(record: Record) -> bytes:
    """Return the bytes of a record; `parse_record` is the inverse."""
    thresholds, scales, start = [], [], 0
    for segment, column_scale in zip(record.segments, record.column_scales, strict=True):
        stop = start + segment.columns
        if segment.keep == KEEP_SHARED:
            thresholds.append(record.thresholds[start : start + 1])
        elif segment.keep == KEEP_PER_COLUMN:
            thresholds.append(record.thresholds[start:stop])
        if column_scale is not None:
            scales.append(column_scale)
        start = stop
    body = b"".join(
        [_SEGMENT.pack(s.columns, s.width_u, s.width_v, s.keep, s.scaled) for s in record.segments]
        + [record.sigma.astype("<f2").tobytes()]
        + [t.astype("<u2").tobytes() for t in thresholds]
        + [s.astype("<f2").tobytes() for s in scales]
        + [record.codes.tobytes()]
    )
    header = _HEADER.pack(
        record.layout,
        0,
        len(record.segments),
        record.rows,
        record.columns,
        record.rank,
        record.mask_seed,
        record.scale,
        record.relative_error,
        HEADER_BYTES + len(body),
    )
    return header + body


class Cursor:
    """Reads typed arrays from a buffer in order, with an error instead of reading past its end."""

    def __init__(self, data: np.ndarray, name: str):
        self.data, self.name, self.at = data, name, 0

    def take(self, dtype: str, count: int) -> np.ndarray:
        stop = self.at + count * np.dtype(dtype).itemsize
        if stop > len(self.data):
            raise DeltaFormatError(f"{self.name}: the record ends at byte {len(self.data)}, but needs {stop}")
        array = np.frombuffer(self.data[self.at : stop].tobytes(), dtype)
        self.at = stop
        return array


def _check_header(name: str, fields: tuple, shape: tuple[int, int], available: int) -> None:
    layout, reserved, _, rows, columns, rank, _, scale, error, length = fields
    if layout not in (FACTORED, DIRECT) or reserved != 0:
        raise DeltaFormatError(f"{name}: unknown record layout {layout}; a newer impart-hf may be needed")
    if (rows, columns) != tuple(shape):
        raise DeltaFormatError(f"{name}: the record is for a {rows}x{columns} matrix, the base's is {tuple(shape)}")
    if rank > (min(rows, columns) if layout == FACTORED else 0):
        raise DeltaFormatError(f"{name}: rank {rank} is impossible for a {rows}x{columns} matrix")
    if not np.isfinite([scale, error]).all():
        raise DeltaFormatError(f"{name}: the record's scale {scale} or relative error {error} is not finite")
    if length < HEADER_BYTES or length > available:
        raise DeltaFormatError(f"{name}: the record states a length of {length} bytes, but {available} are left")


def _check_segments(name: str, segments: list[Segment], layout: int, plane_columns: int) -> None:
    for segment in segments:
        v_ok = segment.width_v in BITS if layout == FACTORED else segment.width_v == 0
        known = segment.width_u in BITS and v_ok and segment.keep <= KEEP_PER_COLUMN and segment.scaled <= 1
        if not known or segment.columns == 0:
            raise DeltaFormatError(f"{name}: a column segment is empty or has an unknown width code or mode: {segment}")
    if sum(s.columns for s in segments) != plane_columns:
        raise DeltaFormatError(f"{name}: the segments do not add up to {plane_columns} columns")


def parse_record(data: np.ndarray, shape: tuple[int, int], name: str) -> tuple[Record, int]:
    """Parse and check the record at the start of `data`.

    Args:
        data: uint8, one-dimensional; more records may follow (stacks of matrices).
        shape: (rows, columns) of the base's matrix.
        name: the tensor's name, for messages.

    Returns:
        The record and its length in bytes.

    Raises:
        DeltaFormatError: if any number in the record is invalid.
    """
    if len(data) < HEADER_BYTES:
        raise DeltaFormatError(f"{name}: {len(data)} bytes are too few for a record")
    fields = _HEADER.unpack(data[:HEADER_BYTES].tobytes())
    _check_header(name, fields, shape, len(data))
    layout, _, segment_count, rows, columns, rank, mask_seed, scale, relative_error, length = fields
    plane_columns = rank if layout == FACTORED else rows
    cursor = Cursor(data[:length], name)
    cursor.at = HEADER_BYTES
    segments = [Segment(*_SEGMENT.unpack(chunk.tobytes())) for chunk in cursor.take("V8", segment_count)]
    _check_segments(name, segments, layout, plane_columns)
    sigma = cursor.take("<f2", rank)
    thresholds = [
        cursor.take("<u2", s.columns)
        if s.keep == KEEP_PER_COLUMN
        else np.repeat(cursor.take("<u2", 1) if s.keep == KEEP_SHARED else np.uint16(MAX_THRESHOLD), s.columns)
        for s in segments
    ]
    scales = [
        cursor.take("<f2", len(s.widths()) * s.columns).reshape(-1, s.columns) if s.scaled else None for s in segments
    ]
    if not all(np.isfinite(a).all() for a in [sigma, *(s for s in scales if s is not None)]):
        raise DeltaFormatError(f"{name}: a singular value or column scale is not finite")
    record = Record(
        layout=layout,
        rows=rows,
        columns=columns,
        rank=rank,
        mask_seed=mask_seed,
        scale=scale,
        relative_error=relative_error,
        segments=segments,
        sigma=sigma,
        thresholds=np.concatenate(thresholds) if thresholds else np.empty(0, np.uint16),
        column_scales=scales,
        codes=cursor.data[cursor.at :],
    )
    return record, length


def record_shape(data: np.ndarray, name: str) -> tuple[int, int]:
    """Return the (rows, columns) that the record at the start of `data` states, for reading it without its base."""
    if len(data) < HEADER_BYTES:
        raise DeltaFormatError(f"{name}: {len(data)} bytes are too few for a record")
    fields = _HEADER.unpack(data[:HEADER_BYTES].tobytes())
    return fields[3], fields[4]


def parse_stack(data: np.ndarray, name: str) -> list[Record]:
    """Parse all records of a tensor, with the shapes that they state."""
    records, at = [], 0
    while at < len(data):
        record, length = parse_record(data[at:], record_shape(data[at:], name), name)
        records.append(record)
        at += length
    return records
