"""Coding a sequence of numbers, the inverse of `modeling.coded_numbers`."""

import math

import numpy as np

from ..modeling.coded_numbers import (
    DIRECT_TOKENS,
    LEADING_BITS,
    LEAST_STATE,
    LOW_BITS,
    PART,
    PRECISION,
    SCALE,
    SMALLEST,
    TOKENS,
    lane_count,
    pack_frequencies,
    pack_header,
)

# A lane's state and length take six bytes, of which four are lost; the fewer lanes, the more calls of NumPy for each
# number. The best number of lanes grows with the square root of the numbers, but not beyond a few percent of the bytes.
_LANES_SQUARED, _LANE_BYTES, _FEW_LANES = 2, 128, 4
# Numbers of each lane for which memory is taken at once.
_STEPS = 32
_MOST_STEPS = 0xFFFF  # numbers of a lane, so that its words can be counted in 16 bits
_MOST_LANES = 8192  # of a block: with more, what a step reads and writes leaves a core's cache

_TOKENS_OF_SMALL = (np.searchsorted(SMALLEST, np.arange(1 << 16), side="right") - 1).astype(np.uint8)


def tokens_of(numbers: np.ndarray) -> np.ndarray:
    """Return the tokens of numbers: uint8.

    Args:
        numbers: unsigned integers of up to 32 bits, one axis.
    """
    tokens = np.empty(len(numbers), np.uint8)
    for start in range(0, len(numbers), PART):  # what NumPy makes on the way is larger
        own = numbers[start : start + PART]
        if own.itemsize <= 2:
            tokens[start : start + PART] = _TOKENS_OF_SMALL.take(own)
            continue
        tokens[start : start + PART] = own
        large = np.flatnonzero(own >= DIRECT_TOKENS)
        # The exponent and the leading bits of a float64 are those of the number.
        bits = own[large].astype(np.float64).view(np.int64) >> (52 - LEADING_BITS)
        tokens[start + large] = bits - ((1023 + 4) << LEADING_BITS) + DIRECT_TOKENS
    return tokens


