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

from .checksums import tensor_bytes
from .width_codes import BFLOAT16, BITS, FLOAT16, NORMAL_LEVELS, packed_bytes

_TILE = 1 << 15  # values at once, which fit in a core's cache


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
        """Return the values, float32 (count,), of packed codes, uint8, on the device of the codes."""

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
        # The copy is aligned for 16-bit loads. It is contiguous because numpy gives an empty array the stride 0.
        aligned = packed.clone(memory_format=torch.contiguous_format)
        return aligned.view(self.dtype)[:count].float()

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
        if 8 % self.bits:
            return self.levels(packed.device)[unpack_codes(packed, self.bits, count)]
        table = self._table("bytes", packed.device, torch.float32, lambda: self._values_of_bytes(packed.device))
        return torch.nn.functional.embedding(packed.int(), table).view(-1)[:count]

    def _values_of_bytes(self, device: torch.device) -> torch.Tensor:
        """Return the values of every byte's codes, (256, codes): a byte holds whole codes."""
        every_byte = torch.arange(256, device=device).to(torch.uint8)
        return self.levels(device)[unpack_codes(every_byte, self.bits, 256 * 8 // self.bits)].view(256, -1)

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
        edges = self.edges(values.device, values.dtype)
        if values.device.type != "cpu":
            return torch.bucketize(values.contiguous(), edges).to(torch.uint8)
        # Comparing with all edges, in the cache, is many times faster than a binary search with its branches.
        codes = torch.empty(values.shape, dtype=torch.uint8)
        for part, into in zip(values.reshape(-1).split(_TILE), codes.view(-1).split(_TILE), strict=True):
            counts, above = torch.zeros_like(part), torch.empty_like(part)
            for edge in edges:
                counts.add_(torch.gt(part, edge, out=above))
            into.copy_(counts)
        return codes


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
    """Return `count` codes as int64: the inverse of `pack_codes`."""
    groups = -(-count // 8)
    padded = torch.zeros(groups * bits, dtype=torch.uint8, device=packed.device)
    padded[: len(packed)] = packed
    lanes = torch.zeros(groups, 8, dtype=torch.uint8, device=packed.device)
    lanes[:, :bits] = padded.view(groups, bits)
    shifts = bits * torch.arange(8, device=packed.device)
    return ((lanes.view(torch.int64) >> shifts) & ((1 << bits) - 1)).view(-1)[:count]
