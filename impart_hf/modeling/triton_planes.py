"""What the Triton kernels share: unpacking a tile of a plane in registers, and counting the entries that masks keep.

Triton is an optional import. Without it `available` is False, and nothing here may be called.
"""

from __future__ import annotations  # the annotations below name `tl`, which may not be there

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .delta_record import DeltaFormatError, Record
from .packed_tables import BLOCK, BRAIN, FIELDS, HALF, NORMAL, PackedTables, normal_levels
from .width_codes import BFLOAT16, FLOAT16

try:  # transformers wants every package to be installed that a reader file imports outside of `try`
    import triton
except ImportError:
    triton = None

available = triton is not None
tl: Any = triton.language if available else None
constexpr: Any = tl.constexpr if available else int


def jit(function: Callable | None = None, **options: Any) -> Any:
    """`triton.jit`; without Triton, kernels are plain functions that are never called."""
    if available:
        return triton.jit(function, **options)
    return jit if function is None else function


# Kernels may read global constants of this type only.
_BLOCK, _NORMAL, _HALF, _BRAIN = (constexpr(value) for value in (BLOCK, NORMAL, HALF, BRAIN))
_BYTE, _BIT, _BITS, _KIND, _KEY, _LIMIT, _PREFIX, _STEP, _SCALE, _SIGMA = (constexpr(i) for i in range(len(FIELDS)))
_KEEP_ALL = constexpr(0xFFFF)
_GOLDEN, _MULTIPLIER_1, _MULTIPLIER_2 = (constexpr(v) for v in (0x9E3779B9, 0x7FEB352D, 0x846CA68B))
PADDING = 512  # a tile of at most 256 rows is read as if there were no end: 16 bits a row
_COUNT_COLUMNS, _COUNT_BLOCKS = 4, 16  # a program counts 4 columns, 1024 entries of each at once
_CHECK_COLUMNS = 32

# transformers loads in four threads; neither Triton's compiler nor its interpreter says that it may run in several.
launching = threading.RLock()


def on_device(device: torch.device) -> AbstractContextManager:
    """Return the context to launch in: Triton launches on the current device, which every thread has its own of."""
    return nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


@jit
def _hash16(keys, rows):
    """The 16-bit numbers that decide whether entries are kept; uint32 keys (columns, 1), int32 rows (1, entries)."""
    x = keys + (rows.to(tl.uint32) >> 1) * _GOLDEN
    x = x ^ (x >> 16)
    x = x * _MULTIPLIER_1
    x = x ^ (x >> 15)
    x = x * _MULTIPLIER_2
    x = x ^ (x >> 16)
    return tl.where((rows & 1) == 1, x >> 16, x & 0xFFFF).to(tl.int32)


@jit
def column_field(table, stride, columns, inside, FIELD: tl.constexpr):
    """Integers of the column table, 0 for columns that are not `inside`."""
    return tl.load(table + FIELD * stride + columns, mask=inside, other=0)


@jit
def column_sigma(table, stride, columns, inside):
    return column_field(table, stride, columns, inside, _SIGMA).to(tl.float32, bitcast=True)