def symbols_of(tokens: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return tokens with their classes: uint16, 256 times the class, and the token; both are uint8."""
    return classes.astype(np.uint16) << np.uint16(8) | tokens


def token_spans(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each class's first token that occurs, and how many tokens there are from it to the last; 0 if none.

    Args:
        counts: how often each token occurs, shape (classes, TOKENS).
    """
    occurs = counts > 0
    first = np.argmax(occurs, axis=1)
    return first, np.where(occurs.any(axis=1), TOKENS - np.argmax(occurs[:, ::-1], axis=1) - first, 0)


def count_tokens(symbols: np.ndarray) -> np.ndarray:
    """Return how often each token occurs in each class: int64, shape (256, TOKENS).

    Args:
        symbols: from `symbols_of`.
    """
    counts = np.zeros(1 << 16, np.int64)
    for start in range(0, len(symbols), PART):  # NumPy makes int64 of what it counts
        counts += np.bincount(symbols[start : start + PART], minlength=1 << 16)
    return counts.reshape(256, 256)[:, :TOKENS]


def entropy_bits(counts: np.ndarray) -> np.ndarray:
    """Return the bits that numbers take at least, by class: of their tokens, and below these.

    Args:
        counts: how often each token occurs, shape (classes, TOKENS).
    """
    totals = counts.sum(axis=-1)
    logs = np.log2(np.maximum(counts, 1))
    coded = totals * np.log2(np.maximum(totals, 1)) - (counts * logs).sum(axis=-1)
    return coded + counts @ LOW_BITS[: counts.shape[-1]].astype(np.float64)


def encode_numbers(numbers: np.ndarray, classes: np.ndarray | None = None, class_count: int = 1) -> bytes:
    """Return numbers coded; `parse_numbers` and `decode_numbers` are the inverse.

    Args:
        numbers: unsigned integers of up to 32 bits, one axis.
        classes: uint8, the class of every number; None if all are of class 0.
        class_count: 1 to 256.
    """
    tokens = tokens_of(numbers)
    symbols = tokens.astype(np.uint16) if classes is None else symbols_of(tokens, classes)
    counts = count_tokens(symbols)[:class_count]
    frequencies = np.stack([scaled_frequencies(row) for row in counts])
    first, used = token_spans(counts)
    stored = [row[at : at + size] for row, at, size in zip(frequencies, first, used, strict=True) if size > 1]
    packed = pack_frequencies(np.concatenate(stored)) if stored else np.empty(0, np.uint8)

    most = max(_FEW_LANES, int(entropy_bits(counts).sum() / 8 / _LANE_BYTES))
    lanes = max(1, min(most, math.isqrt(_LANES_SQUARED * len(numbers))), -(-len(numbers) // _MOST_STEPS))
    blocks = -(-lanes // _MOST_LANES)
    block_lanes = -(-lanes // blocks)
    steps = max(1, -(-len(numbers) // (blocks * block_lanes)))
    states, lane_words, words = _encode_tokens(symbols, frequencies, steps, block_lanes)
    low = pack_low_bits(numbers, tokens)
    return b"".join(
        [
            pack_header(class_count, steps, block_lanes, len(words), len(low)),
            first.astype(np.uint8).tobytes(),
            used.astype(np.uint8).tobytes(),
            packed.tobytes(),
            lane_words.astype("<u2").tobytes(),
            states.astype("<u4").tobytes(),
            words.astype("<u2").tobytes(),
            low.tobytes(),
        ]
    )


def scaled_frequencies(counts: np.ndarray) -> np.ndarray:
    """Return frequencies that add up to SCALE, at least 1 for every token that occurs: int64, shape (TOKENS,).

    Args:
        counts: how often each token occurs; if none does, token 0 gets all.
    """
    total = counts.sum()
    if not total:
        return np.eye(1, TOKENS, dtype=np.int64)[0] * SCALE
    exact = counts * (SCALE / total)
    frequencies = np.where(counts > 0, np.maximum(1, np.rint(exact)), 0).astype(np.int64)
    while excess := int(frequencies.sum()) - SCALE:
        # The token whose code grows least, or shrinks most, by one step of its frequency.
        change = -np.sign(excess)
        possible = (counts > 0) & (frequencies + change > 0)
        gain = np.full(TOKENS, -np.inf)
        gain[possible] = counts[possible] * np.log2((frequencies[possible] + change) / frequencies[possible])
        frequencies[np.argmax(gain)] += change
    return frequencies


def _encode_tokens(
    symbols: np.ndarray, frequencies: np.ndarray, steps: int, block_lanes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return states and numbers of words of all lanes, and the words."""
    table = np.zeros((len(frequencies), 256), np.int64)
    table[:, :TOKENS] = frequencies << PRECISION | (np.cumsum(frequencies, axis=1) - frequencies) % SCALE
    lanes = lane_count(len(symbols), steps, block_lanes)
    states, lane_words = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    words = [np.empty(0, np.uint16)]
    for number, at in enumerate(range(0, len(symbols), steps * block_lanes)):
        part = slice(number * block_lanes, (number + 1) * block_lanes)
        block = symbols[at : at + steps * block_lanes]
        states[part], lane_words[part], own = _encode_block(block, table.ravel(), len(states[part]))
        words.append(own)
    return states, lane_words, np.concatenate(words)


def _encode_block(symbols: np.ndarray, table: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return states and numbers of words of a block's lanes, and the words, one lane after the other.

    The decoder goes forward, so this goes backward, from the last number of every lane to its first. As in the decoder,
    all arithmetic is in int64.

    Args:
        table: int64, by symbol, frequency (from bit 12 on) and first slot.
    """
    steps = -(-len(symbols) // lanes)
    emitted, is_emitted = np.zeros((steps, lanes), np.uint16), np.zeros((steps, lanes), np.bool_)
    low_bits, precision, word_bits = np.array(SCALE - 1), np.array(PRECISION), np.array(16)
    top, sign, scale = np.array(32 - PRECISION), np.array(63), np.array(SCALE)
    all_states = np.full(lanes, LEAST_STATE, np.int64)
    memory, quotients = np.empty((3, lanes), np.int64), np.empty(lanes)
    for start in reversed(range(0, steps, _STEPS)):
        own = table.take(symbols[start * lanes : (start + _STEPS) * lanes])
        for step in reversed(range(start, min(start + _STEPS, steps))):
            entry = own[(step - start) * lanes : (step - start + 1) * lanes]
            states, quotient = all_states[: len(entry)], quotients[: len(entry)]
            frequency, high, product = memory[:, : len(entry)]
            np.right_shift(entry, precision, frequency)
            np.right_shift(states, top, high)
            np.subtract(frequency, high, high)
            np.subtract(high, 1, high)
            np.right_shift(high, sign, high)  # -1 if the state would leave its 32 bits, else 0
            emitted[step, : len(entry)] = states
            is_emitted[step, : len(entry)] = high
            np.bitwise_and(high, word_bits, high)
            np.right_shift(states, high, states)
            np.divide(states, frequency, quotient)  # in float64, which is fast, and exact for numbers of 32 bits
            product[:] = quotient
            np.subtract(scale, frequency, frequency)
            np.multiply(product, frequency, product)
            np.add(states, product, states)
            np.bitwise_and(entry, low_bits, entry)
            np.add(states, entry, states)
    by_lane = np.ascontiguousarray(emitted.T).ravel()
    return all_states, is_emitted.sum(axis=0), by_lane[np.flatnonzero(np.ascontiguousarray(is_emitted.T))]


def pack_low_bits(numbers: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the bits of numbers below their tokens, one after the other: uint8."""
    words, bit = np.zeros(0, np.int64), 0
    for start in range(0, len(numbers), PART):
        chosen = start + np.flatnonzero(tokens[start : start + PART] >= DIRECT_TOKENS)
        if not len(chosen):
            continue
        widths = LOW_BITS[tokens[chosen]].astype(np.int64)
        ends = bit + np.cumsum(widths)
        starts, bit = ends - widths, int(ends[-1])
        values = (numbers[chosen].astype(np.int64) & ((1 << widths) - 1)) << (starts & 31)
        first, count = int(starts[0]) >> 5, (bit >> 5) + 2
        words = np.append(words, np.zeros(count - len(words), np.int64))
        # Their bits do not overlap, so that sums are exact in float64.
        for place, half in ((starts >> 5, values & 0xFFFFFFFF), ((starts >> 5) + 1, values >> 32)):
            words[first:] += np.bincount(place - first, half, count - first).astype(np.int64)
    return words.astype("<u4").view(np.uint8)[: (bit + 7) // 8]
