"""Keep-or-drop masks that need no stored indices: a counter-based generator (docs/FORMAT.md, "Masks").

Whether entry (column, row) of a plane is kept is a function of 32-bit integers: the record's seed, the side, the
column, the row and the column's threshold. There is no generator state, so every device, dtype and library version
gives the same mask, and any part of it can be computed alone.
"""

import numpy as np
import torch

_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: its multiples are spread evenly modulo 2**32
_MULTIPLIER_1 = 0x7FEB352D  # the two multipliers of Wellons' "lowbias32" integer hash
_MULTIPLIER_2 = 0x846CA68B
_TILE_ENTRIES = 1 << 17  # 32-bit words processed at once: two buffers of this size fit in a core's L2 cache


def _signed(value: int) -> int:
    """Return the int32 with the same bits as the unsigned 32-bit `value` (torch has no full uint32 arithmetic)."""
    return value - (1 << 32) if value >= 1 << 31 else value


def mix32(values: np.ndarray) -> np.ndarray:
    """Return the 32-bit hashes of an array of uint32, of which masks and column keys are made."""
    x = values.astype(np.uint32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(_MULTIPLIER_1)
    x ^= x >> np.uint32(15)
    x *= np.uint32(_MULTIPLIER_2)
    return x ^ (x >> np.uint32(16))


def column_keys(seed: int | np.ndarray, side: int, columns: np.ndarray) -> np.ndarray:
    """Return one uint32 key per column: `mix32(seed + GOLDEN * (2 * column + side + 1))`.

    Args:
        seed: the record's 32-bit mask seed, or one for each column.
        side: 0 for U and for direct planes, 1 for V.
        columns: column numbers, any integer dtype.
    """
    counters = (2 * columns.astype(np.uint64) + np.uint64(side + 1)) * np.uint64(_GOLDEN)
    counters = counters + np.asarray(seed, np.uint64)
    return mix32((counters & np.uint64(0xFFFFFFFF)).astype(np.uint32))


def keep_mask(
    seed: int | np.ndarray,
    side: int,
    thresholds: np.ndarray,
    rows: int,
    device: torch.device | str = "cpu",
    numbers: np.ndarray | None = None,
) -> torch.Tensor:
    """Return a boolean mask of shape (columns, rows), True where the entry is kept.

    Two neighbouring rows share one 32-bit hash: row i takes its low half if i is even, its high half if odd. The entry
    is kept if that 16-bit number is at most the column's threshold T, that is with probability (T + 1) / 65536.

    Args:
        seed: the record's 32-bit mask seed, or one for each column, where they belong to several records.
        side: 0 for U and for direct planes, 1 for V.
        thresholds: uint16 of shape (columns,).
        rows: entries per column.
        device: where the mask is computed.
        numbers: integers, shape (columns,): the columns' numbers in their plane; None for 0, 1, 2, ….
    """
    columns = len(thresholds)
    keys = column_keys(seed, side, np.arange(columns) if numbers is None else numbers)
    keys_t = torch.from_numpy(keys.view(np.int32)).to(device)[:, None]
    # Flipping the top bit of both sides turns torch's signed comparison into the unsigned one.
    limits = torch.from_numpy((thresholds.astype(np.int32) - 32768).astype(np.int16)).to(device)[:, None]
    words = (rows + 1) // 2
    steps = np.arange(words, dtype=np.uint64) * np.uint64(_GOLDEN) & np.uint64(0xFFFFFFFF)
    steps_t = torch.from_numpy(steps.astype(np.uint32).view(np.int32)).to(device)
    mask = torch.empty(columns, rows, dtype=torch.bool, device=device)
    # On an accelerator, one step for all columns is fastest; on a CPU, tiles that fit in the cache.
    tile = columns if mask.device.type != "cpu" else max(1, _TILE_ENTRIES // max(1, words))
    scratch = torch.empty(min(tile, columns), words, dtype=torch.int32, device=device)
    for start in range(0, columns, max(1, tile)):
        x = keys_t[start : start + tile] + steps_t
        high = scratch[: x.shape[0]]
        for shift, multiplier in ((16, _MULTIPLIER_1), (15, _MULTIPLIER_2), (16, None)):
            torch.bitwise_right_shift(x, shift, out=high)  # an arithmetic shift: the copied sign bits are cleared next
            high &= (1 << (32 - shift)) - 1
            x ^= high
            if multiplier is not None:
                x *= _signed(multiplier)
        halves = x.view(torch.int16)  # little-endian: the low half comes first
        halves ^= -32768
        torch.le(halves[:, :rows], limits[start : start + tile], out=mask[start : start + tile])
    return mask


def kept_positions(
    seed: int, side: int, thresholds: np.ndarray, rows: int, device: torch.device | str, numbers: np.ndarray
) -> torch.Tensor:
    """Return column * rows + row of every entry that `keep_mask` keeps, ascending, the first column being 0: int64."""
    mask = keep_mask(seed, side, thresholds, rows, device, numbers).view(-1)
    if mask.device.type == "cpu":  # NumPy does not branch on every entry, which costs torch up to ten times as much
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().view(-1)
