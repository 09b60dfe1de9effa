"""From a record's bytes to the delta it stands for: unpacking, planes, and the product U diag(sigma) V^T.

All arithmetic is float32. The product is a dense one though most entries of U and V are zeros: a sparse product's
multiply-adds cost 15 to 30 times as much, which pays only where fewer than about 4 % are kept
(scripts/benchmark_load.py prints the factor).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .checkpoints import all_finite
from .delta_record import (
    BFLOAT16,
    FACTORED,
    FLOAT16,
    NORMAL_LEVELS,
    DeltaFormatError,
    Record,
    code_bits,
    code_bytes,
    parse_record,
)
from .seeded_mask import keep_mask

# Rows of a matrix that are decoded and added to the base at once on a CPU. A whole matrix in float32 would take as long
# to be allocated as to be computed, and needs the memory; with fewer rows the product becomes slower.
_TILE_ROWS = 128


@dataclass
class Plane:
    """The kept entries of U, V or a direct plane, column by column, rows ascending within a column.

    Attributes:
        columns, rows: the plane's shape; column c holds `rows` entries when nothing is dropped.
        positions: int64, shape (kept,): column * rows + row of every kept entry.
        values: float32, shape (kept,).
    """

    columns: int
    rows: int
    positions: torch.Tensor
    values: torch.Tensor

    def dense(self) -> torch.Tensor:
        """float32, shape (columns, rows), zeros where entries were dropped; the values' own memory if none were."""
        if len(self.values) == self.columns * self.rows:
            return self.values.view(self.columns, self.rows)
        out = torch.zeros(self.columns * self.rows, dtype=torch.float32, device=self.values.device)
        out[self.positions] = self.values
        return out.view(self.columns, self.rows)

    def select(self, columns: slice) -> "Plane":
        """The plane of a contiguous range of columns."""
        start, stop, _ = columns.indices(self.columns)
        bounds = torch.tensor([start * self.rows, stop * self.rows], device=self.positions.device)
        first, last = torch.searchsorted(self.positions, bounds).tolist()
        return Plane(stop - start, self.rows, self.positions[first:last] - start * self.rows, self.values[first:last])


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
    packed: torch.Tensor, width: int, per_column: torch.Tensor, scales: np.ndarray | None
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
    return values * torch.from_numpy(scales.astype(np.float32)).to(packed.device).repeat_interleave(per_column)


def decode_planes(record: Record, name: str, device: torch.device | str = "cpu") -> list[Plane]:
    """The planes of a record: [U, V] of a factored one, [P] of a direct one, on `device`.

    Raises:
        DeltaFormatError: if the codes are not exactly as many as the masks keep, or a value is not finite.
    """
    positions, counts = [], []
    for side in range(record.sides):
        rows = record.plane_rows(side)
        kept = keep_mask(record.mask_seed, side, record.thresholds, rows, device).view(-1).nonzero().view(-1)
        # Much faster than summing the mask
        ends = torch.searchsorted(kept, rows * torch.arange(record.plane_columns + 1, device=device))
        positions.append(kept)
        counts.append(ends.diff())
    codes = torch.from_numpy(np.array(record.codes)).to(device)
    parts: list[list[torch.Tensor]] = [[] for _ in positions]
    at, column = 0, 0
    for segment, scales in zip(record.segments, record.column_scales, strict=True):
        for side in range(record.sides):
            width = segment.widths()[side]
            per_column = counts[side][column : column + segment.columns]
            size = code_bytes(int(per_column.sum()), width)
            if at + size > len(codes):
                raise DeltaFormatError(f"{name}: {len(codes)} bytes of codes are fewer than the masks keep")
            side_scales = None if scales is None else scales[side]
            parts[side].append(_segment_values(codes[at : at + size], width, per_column, side_scales))
            at += size
        column += segment.columns
    if at != len(codes):
        raise DeltaFormatError(f"{name}: {len(codes)} bytes of codes are more than the masks keep ({at})")
    planes = []
    for side, (kept, values) in enumerate(zip(positions, parts, strict=True)):
        joined = torch.cat(values) if values else torch.empty(0, device=device)
        if not all_finite(joined):
            raise DeltaFormatError(f"{name}: a stored value is not finite")
        planes.append(Plane(record.plane_columns, record.plane_rows(side), kept, joined))
    return planes


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
