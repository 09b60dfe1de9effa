"""Decoding on load in Triton kernels: unpack U and V, multiply, add the base, round, store. Sums are float32.

There are two ways for a factored record. Fused, one kernel unpacks a tile of U and V where it multiplies them, so that
nothing is stored in between, but every tile of U is unpacked again for each tile of columns. Otherwise one kernel
unpacks panels of U and V to float32, and a second one multiplies them, with half as many instructions.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from transformers.utils import logging

from .delta_decode import decode_record
from .delta_record import FACTORED, KEEP_ALL, KEEP_PER_COLUMN, Record, Segment
from .seeded_mask import keep_mask
from .triton_planes import (
    PackedRecord,
    available,
    column_sigma,
    is_finite,
    jit,
    launching,
    levels_on,
    on_device,
    pack,
    tl,
    unpack_tile,
)
from .width_codes import FLOAT16, packed_bytes

logger = logging.get_logger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of bases and results
# Fixed sizes: trying out others would take longer than decoding a model. The tile of a factored delta has _SIDE rows
# and columns and is summed over _COMPONENTS at once; that of a direct one has _DIRECT_ROWS rows.
_SIDE, _COMPONENTS, _DIRECT_ROWS, _WARPS = 128, 32, 16, 8
_MOST_PANEL = 16384


@jit
def _finish(base, out, bad, delta, rows, columns, m, n):
    """Store a tile, base + delta, and say if a number of it is not finite in its dtype where the base's is."""
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    offset = rows.to(tl.int64)[:, None] * n + columns[None, :]
    before = tl.load(base + offset, mask=inside, other=0.0).to(tl.float32)
    result = (before + delta).to(out.dtype.element_ty)
    tl.store(out + offset, result, mask=inside)
    wrong = inside & is_finite(before) & (is_finite(result.to(tl.float32)) == 0)
    if tl.max(tl.max(wrong.to(tl.int32), 1), 0) > 0:
        tl.store(bad, 1)


@jit(do_not_specialize=["m", "rank", "stride"])
def fused_kernel(
    base, out, bad, codes, table, prefix, levels, stride, m, n, rank,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, SIDE: tl.constexpr, COMPONENTS: tl.constexpr,
):  # fmt: skip
    """base + U diag(sigma) V^T, tiles of U and V being unpacked where they are multiplied."""
    first_row = tl.program_id(0) * SIDE
    first_column = tl.program_id(1) * SIDE
    delta = tl.zeros([SIDE, SIDE], tl.float32)
    for start in range(0, rank, COMPONENTS):
        component = start + tl.arange(0, COMPONENTS)
        inside = component < rank
        u = unpack_tile(
            codes, table, stride, prefix, levels, component, inside, first_row, m, COMPONENTS, SIDE, MASKED
        )  # fmt: skip
        v = unpack_tile(
            codes, table, stride, prefix, levels, rank + component, inside, first_column, n, COMPONENTS, SIDE, MASKED
        )  # fmt: skip
        u = u * column_sigma(table, stride, component, inside)[:, None]
        delta = tl.dot(tl.trans(u), v, delta, input_precision=PRECISION)
    _finish(base, out, bad, delta, first_row + tl.arange(0, SIDE), first_column + tl.arange(0, SIDE), m, n)


@jit(do_not_specialize=["stride", "start", "rank", "first", "height"])
def unpack_kernel(
    plane, codes, table, prefix, levels, stride, start, rank, first, height, width,
    MASKED: tl.constexpr, LEFT: tl.constexpr, SIDE: tl.constexpr, COMPONENTS: tl.constexpr,
):  # fmt: skip
    """Write `width` entries, from `first` on, of a plane's columns to float32 (rank, width); U's (LEFT) times sigma."""
    at = tl.program_id(0) * SIDE
    component = tl.program_id(1) * COMPONENTS + tl.arange(0, COMPONENTS)
    inside = component < rank
    values = unpack_tile(
        codes, table, stride, prefix, levels, start + component, inside, first + at, height, COMPONENTS, SIDE, MASKED
    )  # fmt: skip
    if LEFT:
        values = values * column_sigma(table, stride, component, inside)[:, None]
    offset = component.to(tl.int64)[:, None] * width + (at + tl.arange(0, SIDE))[None, :]
    tl.store(plane + offset, values, mask=inside[:, None])


