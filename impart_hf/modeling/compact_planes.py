"""U and V of a record in few bytes, of which any rows can be read.

A dense U and V in float32 may take more memory than the matrix that they make. Columns without a mask stay packed.
Columns with a mask are spread out once, one or two bytes an entry, because finding their entries takes longest.
"""

from dataclasses import dataclass

import torch

from .checkpoints import all_finite
from .codebook import Codebook, Floats
from .delta_record import DeltaFormatError, Record
from .planes import StoredRun, stored_runs

# Entries that are unpacked at once: few enough for a core's cache on a CPU, enough to keep an accelerator busy.
PIECE_ENTRIES, DEVICE_PIECE_ENTRIES = 1 << 17, 1 << 25


@dataclass
class _Block:
    """Columns of a plane that are held alike.

    Attributes:
        columns, rows: the block's shape.
        book: what its numbers stand for.
        numbers: (columns, …): the packed codes of each column, uint8, or one number for each entry, in the codebook's
            compact form.
        packed: whether they are packed.
        scales: float32 (columns,), factors of the columns, or None.
    """

    columns: int
    rows: int
    book: Codebook
    numbers: torch.Tensor
    packed: bool
    scales: torch.Tensor | None

    def read(self, out: torch.Tensor, start: int) -> None:
        """Write the values of rows from `start` on to `out`, float32 (columns, rows wanted)."""
        step = max(1, (PIECE_ENTRIES if out.device.type == "cpu" else DEVICE_PIECE_ENTRIES) // max(1, out.shape[1]))
        for first in range(0, self.columns, step):
            piece = slice(first, first + step)
            values = self._values(self.numbers[piece], start, start + out.shape[1])
            if self.scales is None:
                out[piece] = values
            else:
                torch.mul(values, self.scales[piece, None], out=out[piece])

    def _values(self, numbers: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        if not self.packed:
            return self.book.expand(numbers[:, start:stop])
        low, high = start // 8 * 8, min(self.rows, -(-stop // 8) * 8)  # eight codes fill whole bytes
        own = numbers[:, low * self.book.bits // 8 : high * self.book.bits // 8]
        values = self.book.unpack(own, len(numbers) * (high - low))
        return values.view(len(numbers), -1)[:, start - low : stop - low]


class CompactPlane:
    """U or V.

    Attributes:
        columns, rows: its shape.
    """

    def __init__(self, columns: int, rows: int):
        self.columns, self.rows = columns, rows
        self._blocks: list[_Block] = []

    def append(self, run: StoredRun, name: str) -> None:
        """Take over the next columns.

        Raises:
            DeltaFormatError: if one is stored as floats that are not finite.
        """
        columns, rows, bits = run.columns, run.rows, run.book.bits
        if isinstance(run.book, Floats) and not all_finite(run.compact()):
            raise DeltaFormatError(f"{name}: a stored value is not finite")
        if run.positions is None and run.lead == 0 and rows * bits % 8 == 0:  # every column begins with a whole byte
            numbers = run.packed.view(columns, rows * bits // 8)
            self._blocks.append(_Block(columns, rows, run.book, numbers, True, run.scales))
            return
        kept = run.compact()
        if run.offset == 0:
            numbers = kept.new_zeros(run.total, rows)
            scales = None if run.scales is None else run.scales.new_empty(run.total)
            self._blocks.append(_Block(run.total, rows, run.book, numbers, False, scales))
        block, own = self._blocks[-1], slice(run.offset, run.offset + columns)
        if run.positions is None:
            block.numbers[own] = kept.view(columns, rows)
        else:
            block.numbers[own].view(-1).scatter_(0, run.positions, kept)
        if run.scales is not None and block.scales is not None:
            block.scales[own] = run.scales

    def spread_bytes(self) -> int:
        """Return the bytes of the columns that are not packed."""
        return sum(block.numbers.nbytes for block in self._blocks if not block.packed)

    def read(self, start: int, out: torch.Tensor) -> torch.Tensor:
        """Write rows from `start` on to `out`, float32 (columns, rows wanted), with zeros for dropped entries."""
        first = 0
        for block in self._blocks:
            block.read(out[first : first + block.columns], start)
            first += block.columns
        return out


def compact_planes(record: Record, name: str, device: torch.device | str = "cpu") -> tuple[CompactPlane, CompactPlane]:
    """Return U and V of a factored record; errors as for `decode_planes`."""
    planes = [CompactPlane(record.plane_columns, record.plane_rows(side)) for side in range(2)]
    most = PIECE_ENTRIES if torch.device(device).type == "cpu" else DEVICE_PIECE_ENTRIES
    for run in stored_runs(record, name, device, most):
        planes[run.side].append(run, name)
    return planes[0], planes[1]
