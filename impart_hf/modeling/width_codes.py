"""Width codes: which there are, and how many bits a value takes under each (docs/FORMAT.md, "Codes").

What the codes stand for is in `codebook`. This module needs no torch: the sizes of records are known without it.
"""

from collections.abc import Iterable

FLOAT16, BFLOAT16 = 16, 17
# Levels of 2 to 4 bits with the least squared error for normally distributed values of variance 1 (Lloyd and Max), by
# width code: those above zero; the others are their negatives.
NORMAL_LEVELS = {
    34: (0.4528, 1.5104),
    35: (0.2451, 0.7560, 1.3439, 2.1520),
    36: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}
# Bits of one value by width code; 1 to 8 are evenly spaced levels of so many bits.
BITS = {
    **{bits: bits for bits in range(1, 9)},
    FLOAT16: 16,
    BFLOAT16: 16,
    **{width: len(above).bit_length() for width, above in NORMAL_LEVELS.items()},
}


def packed_bytes(width: int, count: int) -> int:
    """Bytes that `count` codes take: packed densely, padded to whole bytes at the end."""
    return (count * BITS[width] + 7) // 8


def bits_of(widths: Iterable[int]) -> list[int]:
    """Bits of one value under each width code."""
    return [BITS[width] for width in widths]


def level_widths(bits: int) -> list[int]:
    """The width codes of levels of so many bits: the evenly spaced ones first."""
    return [width for width, own in BITS.items() if own == bits and width not in (FLOAT16, BFLOAT16)]
