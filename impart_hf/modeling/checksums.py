"""The checksum that detects a wrong base model while its tensors are read, and one that detects any change."""

import hashlib
from collections.abc import Callable

import numpy as np
import torch

_ROW_WORDS = 1024  # 64-bit words in a row of the checksum's table
_BLOCK_ROWS = 128  # rows summed at a time: 1 MiB, so that the words are still in the cache for the second sum


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Return the tensor's bytes as a file stores them, as a uint8 array (no copy for contiguous CPU tensors)."""
    dense = tensor.detach().cpu().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # `view` may keep the stride 0 of a tensor with one element
    return flat.view(torch.uint8).numpy()


def tensor_checksum(tensor: torch.Tensor) -> int:
    """Return the 64-bit checksum of a tensor's bytes (docs/FORMAT.md, "Checksums of the base").

    The bytes, padded with zeros, form a table of little-endian 64-bit words with 1024 words a row. The sums of its
    rows and of its columns, modulo 2**64, are hashed together with the byte length. Two additions a word make this as
    fast as memory; it detects mistakes, not forgery.
    """
    return _checksum(tensor, lambda words: words)


def content_checksum(tensor: torch.Tensor) -> int:
    """Return a 64-bit checksum of a tensor's bytes that also sees changes which cancel in sums.

    In `tensor_checksum`, for instance, the signs of an even number of entries in each row and column of its table do.
    Here the words are mixed before they are added up (the finaliser of MurmurHash3), which takes four times as long.
    """
    return _checksum(tensor, _mixed)


def _mixed(words: np.ndarray) -> np.ndarray:
    mixed = words ^ (words >> np.uint64(33))
    mixed *= np.uint64(0xFF51AFD7ED558CCD)
    mixed ^= mixed >> np.uint64(33)
    mixed *= np.uint64(0xC4CEB9FE1A85EC53)
    return mixed ^ (mixed >> np.uint64(33))


def _checksum(tensor: torch.Tensor, mix: Callable[[np.ndarray], np.ndarray]) -> int:
    data = tensor_bytes(tensor)
    row_bytes = 8 * _ROW_WORDS
    whole = len(data) // row_bytes * row_bytes
    table = data[:whole].view("<u8") if data.ctypes.data % 8 == 0 else np.frombuffer(data[:whole].tobytes(), "<u8")
    table = table.reshape(-1, _ROW_WORDS)
    tail = np.zeros(row_bytes, np.uint8)
    tail[: len(data) - whole] = data[whole:]
    tail_words = mix(tail.view("<u8"))
    rows = [np.zeros(0, np.uint64)]
    columns = tail_words.copy()
    for start in range(0, len(table), _BLOCK_ROWS):
        part = mix(table[start : start + _BLOCK_ROWS])
        rows.append(part.sum(axis=1, dtype=np.uint64))
        columns += part.sum(axis=0, dtype=np.uint64)
    if len(data) > whole:
        rows.append(tail_words.sum(dtype=np.uint64, keepdims=True))
    digest = hashlib.sha256(
        len(data).to_bytes(8, "little") + np.concatenate(rows).astype("<u8").tobytes() + columns.astype("<u8").tobytes()
    )
    return int.from_bytes(digest.digest()[:8], "little")
