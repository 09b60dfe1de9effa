"""Codebooks: how one value of a plane is stored (docs/FORMAT.md, "Codes").

A width code names a codebook. A codebook packs values into bytes, unpacks them, and rounds values as packing and
unpacking would. Width codes 16 and 17 are 16-bit floats; 1 to 8 are levels of that many bits, evenly spaced from -1
to 1; 34 to 36 are the levels of 2 to 4 bits with the least squared error for normally distributed values of variance 1
(Lloyd and Max).
"""

import abc
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from .checksums import tensor_bytes
from .width_codes import BFLOAT16, BITS, FLOAT16, NORMAL_LEVELS, packed_bytes


class Codebook(abc.ABC):
    """How a value is stored under one width code.

    Attributes:
        width: the width code.
        bits: bits of one code.
    """

    def __init__(self, width: int):
        self.width, self.bits = width, BITS[width]

    def packed_bytes(self, count: int) -> int:
        """Return the bytes that `count` codes take, packed densely and padded to whole bytes at the end."""
        return packed_bytes(self.width, count)

    @abc.abstractmethod
    def pack(self, values: torch.Tensor) -> np.ndarray:
        """Return the packed codes, uint8, of the stored values nearest to `values`, float32 (count,)."""

    @abc.abstractmethod
    def unpack(self, packed: torch.Tensor, count: int) -> torch.Tensor:
        """Return the values, float32 (count,), of packed codes, uint8 of any shape, on the device of the codes."""

    @abc.abstractmethod
    def compact(self, packed: torch.Tensor, count: int) -> torch.Tensor:
        """Return `count` packed codes as numbers of 8 or 16 bits, of which 0 stands for the value 0."""

    @abc.abstractmethod
    def expand(self, compact: torch.Tensor) -> torch.Tensor:
        """Return the values, float32, of numbers of any shape that `compact` made, and of zeros between them."""

    @abc.abstractmethod
    def round(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of any shape, float32, rounded to stored values."""


class Floats(Codebook):
    """Values stored as 16-bit floats."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__(width)
        self.dtype = dtype

    def pack(self, values: torch.Tensor) -> np.ndarray:
        return tensor_bytes(values.to(self.dtype))

    def unpack(self, packed: torch.Tensor, count: int) -> torch.Tensor:
        return self.compact(packed, count).float()

    def compact(self, packed: torch.Tensor, count: int) -> torch.Tensor:
        # The copy is aligned for 16-bit loads. It is contiguous because numpy gives an empty array the stride 0.
        aligned = packed.clone(memory_format=torch.contiguous_format).view(-1)
        return aligned.view(self.dtype)[:count]

    def expand(self, compact: torch.Tensor) -> torch.Tensor:
        return compact.float()

    def round(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.dtype).float()


class Levels(Codebook):
    """Values stored as the code of the nearest of 2^bits levels in rising order.

    Attributes:
        top: the largest code.
        density, zero: values are rounded by their positions, position = value * density + zero. The positions of
            evenly spaced levels are the whole numbers from 0 to `top`.
    """

    density, zero = 1.0, 0.0

    def __init__(self, width: int):
        super().__init__(width)
        self.top = (1 << self.bits) - 1
        self._tables: dict[tuple[str, torch.device, torch.dtype], torch.Tensor] = {}

    def _table(
        self, name: str, device: torch.device | str, dtype: torch.dtype, make: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Return a small tensor, not to be written to, that is made once a device and dtype.

        Made anew for every matrix, it would cost launches, and a wait for the copy of the levels to the device.
        """
        key = (name, torch.device(device), dtype)
        if key not in self._tables:
            with torch.inference_mode(False):  # training may use it later
                table = make()
            key = (name, table.device, dtype)  # with the index of a thread's current device
            self._tables[key] = table
        return self._tables[key]

    def levels(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return all levels, (2^bits,), in rising order."""
        return self.values(torch.arange(self.top + 1, device=device), dtype)

    def edges(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the midpoints of neighbouring levels, (2^bits - 1,), in rising order."""
        return _midpoints(self.levels(device, dtype))

    @abc.abstractmethod
    def values(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the levels of codes of any integer dtype."""

    @abc.abstractmethod
    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Return the codes, uint8, of the nearest levels; values beyond the outermost level get its code."""

    def pack(self, values: torch.Tensor) -> np.ndarray:
        return pack_codes(self.nearest(values), self.bits)

    def unpack(self, packed: torch.Tensor, count: int) -> torch.Tensor:
        def make() -> torch.Tensor:
            return self.levels(packed.device)[_codes_of_words(self.bits, packed.device)]

        table = self._table("words", packed.device, torch.float32, make)
        return _rows(table, _words(packed, self.bits, count))[:count]

    def compact(self, packed: torch.Tensor, count: int) -> torch.Tensor:
        codes = unpack_codes(packed, self.bits, count)
        return codes.short().add_(1) if self.bits == 8 else codes.add_(1)

    def expand(self, compact: torch.Tensor) -> torch.Tensor:
        def make() -> torch.Tensor:
            return functional.pad(self.levels(compact.device), (1, 0))

        table = self._table("compact", compact.device, torch.float32, make)
        return table.index_select(0, compact.reshape(-1).int()).view(compact.shape)

    def round(self, values: torch.Tensor) -> torch.Tensor:
        return self.values(self.nearest(values))


class EvenLevels(Levels):
    """Levels evenly spaced from -1 to 1: code c has the level 2 c / (2^bits - 1) - 1."""

    def __init__(self, bits: int):
        super().__init__(bits)
        self.density = self.zero = self.top / 2

    def edges(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
        # The last bit may differ from the midpoints of `levels`; `nearest` does not use these edges.
        return _midpoints(torch.linspace(-1, 1, self.top + 1, device=device, dtype=dtype))

    def values(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return codes.to(dtype).mul_(2.0 / self.top).sub_(1.0)

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        return (values + 1).mul_(self.top / 2).round_().clamp_(0, self.top).to(torch.uint8)


class NormalLevels(Levels):
    """The levels with the least squared error for normally distributed values of variance 1."""

    def __init__(self, width: int):
        super().__init__(width)
        above = NORMAL_LEVELS[width]
        self._rising = (*(-level for level in reversed(above)), *above)

    def levels(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
        def make() -> torch.Tensor:
            return torch.tensor(self._rising, dtype=torch.float32, device=device).to(dtype)

        return self._table("levels", device, dtype, make)

    def edges(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._table("edges", device, dtype, lambda: _midpoints(self.levels(device, dtype)))

    def values(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.levels(codes.device, dtype)[codes.int()]

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        return torch.bucketize(values.contiguous(), self.edges(values.device, values.dtype)).to(torch.uint8)


CODEBOOKS: dict[int, Codebook] = {
    book.width: book
    for book in (
        *(EvenLevels(bits) for bits in range(1, 9)),
        Floats(FLOAT16, torch.float16),
        Floats(BFLOAT16, torch.bfloat16),
        *(NormalLevels(width) for width in NORMAL_LEVELS),
    )
}


def _midpoints(levels: torch.Tensor) -> torch.Tensor:
    return (levels[1:] + levels[:-1]) / 2


def level_codebook(width: int) -> Levels:
    """Return the codebook of levels that a width code names.

    Raises:
        KeyError: if the width code is unknown, or one of 16-bit floats.
    """
    book = CODEBOOKS[width]
    if not isinstance(book, Levels):
        raise KeyError(width)
    return book


def pack_codes(codes: torch.Tensor, bits: int) -> np.ndarray:
    """Pack codes, uint8 (count,), of `bits` bits (1 to 8) densely, least significant bit first, into uint8."""
    groups = -(-len(codes) // 8)  # eight codes fill exactly `bits` bytes
    lanes = torch.zeros(groups * 8, dtype=torch.int64, device=codes.device)
    lanes[: len(codes)] = codes
    shifts = bits * torch.arange(8, device=codes.device)
    words = (lanes.view(groups, 8) << shifts).sum(1)
    packed = words.view(torch.uint8).view(groups, 8)[:, :bits].reshape(-1)
    return packed[: (len(codes) * bits + 7) // 8].cpu().numpy()


def unpack_codes(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return `count` codes as uint8: the inverse of `pack_codes`."""
    table = _codes_of_words(bits, packed.device).to(torch.uint8)
    return _rows(table, _words(packed, bits, count))[:count]


# Codes are looked up several at a time: as many as this in one word, which has at most 14 bits.
_CODES_OF_WORD = {1: 8, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2, 7: 2, 8: 1}


def _codes_of_words(bits: int, device: torch.device) -> torch.Tensor:
    """Return the codes of every word: int32 (words, codes of a word)."""
    together = _CODES_OF_WORD[bits]
    shifts = bits * torch.arange(together, device=device, dtype=torch.int32)
    every = torch.arange(1 << (bits * together), device=device, dtype=torch.int32)
    return (every[:, None] >> shifts) & ((1 << bits) - 1)


def _words(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the words that hold the first `count` packed codes, and perhaps a few more: int32 (words,)."""
    size = bits * _CODES_OF_WORD[bits]
    if size == 8:
        return packed.int().reshape(-1)
    packed = packed.reshape(-1)
    groups = -(-count // 8)  # eight codes fill exactly `bits` bytes
    if len(packed) < groups * bits:
        packed = functional.pad(packed, (0, groups * bits - len(packed)))
    table = packed[: groups * bits].view(groups, bits)
    words = torch.empty(groups, 8 * bits // size, dtype=torch.int32, device=packed.device)
    for number in range(words.shape[1]):
        first, shift = divmod(number * size, 8)
        word = table[:, first].int() >> shift
        for byte in range(first + 1, (number * size + size + 7) // 8):
            word |= table[:, byte].int() << (8 * (byte - first) - shift)
        words[:, number] = word & ((1 << size) - 1)
    return words.view(-1)


def _rows(table: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return rows of a table of 1, 2, 4 or 8 columns by their numbers, int32, as one dimension."""
    as_one = _WHOLE_ROWS.get(table.shape[1] * table.element_size())
    if table.device.type != "cpu" or as_one is None:
        return functional.embedding(numbers, table).view(-1)
    # A CPU copies single numbers, however wide, in a third of the time of rows.
    return table.view(as_one).view(-1).index_select(0, numbers).view(table.dtype)


# By the bytes of a table's row, a dtype that holds it.
_WHOLE_ROWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