@jit
def unpack_tile(
    codes, table, stride, prefix, levels, columns, inside, first, height,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of a plane, float32 (COLUMNS, ROWS): stored values times column scales, zeros for dropped entries.

    Args:
        codes, table, prefix, levels: as in `PackedRecord`; `stride` is the number of columns in the table.
        columns, inside: int32 (COLUMNS,) numbers of columns in the table, and whether they exist.
        first: the tile's first row, a multiple of `BLOCK`.
        height: entries of a column.
        MASKED: False if no column has a mask.
    """
    rows = first + tl.arange(0, ROWS)
    bits = column_field(table, stride, columns, inside, _BITS)
    # Of the tile's entries, those before each one, and of the column's, those before the tile.
    within = tl.zeros([COLUMNS, ROWS], tl.int32) + tl.arange(0, ROWS)[None, :]
    before = tl.zeros([COLUMNS], tl.int32) + first
    kept = inside[:, None] & (rows < height)[None, :]
    if MASKED:
        limit = tl.load(table + _LIMIT * stride + columns, mask=inside, other=_KEEP_ALL)
        if tl.min(limit, 0) < _KEEP_ALL:
            key = column_field(table, stride, columns, inside, _KEY).to(tl.uint32, bitcast=True)
            kept = kept & (_hash16(key[:, None], rows[None, :]) <= limit[:, None])
            within = tl.cumsum(kept.to(tl.int32), 1) - kept.to(tl.int32)
            counts = prefix + column_field(table, stride, columns, inside, _PREFIX) + first // _BLOCK
            before = tl.where(limit < _KEEP_ALL, tl.load(counts, mask=inside & (limit < _KEEP_ALL), other=0), before)
    start = column_field(table, stride, columns, inside, _BYTE).to(tl.uint32, bitcast=True).to(tl.int64)
    bit = before.to(tl.int64) * bits + column_field(table, stride, columns, inside, _BIT)
    offset = (bit & 7).to(tl.int32)[:, None] + within * bits[:, None]
    address = codes + (start + (bit >> 3))[:, None] + (offset >> 3)
    shift = offset & 7
    # Where nothing is stored, whatever is near is read (`PADDING` bytes lie behind the codes) and then thrown away.
    low = tl.load(address).to(tl.int32)
    high = tl.load(address + 1).to(tl.int32)
    code = ((low | (high << 8)) >> shift) & ((1 << bits) - 1)[:, None]
    step = column_field(table, stride, columns, inside, _STEP).to(tl.float32, bitcast=True)
    value = code.to(tl.float32) * step[:, None] - 1.0
    kind = column_field(table, stride, columns, inside, _KIND)
    if tl.max(kind, 0) > 0:
        kinds = kind[:, None]
        level = tl.load(levels + (bits * 16)[:, None] + (code & 15))
        half = code.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        brain = (code << 16).to(tl.float32, bitcast=True)
        value = tl.where(kinds == _NORMAL, level, value)
        value = tl.where(kinds == _HALF, half, value)
        value = tl.where(kinds == _BRAIN, brain, value)
    scale = column_field(table, stride, columns, inside, _SCALE).to(tl.float32, bitcast=True)
    return tl.where(kept, value * scale[:, None], 0.0)


@jit
def is_finite(values):
    return tl.abs(values) <= 3.4028234663852886e38


@jit
def count_kernel(masks, prefix, kept, columns, most_steps, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr):
    """Write, for each masked column, the number of entries kept before each block, and of all entries kept."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    key = tl.load(masks + column, mask=inside, other=0).to(tl.uint32, bitcast=True)
    limit = tl.load(masks + columns + column, mask=inside, other=0)
    height = tl.load(masks + 2 * columns + column, mask=inside, other=0)
    start = tl.load(masks + 3 * columns + column, mask=inside, other=0)
    total = tl.zeros([COLUMNS], tl.int32)
    block = tl.arange(0, BLOCKS)
    for step in range(0, most_steps):
        rows = step * (BLOCKS * _BLOCK) + tl.arange(0, BLOCKS * _BLOCK)
        keep = (rows[None, :] < height[:, None]) & (_hash16(key[:, None], rows[None, :]) <= limit[:, None])
        counts = tl.sum(tl.reshape(keep.to(tl.int32), [COLUMNS, BLOCKS, _BLOCK]), 2)
        number = step * BLOCKS + block
        there = inside[:, None] & (number[None, :] * _BLOCK < height[:, None])
        before = total[:, None] + tl.cumsum(counts, 1) - counts
        tl.store(prefix + start[:, None] + number[None, :], before, mask=there)
        total += tl.sum(counts, 1)
    tl.store(kept + column, total, mask=inside)


@jit(do_not_specialize=["stride", "start", "columns", "height"])
def finite_kernel(
    bad, codes, table, prefix, levels, stride, start, columns, height,
    MASKED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Say if a value of the `columns` columns from `start` on is not finite: program (block of entries, columns)."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(0) * BLOCK
    values = unpack_tile(
        codes, table, stride, prefix, levels, start + column, column < columns, first, height, COLUMNS, BLOCK, MASKED
    )  # fmt: skip
    wrong = is_finite(values) == 0
    if tl.max(tl.max(wrong.to(tl.int32), 1), 0) > 0:
        tl.store(bad, 1)


@dataclass
class PackedRecord:
    """A record on a device, not decoded.

    Attributes:
        codes: uint8, the record's codes and `PADDING` bytes.
        table: int32 (fields, columns of both sides): `PackedTables.columns`.
        prefix: int32: for each masked column, how many entries are kept before each block of `BLOCK` entries.
    """

    codes: torch.Tensor
    table: torch.Tensor
    prefix: torch.Tensor

    @property
    def masked(self) -> bool:
        return len(self.prefix) > 0


@functools.lru_cache
def levels_on(device: torch.device) -> torch.Tensor:
    """Return `normal_levels` on a device."""
    return torch.from_numpy(normal_levels()).to(device)


def pack(record: Record, name: str, device: torch.device) -> PackedRecord:
    """Move a record to a device; the host waits for the device once if the record has masks, else not at all.

    Raises:
        DeltaFormatError: if there are not as many codes as kept entries.
    """
    tables = PackedTables(record)
    codes = torch.from_numpy(np.pad(record.codes, (0, PADDING))).to(device)
    prefix = torch.empty(tables.blocks, dtype=torch.int32, device=device)
    kept = np.empty(0, np.int32)
    columns = tables.masks.shape[1]
    if columns and tables.blocks:
        masks = torch.from_numpy(tables.masks).to(device)
        counts = torch.empty(columns, dtype=torch.int32, device=device)
        steps = -(-int(tables.masks[2].max()) // (_COUNT_BLOCKS * BLOCK))
        with launching, on_device(device):
            count_kernel[(-(-columns // _COUNT_COLUMNS),)](
                masks, prefix, counts, columns, steps, COLUMNS=_COUNT_COLUMNS, BLOCKS=_COUNT_BLOCKS
            )
        kept = counts.cpu().numpy()
    table = torch.from_numpy(tables.columns(kept, name)).to(device)
    return PackedRecord(codes, table, prefix)


def check_values(record: Record, packed: PackedRecord, name: str) -> None:
    """Raise a DeltaFormatError if a stored value, times its column scale, is not finite."""
    floats = {width for segment in record.segments for width in segment.widths()} & {FLOAT16, BFLOAT16}
    if not floats:  # a level times a finite column scale is finite
        return
    bad = torch.zeros(1, dtype=torch.int32, device=packed.codes.device)
    columns, levels = record.plane_columns, levels_on(packed.codes.device)
    with launching, on_device(packed.codes.device):
        for side in range(record.sides):
            height = record.plane_rows(side)
            if height:
                finite_kernel[(-(-height // BLOCK), -(-columns // _CHECK_COLUMNS))](
                    bad, packed.codes, packed.table, packed.prefix, levels, packed.table.shape[1], side * columns,
                    columns, height, MASKED=packed.masked, COLUMNS=_CHECK_COLUMNS, BLOCK=BLOCK,
                )  # fmt: skip
    if bad.item():
        raise DeltaFormatError(f"{name}: a stored value is not finite")
