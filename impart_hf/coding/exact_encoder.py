"""Encoding a tensor exactly: the inverse of `modeling.exact_record`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ..modeling.checksums import tensor_bytes, tensor_checksum
from ..modeling.coded_numbers import PART
from ..modeling.exact_record import DENSE, SOME_COLUMNS, SOME_ROWS, SPARSE, WHOLE, matrix_shape, pack_record
from ..modeling.ordered_bits import exponents, has_steps, rounded, steps
from .number_encoder import count_tokens, encode_numbers, entropy_bits, symbols_of, token_spans, tokens_of

_TABLE_BITS = 16  # of a class, besides those of its tokens
_TOKEN_BITS = 12
# Rows and columns that equal the base's are left out if they are at least this share: each takes up to a bit then.
_LEAST_SHARE = 1 / 8
# Both codings take about the same bytes. A sparse one is decoded faster if few numbers changed: fewer are coded.
_MOST_SPARSE, _SPARSE_PRICE = 1 / 8, 1.05


def encode_exact(base: torch.Tensor, finetuned: torch.Tensor, coding: int | None = None) -> bytes:
    """Return the exact record of a fine-tuned tensor.

    Args:
        base: the base's tensor, of the same shape, on the CPU.
        finetuned: of any dtype, on the CPU.
        coding: WHOLE, DENSE or SPARSE, where steps are defined; None for what takes the fewest bytes.
    """
    checksum, shape = tensor_checksum(finetuned), tuple(finetuned.shape)
    rows, columns = matrix_shape(shape)
    pack = partial(pack_record, item_bytes=finetuned.itemsize, shape=shape, checksum=checksum)
    if coding == WHOLE or not has_steps(finetuned.dtype, base.dtype) or rows * columns >= 1 << 32:
        return pack(WHOLE, flags=0, parts=[tensor_bytes(finetuned).tobytes()])
    before = rounded(base, finetuned.dtype)
    moves, keys = (array.reshape(rows, columns) for array in _moves_and_keys(before, finetuned))
    flags, parts = 0, []
    for axis, flag in ((0, SOME_ROWS), (1, SOME_COLUMNS)):
        changed = np.flatnonzero(moves.any(axis=1 - axis))
        if len(changed) <= moves.shape[axis] * (1 - _LEAST_SHARE):
            flags, moves, keys = flags | flag, moves.take(changed, axis), keys.take(changed, axis)
            gaps = np.diff(changed, prepend=-1) - 1
            parts += [np.uint32(len(changed)).tobytes(), encode_numbers(gaps.astype(np.uint32))]
    plan = _plan(moves.ravel(), keys.ravel(), coding)
    encode = _sparse if plan.is_sparse else _dense
    parts += [plan.class_bytes(), *encode(moves.ravel(), plan.classes_of(keys), plan.class_count)]
    used = SPARSE if plan.is_sparse else DENSE
    if coding is None and sum(map(len, parts)) >= finetuned.nbytes:
        return pack(WHOLE, flags=0, parts=[tensor_bytes(finetuned).tobytes()])
    return pack(used, flags=flags, parts=parts)


def _moves_and_keys(base: torch.Tensor, finetuned: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps of all numbers, unsigned integers of their size, and the base's exponents, uint8; one axis."""
    moves, keys = np.empty(base.numel(), f"<u{base.itemsize}"), np.empty(base.numel(), np.uint8)
    pairs = zip(base.reshape(-1).split(PART), finetuned.reshape(-1).split(PART), strict=True)
    for number, (before, after) in enumerate(pairs):  # memory that is used again is faster
        part = slice(number * PART, (number + 1) * PART)
        moves[part], keys[part] = steps(before, after).numpy().view(moves.dtype), exponents(before).numpy()
    return moves, keys


@dataclass(frozen=True)
class _Plan:
    """How the steps of a tensor are coded: sparse or dense, and with which class for each exponent."""

    is_sparse: bool
    first: int
    last: int
    classes: np.ndarray  # uint8 (256,)

    @property
    def class_count(self) -> int:
        return int(self.classes.max()) + 1

    def classes_of(self, keys: np.ndarray) -> np.ndarray:
        """Return the class of each of these exponents: uint8, one axis."""
        return np.frombuffer(keys.tobytes().translate(self.classes.tobytes()), np.uint8)

    def class_bytes(self) -> bytes:
        return bytes([self.first, self.last]) + self.classes[self.first : self.last + 1].tobytes()


