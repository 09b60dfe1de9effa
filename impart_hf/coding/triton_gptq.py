"""GPTQ's rounding of one block of columns in one Triton kernel.

Columns are rounded one after the other, and each one's error changes the later ones. In torch that is some launches a
column; here it is one a block. Triton is an optional import: without it, `rounds_on` is False.
"""

from __future__ import annotations  # the annotations below name `tl`, which may not be there

import functools
from dataclasses import dataclass

import torch
from transformers.utils import logging

from ..modeling.packed_tables import kernels_wanted
from ..modeling.triton_planes import available, constexpr, jit, launching, on_device, tl
from .stacked_levels import LAST_EVEN, MOST_LEVELS, width_tables

logger = logging.get_logger(__name__)

BLOCK = 128  # columns
_LAST_EVEN, _TABLE = constexpr(LAST_EVEN), constexpr(MOST_LEVELS)
# Added and subtracted again, it rounds float32 of at most 255 to whole numbers, halves to even ones, as torch does.
_ROUNDER = constexpr(12582912.0)


@jit(do_not_specialize=["columns", "rows", "all_columns"])
def round_kernel(
    left, codes, errors, order, ahead, share, kept, widths, tops, edges, levels, columns, rows, all_columns,
    BY_ROW: tl.constexpr, MASKED: tl.constexpr, NORMAL: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Round `columns` columns of `ROWS` rows; everything has one column after the other in memory.

    The second axis of the grid is that of the matrices of a stack, which follow each other in memory.

    Args:
        left: float32 (columns, rows), positions (`Levels.density`).
        codes: uint8 (all columns, rows); column j's are written to row `order[j]`.
        errors: float32 (columns, rows), written: (position - level) * share.
        order: int64 (columns,).
        ahead: float32 (columns, columns): row j times column j's error is subtracted from the later columns.
        share: float32 (columns,).
        kept: uint8 (columns, rows), 0 for dropped entries; not read unless MASKED.
        widths: int32, a width code for each row (BY_ROW) or each column.
        tops, edges, levels: `width_tables`.
        all_columns: of a matrix of `codes`.
        NORMAL: False if all levels are evenly spaced.
    """
    matrix = tl.program_id(1).to(tl.int64)
    left += matrix * columns * rows
    errors += matrix * columns * rows
    kept += matrix * columns * rows
    codes += matrix * all_columns * rows
    order += matrix * columns
    share += matrix * columns
    ahead += matrix * columns * columns
    widths += matrix * (rows if BY_ROW else columns)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    here = row < rows
    inside = (column < columns)[:, None] & here[None, :]
    x = tl.load(left + column[:, None] * rows + row[None, :], mask=inside, other=0.0)
    edge_number = tl.arange(0, _TABLE)[:, None]
    if BY_ROW:
        width = tl.load(widths + row, mask=here, other=1)
        top = tl.load(tops + width)
        if NORMAL:
            edge = tl.load(edges + width[None, :] * _TABLE + edge_number)
    for j in range(0, columns):
        value = tl.sum(tl.where(column[:, None] == j, x, 0.0), 0)
        if not BY_ROW:
            width = tl.load(widths + j)
            top = tl.load(tops + width)
            if NORMAL:
                edge = tl.load(edges + width * _TABLE + edge_number)
        code = tl.minimum(tl.maximum(value, 0.0), top)
        code = (code + _ROUNDER) - _ROUNDER
        level = code
        if NORMAL:
            above = tl.sum((value[None, :] > edge).to(tl.int32), 0)
            normal = width > _LAST_EVEN
            level = tl.where(normal, tl.load(levels + width * _TABLE + above), level)
            code = tl.where(normal, above.to(tl.float32), code)
        error = (value - level) * tl.load(share + j)
        if MASKED:
            keep = tl.load(kept + j * rows + row, mask=here, other=0) != 0
            error = tl.where(keep, error, 0.0)
            code = tl.where(keep, code, 0.0)
        tl.store(codes + tl.load(order + j) * rows + row, code.to(tl.int32).to(tl.uint8), mask=here)
        tl.store(errors + j * rows + row, error, mask=here)
        later = (column > j) & (column < columns)
        x = x - tl.load(ahead + j * columns + column, mask=later, other=0.0)[:, None] * error[None, :]


@dataclass(frozen=True)
class BlockRounder:
    """Rounds blocks of a matrix (rows, columns), of which everything here has one column after the other in memory.

    Of a stack of matrices, everything has one more axis in front.

    Attributes:
        codes: uint8 (columns, rows), written.
        order: int64 (columns,): where column j's codes are written.
        widths: int32, width codes of levels: of all rows if `by_row`, otherwise of the columns.
        uneven: whether a width code's levels are not evenly spaced.
        kept: bool (columns, rows), or None.
    """

    codes: torch.Tensor
    order: torch.Tensor
    widths: torch.Tensor
    by_row: bool
    uneven: bool
    kept: torch.Tensor | None

    def round(self, left: torch.Tensor, here: slice, share: torch.Tensor, ahead: torch.Tensor) -> torch.Tensor:
        """Round the columns `here`, at most `BLOCK`; return errors, (columns, rows): (position - level) * share.

        Args:
            left: float32 (columns, rows), contiguous, the positions of these columns alone.
            share: float32 (columns,), contiguous.
            ahead: float32 (columns, at least as many): row j times column j's error is subtracted from later columns.
        """
        columns, rows = left.shape[-2:]
        left = left.contiguous()  # a block of one matrix is; of a stack, the blocks of all come together
        errors = torch.empty_like(left)
        # The interpreter takes as long for many rows as for few; in a warp, no step waits for other warps.
        tile = 256 if left.device.type == "cpu" else 8
        kept = left if self.kept is None else self.kept[..., here, :].contiguous().view(torch.uint8)
        widths = self.widths if self.by_row else self.widths[..., here].contiguous()
        with launching, on_device(left.device):
            round_kernel[(-(-rows // tile), left[..., 0, 0].numel())](
                left, self.codes, errors, self.order[..., here].contiguous(), ahead[..., :columns].contiguous(),
                share.contiguous(), kept, widths, *width_tables(left.device), columns, rows, self.codes.shape[-2],
                BY_ROW=self.by_row, MASKED=self.kept is not None, NORMAL=self.uneven, COLUMNS=BLOCK, ROWS=tile,
                num_warps=1,
            )  # fmt: skip
        return errors


def rounds_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel is to be used for matrices of a dtype on a device."""
    return available and dtype == torch.float32 and kernels_wanted(device) and _works_on(device)


@functools.lru_cache
def _works_on(device: torch.device) -> bool:
    """Return whether the kernel rounds a few columns as it should: a compiler may be missing."""
    rows, columns = 3, 2
    expected = torch.tensor([[2, 3, 0], [0, 3, 1]], dtype=torch.uint8)
    try:
        positions = torch.tensor([[1.6, 7.0, -0.5], [0.8, 1.9, 1.9]], device=device)
        codes = torch.zeros(columns, rows, dtype=torch.uint8, device=device)
        order, widths = torch.arange(columns, device=device), torch.full((columns,), 2, dtype=torch.int32).to(device)
        ahead = torch.tensor([[0.0, -1.0], [0.0, 0.0]], device=device)
        rounder = BlockRounder(codes, order, widths, False, False, None)
        rounder.round(positions, slice(0, columns), torch.ones(columns, device=device), ahead)
        trouble = "" if torch.equal(codes.cpu(), expected) else f"the codes are {codes.cpu().tolist()}"
    except Exception as error:  # whatever a compiler, a driver or a launch may raise
        trouble = str(error)
    if trouble:
        logger.warning(f"GPTQ's Triton kernel does not work on {device}, and torch rounds instead: {trouble}")
    return not trouble