@jit(do_not_specialize=["m", "rank", "first_row", "first_column"])
def product_kernel(
    base, out, bad, left, right, m, n, rank, first_row, first_column, high, wide,
    PRECISION: tl.constexpr, SIDE: tl.constexpr, COMPONENTS: tl.constexpr,
):  # fmt: skip
    """base + left^T right, from a row and column on; left is float32 (rank, high), right (rank, wide)."""
    row = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    delta = tl.zeros([SIDE, SIDE], tl.float32)
    for start in range(0, rank, COMPONENTS):
        component = start + tl.arange(0, COMPONENTS)
        inside = (component < rank)[:, None]
        u = tl.load(left + component[:, None] * high + row[None, :], mask=inside, other=0.0)
        v = tl.load(right + component[:, None] * wide + column[None, :], mask=inside, other=0.0)
        delta = tl.dot(tl.trans(u), v, delta, input_precision=PRECISION)
    _finish(base, out, bad, delta, first_row + row, first_column + column, m, n)


@jit(do_not_specialize=["m", "stride"])
def direct_kernel(
    base, out, bad, codes, table, prefix, levels, stride, m, n,
    MASKED: tl.constexpr, ROWS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(1) * SIDE
    inside = row < m
    p = unpack_tile(codes, table, stride, prefix, levels, row, inside, first_column, n, ROWS, SIDE, MASKED)
    delta = p * column_sigma(table, stride, row, inside)[:, None]
    _finish(base, out, bad, delta, row, first_column + tl.arange(0, SIDE), m, n)


def default_precision(device: torch.device) -> str:
    """Return how products are made: float32's error from three products on tensor cores, or plain float32."""
    return "tf32x3" if device.type == "cuda" and torch.version.hip is None else "ieee"


def panel_size(m: int, n: int, rank: int) -> tuple[int, int]:
    """Return the rows and columns, multiples of the tile's, of which U and V are unpacked at once.

    What is unpacked takes at most a fifth of the matrix in float32, or 16 MB, where panels of 1024 rows allow it.
    """
    sizes = [-(-min(size, _MOST_PANEL) // _SIDE) * _SIDE for size in (m, n)]
    while rank * sum(sizes) > max(m * n // 5, 1 << 22) and max(sizes) > 1024:
        larger = sizes.index(max(sizes))
        sizes[larger] = -(-sizes[larger] // (2 * _SIDE)) * _SIDE
    return sizes[0], sizes[1]


def _launch_factored(
    base: torch.Tensor, out: torch.Tensor, bad: torch.Tensor, rank: int, packed: PackedRecord, precision: str
) -> None:
    m, n = base.shape
    sizes = panel_size(m, n, rank)
    planes = [torch.empty(rank, size, dtype=torch.float32, device=base.device) for size in sizes]

    def unpack(side: int, first: int) -> None:
        # Tiles behind a column's end would read behind the codes.
        tiles = -(-min(sizes[side], base.shape[side] - first) // _SIDE)
        unpack_kernel[(tiles, -(-rank // _COMPONENTS))](
            planes[side], packed.codes, packed.table, packed.prefix, levels_on(base.device), packed.table.shape[1],
            side * rank, rank, first, base.shape[side], sizes[side],
            MASKED=packed.masked, LEFT=side == 0, SIDE=_SIDE, COMPONENTS=_COMPONENTS,
        )  # fmt: skip

    for row in range(0, m, sizes[0]):
        if rank:
            unpack(0, row)
        for column in range(0, n, sizes[1]):
            if rank and (row == 0 or sizes[1] < n):
                unpack(1, column)
            rows, columns = min(sizes[0], m - row), min(sizes[1], n - column)
            product_kernel[(-(-rows // _SIDE), -(-columns // _SIDE))](
                base, out, bad, *planes, m, n, rank, row, column, *sizes,
                PRECISION=precision, SIDE=_SIDE, COMPONENTS=_COMPONENTS, num_warps=_WARPS,
            )  # fmt: skip


def launch(
    base: torch.Tensor,
    out: torch.Tensor,
    bad: torch.Tensor,
    record: Record,
    packed: PackedRecord,
    precision: str,
    fused: bool,
) -> None:
    """Write base + delta to `out`, and 1 to `bad` if a number of it is not finite where the base's is.

    Args:
        base, out: (m, n), contiguous, of dtypes in `DTYPES`; they may be the same tensor.
        bad: int32 (1,).
        packed: the record on their device.
        precision: `input_precision` of `tl.dot`.
        fused: which way a factored record is decoded.
    """
    m, n = base.shape
    with launching, on_device(base.device):
        if record.layout == FACTORED and fused:
            fused_kernel[(-(-m // _SIDE), -(-n // _SIDE))](
                base, out, bad, packed.codes, packed.table, packed.prefix, levels_on(base.device),
                packed.table.shape[1], m, n, record.rank, MASKED=packed.masked, PRECISION=precision,
                SIDE=_SIDE, COMPONENTS=_COMPONENTS, num_warps=_WARPS,
            )  # fmt: skip
        elif record.layout == FACTORED:
            _launch_factored(base, out, bad, record.rank, packed, precision)
        else:
            direct_kernel[(-(-m // _DIRECT_ROWS), -(-n // _SIDE))](
                base, out, bad, packed.codes, packed.table, packed.prefix, levels_on(base.device),
                packed.table.shape[1], m, n, MASKED=packed.masked, ROWS=_DIRECT_ROWS, SIDE=_SIDE,
            )  # fmt: skip


class Decoder:
    """Adds the records of one tensor to its base with kernels.

    Ask `finite` once, after the last record: whether all results are finite where the base is.

    Args:
        precision: how products are made, `input_precision` of `tl.dot`; None for `default_precision`.
        fused: which way factored records are decoded.
    """

    def __init__(self, device: torch.device, precision: str | None = None, fused: bool = False):
        self._fused = fused
        self._bad = torch.zeros(1, dtype=torch.int32, device=device)
        self._precision = precision or default_precision(device)

    def add_record(self, out: torch.Tensor, base: torch.Tensor, record: Record, name: str) -> None:
        """Write base + delta, (m, n), to `out`, which is contiguous.

        Raises:
            DeltaFormatError: if there are not as many codes as kept entries.
        """
        packed = pack(record, name, base.device)
        launch(base.contiguous(), out, self._bad, record, packed, self._precision, self._fused)

    def finite(self) -> bool:
        return not self._bad.item()


def decoder_for(base: torch.Tensor, dtype: torch.dtype) -> Decoder | None:
    """Return a decoder for a tensor and its fine-tuned dtype, or None if torch must do it."""
    if not available or base.numel() == 0 or base.dtype not in DTYPES or dtype not in DTYPES:
        return None
    return Decoder(base.device) if works_on(base.device) else None


def _small_record() -> Record:
    """A record with levels, floats and masks, whose codes are finite as floats."""
    m, n, seed, limits = 130, 70, 7, np.array([0xFFFF, 0x7FFF, 0x3FFF], np.uint16)
    kept = [keep_mask(seed, side, limits, size).sum(1).tolist() for side, size in enumerate((m, n))]
    segments = [Segment(1, 3, 36, KEEP_ALL), Segment(2, FLOAT16, 5, KEEP_PER_COLUMN)]
    sizes = [(kept[0][0], 3), (kept[1][0], 36), (sum(kept[0][1:]), FLOAT16), (sum(kept[1][1:]), 5)]
    size = sum(packed_bytes(width, count) for count, width in sizes)
    codes = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8) & np.uint8(0x3B)
    sigma = np.array([1, 2, 0.5], np.float16)
    return Record(FACTORED, m, n, 3, seed, 0.5, 0.0, segments, sigma, limits, [None, None], codes)


@functools.lru_cache
def works_on(device: torch.device) -> bool:
    """Return whether a small record decodes as it should: the device may be too old, or a compiler be missing."""
    record = _small_record()
    try:
        decoder = Decoder(device)
        out = torch.zeros(record.rows, record.columns, device=device)
        decoder.add_record(out, out, record, "small record")
        difference = (out.cpu() - decode_record(record, "small record")).abs().max().item()
        trouble = "" if decoder.finite() and difference < 1e-4 else f"they are wrong by {difference}"
    except Exception as error:  # whatever a compiler, a driver or a launch may raise
        trouble = str(error)
    if trouble:
        logger.warning(f"The Triton kernels do not work on {device}, and torch decodes instead: {trouble}")
    return not trouble