def _plan(moves: np.ndarray, keys: np.ndarray, coding: int | None) -> _Plan:
    """Choose the coding, if it is None, and the classes."""
    counts = count_tokens(symbols_of(tokens_of(moves), keys))
    present = np.flatnonzero(counts.any(axis=1))
    first, last = (int(present[0]), int(present[-1])) if len(present) else (0, 0)
    counts = counts[first : last + 1]
    bits, groups = _merge(counts, _dense_bits)
    is_sparse = coding == SPARSE
    if is_sparse or (coding is None and int(counts[:, 0].sum()) > (1 - _MOST_SPARSE) * len(moves)):
        sparse_bits, sparse_groups = _merge(counts, _sparse_bits)
        is_sparse = is_sparse or sparse_bits < bits * _SPARSE_PRICE
        groups = sparse_groups if is_sparse else groups
    classes = np.zeros(256, np.uint8)
    for number, (start, stop) in enumerate(groups):
        classes[first + start : first + stop] = number
    return _Plan(is_sparse, first, last, classes)


def _dense_bits(counts: np.ndarray) -> np.ndarray:
    """Return the bits that classes of numbers take with their tables if every number is coded.

    Args:
        counts: how often each token occurs, shape (classes, TOKENS).
    """
    return entropy_bits(counts) + _TABLE_BITS + _TOKEN_BITS * token_spans(counts)[1]


def _sparse_bits(counts: np.ndarray) -> np.ndarray:
    """Return the bits that classes take, as `_dense_bits`, if changed numbers and the gaps between them are coded."""
    totals, changed = counts.sum(axis=1).astype(np.float64), counts[:, 1:].sum(axis=1).astype(np.float64)
    share = np.clip(changed / np.maximum(totals, 1), 1e-12, 1 - 1e-12)
    places = -totals * (share * np.log2(share) + (1 - share) * np.log2(1 - share))
    # A gap's tokens reach up to several times the mean gap; eight tokens for each doubling.
    table = _TABLE_BITS + _TOKEN_BITS * np.where(changed > 0, 8 * np.log2(4 / share).clip(1, 24), 0)
    values = np.concatenate([np.zeros_like(counts[:, :1]), counts[:, 1:]], axis=1)
    return places + np.where(changed > 0, table + _dense_bits(values), 2 * _TABLE_BITS)


def _merge(counts: np.ndarray, cost: Callable[[np.ndarray], np.ndarray]) -> tuple[float, list[tuple[int, int]]]:
    """Group neighbouring exponents into classes as long as that takes fewer bits, the best pair first.

    Returns:
        The bits of all classes, and of every class the first exponent and the one after the last.
    """
    groups = [(at, at + 1) for at in range(len(counts))]
    sums = list(counts)
    bits = list(cost(counts))
    gains = list(np.add(bits[:-1], bits[1:]) - cost(counts[:-1] + counts[1:]))
    while gains and max(gains) > 0:
        best = int(np.argmax(gains))
        sums[best : best + 2] = [sums[best] + sums[best + 1]]
        groups[best : best + 2] = [(groups[best][0], groups[best + 1][1])]
        del gains[best]
        changed = range(max(0, best - 1), min(best + 1, len(gains)))  # the pairs that the merged class is in
        costs = cost(np.stack([sums[best], *(sums[left] + sums[left + 1] for left in changed)]))
        bits[best : best + 2] = costs[:1]
        for left, together in zip(changed, costs[1:], strict=True):
            gains[left] = bits[left] + bits[left + 1] - together
    return float(sum(bits)), groups


def _dense(moves: np.ndarray, classes: np.ndarray, class_count: int) -> list[bytes]:
    return [encode_numbers(moves, classes, class_count)]


def _sparse(moves: np.ndarray, classes: np.ndarray, class_count: int) -> list[bytes]:
    gaps, values, counts = [], [], np.zeros(class_count, np.uint32)
    for own_class in range(class_count):
        own = moves[classes == own_class]
        ranks = np.flatnonzero(own)
        counts[own_class] = len(ranks)
        gaps.append(np.diff(ranks, prepend=-1) - 1)
        values.append(own[ranks] - own.dtype.type(1))
    by_class = np.repeat(np.arange(class_count, dtype=np.uint8), counts)
    return [
        counts.astype("<u4").tobytes(),
        encode_numbers(np.concatenate(gaps).astype(np.uint32), by_class, class_count),
        encode_numbers(np.concatenate(values), by_class, class_count),
    ]
