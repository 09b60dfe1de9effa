"""Multiplying a batch by packed deltas in Triton kernels: y += ((x V) sigma) U^T, no plane being made dense.

The rows of a batch belong to different deltas, of different ranks, widths and masks. Rows of one delta lie together in
an order that `packed_deltas.RowGroups` holds, so that a tile of a plane is unpacked once for up to 16 or 64 of them.
For a batch of more than `MOST_ROWS` rows the planes of one delta after the other are unpacked, and torch multiplies.
Sums are float32 and in an order that depends only on the shapes and on the number of rows.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from .delta_record import DIRECT, Record
from .packed_tables import BLOCK
from .precision import full_float32
from .triton_decode import default_precision, unpack_kernel, works_on
from .triton_planes import (
    available,
    check_values,
    column_sigma,
    jit,
    launching,
    levels_on,
    on_device,
    pack,
    tl,
    unpack_tile,
)

MOST_ROWS = 1024  # of prompts, not of generation; unpacking for each 64 rows would take longer than multiplying

# Fixed sizes: rows of a batch, entries and columns of a plane that a program takes at once, and the programs that a
# launch should have at least for a device to be busy.
_FEW_ROWS, _MANY_ROWS, _COLUMNS, _ENOUGH_PROGRAMS, _MOST_PARTS = 16, 64, 32, 256, 16


@jit
def _times_columns(
    x, order, first, last, codes, table, prefix, levels, stride, columns, inside, n, from_block, to_block,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Inputs (ROWS, n) times columns of a plane, over a range of blocks of the n entries: float32 (ROWS, COLUMNS)."""
    slot = first + tl.arange(0, ROWS)
    live = slot < last
    row = tl.load(order + slot, mask=live, other=0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for block in range(from_block, to_block):
        entry = block * BLOCK + tl.arange(0, BLOCK)
        given = live[:, None] & (entry < n)[None, :]
        inputs = tl.load(x + row[:, None] * n + entry[None, :], mask=given, other=0.0).to(tl.float32)
        v = unpack_tile(
            codes, table, stride, prefix, levels, columns, inside, block * BLOCK, n, COLUMNS, BLOCK, MASKED
        )  # fmt: skip
        total = tl.dot(inputs, tl.trans(v), total, input_precision=PRECISION)
    return total


@jit
def _add_to_rows(y, row, column, values, live, inside, m):
    """Add float32 values to rows of the outputs, which are rounded once."""
    at = y + row[:, None] * m + column[None, :]
    there = live[:, None] & inside[None, :]
    before = tl.load(at, mask=there, other=0.0).to(tl.float32)
    tl.store(at, (before + values).to(y.dtype.element_ty), mask=there)


@jit(do_not_specialize=["stride", "count", "batch", "most", "blocks"])
def shrink_kernel(
    hidden, x, order, bounds, deltas, codes, table, prefix, levels, stride, count, batch, most, n, blocks,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x V, in parts: program (delta, columns, part) sums `blocks` blocks of the n entries."""
    delta, part = tl.program_id(0), tl.program_id(2)
    rank = tl.load(deltas + delta).to(tl.int32)
    component = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = component < rank
    first, last = tl.load(bounds + delta), tl.load(bounds + delta + 1)
    last = tl.where(tl.program_id(1) * COLUMNS < rank, last, first)
    codes += tl.load(deltas + 2 * count + delta)
    table += tl.load(deltas + 3 * count + delta)
    prefix += tl.load(deltas + 4 * count + delta)
    to_block = tl.minimum((part + 1) * blocks, tl.cdiv(n, BLOCK))
    for at in range(first, last, ROWS):
        total = _times_columns(
            x, order, at, last, codes, table, prefix, levels, stride, rank + component, inside, n, part * blocks,
            to_block, MASKED, PRECISION, ROWS, COLUMNS, BLOCK,
        )  # fmt: skip
        slot = at + tl.arange(0, ROWS)
        line = part.to(tl.int64) * batch + slot
        tl.store(
            hidden + line[:, None] * most + component[None, :], total, mask=(slot < last)[:, None] & inside[None, :]
        )


@jit(do_not_specialize=["stride", "count", "batch", "most", "parts"])
def expand_kernel(
    y, hidden, order, bounds, deltas, codes, table, prefix, levels, stride, count, batch, most, parts, m,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y += (hidden sigma) U^T: program (delta, block of the m entries)."""
    delta = tl.program_id(0)
    rank = tl.load(deltas + delta).to(tl.int32)
    first, last = tl.load(bounds + delta), tl.load(bounds + delta + 1)
    last = tl.where(rank > 0, last, first)
    codes += tl.load(deltas + 2 * count + delta)
    table += tl.load(deltas + 3 * count + delta)
    prefix += tl.load(deltas + 4 * count + delta)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for at in range(first, last, ROWS):
        slot = at + tl.arange(0, ROWS)
        live = slot < last
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, rank, COLUMNS):
            component = start + tl.arange(0, COLUMNS)
            inside = component < rank
            values = tl.zeros([ROWS, COLUMNS], tl.float32)
            for part in range(0, parts):
                line = slot.to(tl.int64) + part * batch
                there = live[:, None] & inside[None, :]
                values += tl.load(hidden + line[:, None] * most + component[None, :], mask=there, other=0.0)
            values = values * column_sigma(table, stride, component, inside)[None, :]
            u = unpack_tile(
                codes, table, stride, prefix, levels, component, inside, tl.program_id(1) * BLOCK, m, COLUMNS, BLOCK,
                MASKED,
            )  # fmt: skip
            total = tl.dot(values, u, total, input_precision=PRECISION)
        row = tl.load(order + slot, mask=live, other=0)
        _add_to_rows(y, row, entry, total, live, entry < m, m)


@jit(do_not_specialize=["stride", "count"])
def direct_kernel(
    y, x, order, bounds, deltas, codes, table, prefix, levels, stride, count, m, n,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y += scale x P of direct deltas, a column of P being a row of the matrix: program (delta, columns)."""
    delta = tl.program_id(0)
    here = tl.load(deltas + count + delta).to(tl.int32)  # m, or 0 if the delta is factored
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < here
    first, last = tl.load(bounds + delta), tl.load(bounds + delta + 1)
    last = tl.where(here > 0, last, first)
    codes += tl.load(deltas + 2 * count + delta)
    table += tl.load(deltas + 3 * count + delta)
    prefix += tl.load(deltas + 4 * count + delta)
    for at in range(first, last, ROWS):
        total = _times_columns(
            x, order, at, last, codes, table, prefix, levels, stride, column, inside, n, 0, tl.cdiv(n, BLOCK),
            MASKED, PRECISION, ROWS, COLUMNS, BLOCK,
        )  # fmt: skip
        total = total * column_sigma(table, stride, column, inside)[None, :]
        slot = at + tl.arange(0, ROWS)
        row = tl.load(order + slot, mask=slot < last, other=0)
        _add_to_rows(y, row, column, total, slot < last, inside, m)


class AppliedDeltas:
    """Packed deltas of one matrix on a device, their tables one behind the other.

    Args:
        records: of one shape (m, n); at least one.
        name: the tensor's name, for messages.

    Raises:
        DeltaFormatError: if there are not as many codes as kept entries, or a stored value is not finite.
    """

    def __init__(self, records: list[Record], name: str, device: torch.device, precision: str | None = None):
        packed = [pack(record, name, device) for record in records]
        for record, one in zip(records, packed, strict=True):
            check_values(record, one, name)
        self.device, self._precision = device, precision or default_precision(device)
        self.rows, self.columns = records[0].rows, records[0].columns
        self._most = max(record.rank for record in records)
        self._direct = any(record.layout == DIRECT for record in records)
        sizes = np.array([[len(one.codes), one.table.shape[1], len(one.prefix)] for one in packed], np.int64)
        starts = np.cumsum(sizes, 0) - sizes
        ranks = [record.rank for record in records]
        direct_rows = [record.rows if record.layout == DIRECT else 0 for record in records]
        self._deltas = torch.from_numpy(np.stack([np.array(ranks), np.array(direct_rows), *starts.T])).to(device)
        self._codes = torch.cat([one.codes for one in packed])
        self._table = torch.cat([one.table for one in packed], 1).contiguous()
        self._layout = list(zip(ranks, direct_rows, *starts.T.tolist(), strict=True))
        self._prefix = torch.cat([one.prefix for one in packed])

    def add_to(self, outputs: torch.Tensor, inputs: torch.Tensor, order: torch.Tensor, bounds: torch.Tensor) -> None:
        """Add to outputs (rows, m) what the deltas make of inputs (rows, n); both are contiguous.

        Args:
            order, bounds: int64 (rows,) and int32 (deltas + 1,): rows order[bounds[d]] to order[bounds[d + 1] - 1]
                belong to delta d.
        """
        if len(inputs) > MOST_ROWS:
            return self._add_unpacked(outputs, inputs, order, bounds.tolist())
        batch, count = len(inputs), self._deltas.shape[1]
        (m, n), most, stride = (self.rows, self.columns), self._most, self._table.shape[1]
        groups = (order, bounds, self._deltas, self._codes, self._table, self._prefix, levels_on(self.device), stride)
        options = {
            "MASKED": len(self._prefix) > 0,
            "PRECISION": self._precision,
            "ROWS": _FEW_ROWS if batch <= _MANY_ROWS * min(count, batch) else _MANY_ROWS,
            "COLUMNS": _COLUMNS,
            "BLOCK": BLOCK,
        }
        with launching, on_device(self.device):
            if most:
                blocks = -(-n // BLOCK)
                across = -(-most // _COLUMNS)
                parts = max(1, min(blocks, _MOST_PARTS, _ENOUGH_PROGRAMS // (across * min(count, batch))))
                blocks_each = -(-blocks // parts)
                hidden = torch.empty(parts, batch, most, dtype=torch.float32, device=self.device)
                shrink_kernel[(count, across, parts)](
                    hidden, inputs, *groups, count, batch, most, n, blocks_each, **options
                )
                expand_kernel[(count, -(-m // BLOCK))](
                    outputs, hidden, *groups, count, batch, most, parts, m, **options
                )
            if self._direct:
                direct_kernel[(count, -(-m // _COLUMNS))](outputs, inputs, *groups, count, m, n, **options)

    @full_float32()
    def _add_unpacked(
        self, outputs: torch.Tensor, inputs: torch.Tensor, order: torch.Tensor, bounds: list[int]
    ) -> None:
        for number, (first, last) in enumerate(pairwise(bounds)):
            if first == last:
                continue
            rows = order[first:last]
            hidden = inputs[rows].float()
            rank, direct_rows, *_ = self._layout[number]
            if direct_rows:
                change = hidden @ self._plane(number, 0, direct_rows, self.columns).t()
            else:
                change = (hidden @ self._plane(number, 1, rank, self.columns).t()) @ self._plane(
                    number, 0, rank, self.rows
                )
            outputs[rows] = (outputs[rows] + change).to(outputs.dtype)

    def _plane(self, number: int, side: int, count: int, height: int) -> torch.Tensor:
        """Return one delta's V, or U times sigma, or direct plane times scale: float32 (count, height)."""
        _, _, codes, column, prefix = self._layout[number]
        width = -(-height // BLOCK) * BLOCK
        plane = torch.empty(count, width, dtype=torch.float32, device=self.device)
        if count:
            with launching, on_device(self.device):
                unpack_kernel[(width // BLOCK, -(-count // _COLUMNS))](
                    plane, self._codes[codes:], self._table.view(-1)[column:], self._prefix[prefix:],
                    levels_on(self.device), self._table.shape[1], side * count, count, 0, height, width,
                    MASKED=len(self._prefix) > 0, LEFT=side == 0, SIDE=BLOCK, COMPONENTS=_COLUMNS,
                )  # fmt: skip
        return plane[:, :height]


def applied_deltas(records: list[Record], name: str, device: torch.device) -> AppliedDeltas | None:
    """Return the deltas on a device, or None if kernels do not run there."""
    return AppliedDeltas(records, name, device) if available and works_on(device) else None
