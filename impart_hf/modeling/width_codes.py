"""The width codes, and the bits of a value stored with each (docs/FORMAT.md, "Codes").

`codebook` stores and restores the values. This module does not import torch, so record sizes are known without it.
"""

from collections.abc import Iterable

FLOAT16, BFLOAT16 = 16, 17
# By width code, the levels above zero of 2 to 4 bits with the least squared error for normally distributed values of
# variance 1 (Lloyd and Max); the other levels are their negatives.
NORMAL_LEVELS = {
    34: (0.4528, 1.5104),
    35: (0.2451, 0.7560, 1.3439, 2.1520),
    36: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}
# Bits of one value by width code; 1 to 8 are evenly spaced levels of that many bits.
BITS = {
    **{bits: bits for bits in range(1, 9)},
    FLOAT16: 16,
    BFLOAT16: 16,
    **{width: len(above).bit_length() for width, above in NORMAL_LEVELS.items()},
}


def packed_bytes(width: int, count: int) -> int:
    """Return the bytes that `count` codes take, packed densely and padded to whole bytes at the end."""
    return (count * BITS[width] + 7) // 8


def bits_of(widths: Iterable[int]) -> list[int]:
    """Return the bits of one value for each width code."""
    return [BITS[width] for width in widths]


def level_widths(bits: int) -> list[int]:
    """Return the width codes of levels of `bits` bits, evenly spaced levels first."""
    return [width for width, width_bits in BITS.items() if width_bits == bits and width not in (FLOAT16, BFLOAT16)]
