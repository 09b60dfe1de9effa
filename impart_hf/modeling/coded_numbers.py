"""Decoding a sequence of coded numbers: the entropy code of exact deltas (docs/FORMAT.md, "Coded numbers").

A number is a token, which says its size and its leading bits, and the bits below these. Tokens are coded by rANS with a
fixed table of frequencies for each class; the class of every number is known before. The numbers are dealt out to
lanes, each with a state and a stream of words of its own, which are decoded side by side: a step here is one operation
of NumPy on all lanes of a block.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .delta_record import Cursor, DeltaFormatError

PRECISION = 12  # the frequencies of a class add up to 2**12
SCALE = 1 << PRECISION
LEAST_STATE = 1 << 16  # of a lane between two numbers, and before the first is coded
DIRECT_TOKENS = 16  # smaller numbers are their own tokens
LEADING_BITS = 3  # of larger ones that are in the token, besides the highest
TOKENS = DIRECT_TOKENS + (32 - 4) * (1 << LEADING_BITS)  # of numbers of 32 bits

# Number of classes, numbers of a lane in a whole block, lanes of a block, words, bytes of the bits below the tokens.
_HEADER = struct.Struct("<HHIQQ")
LEAST_BLOCK_LANES = 1024  # if there are several blocks, each of which takes a reader's time
PART = 1 << 20  # numbers whose low bits are read at once
# Numbers of each lane for which memory is taken at once.
_STEPS = 32

_token = np.arange(TOKENS)
_above = np.maximum(0, _token - DIRECT_TOKENS)
# Of each token: how many bits are below it, and the number if these are 0.
LOW_BITS = np.where(_token < DIRECT_TOKENS, 0, (_above >> LEADING_BITS) + 1).astype(np.uint8)
SMALLEST = np.where(
    _token < DIRECT_TOKENS, _token, ((1 << LEADING_BITS) + (_above & 7)) << LOW_BITS.astype(np.int64)
).astype(np.uint32)


@dataclass(frozen=True)
class CodedNumbers:
    """A sequence of numbers, parsed but not decoded.

    Attributes:
        count: how many numbers.
        steps: numbers of each lane in a block, of all but the last block.
        block_lanes: lanes of a block.
        table: int64, shape (classes * SCALE,): by class and slot, the frequency of its token (from bit 20 on), its
            place in the token's slots (12 bits), and the token (8 bits).
        lane_words: int64, shape (lanes,): the number of words of each lane.
        states: uint32, shape (lanes,): their states before the first number.
        words: uint16, those of all lanes, one lane after the other.
        low_bits: uint8: the bits below the tokens.
    """

    count: int
    steps: int
    block_lanes: int
    table: np.ndarray
    lane_words: np.ndarray
    states: np.ndarray
    words: np.ndarray
    low_bits: np.ndarray

    @property
    def classes(self) -> int:
        return len(self.table) // SCALE


def pack_header(classes: int, steps: int, block_lanes: int, words: int, low_bytes: int) -> bytes:
    """Return the first bytes of a sequence of coded numbers; `parse_numbers` is the inverse."""
    return _HEADER.pack(classes, steps, block_lanes, words, low_bytes)


def lane_count(count: int, steps: int, block_lanes: int) -> int:
    """Return how many lanes a sequence of so many numbers has."""
    blocks, rest = divmod(count, steps * block_lanes)
    return blocks * block_lanes + min(rest, block_lanes)


def parse_numbers(cursor: Cursor, count: int, bits: int) -> CodedNumbers:
    """Parse the sequence of coded numbers at a cursor.

    Args:
        count: how many numbers it holds.
        bits: of the largest number that it may hold.

    Raises:
        DeltaFormatError: if a number in it is invalid.
    """
    name = cursor.name
    classes, steps, block_lanes, words, low_bytes = _HEADER.unpack(cursor.take("u1", _HEADER.size).tobytes())
    one_block = count <= steps * block_lanes
    if not 1 <= classes <= 256 or not steps or block_lanes < (1 if one_block else LEAST_BLOCK_LANES):
        raise DeltaFormatError(f"{name}: coded numbers of {classes} classes in {block_lanes} lanes of {steps} numbers")
    table = _table(cursor, classes, bits)
    lanes = lane_count(count, steps, block_lanes)
    lane_words = cursor.take("<u2", lanes).astype(np.int64)
    states = cursor.take("<u4", lanes)
    if int(lane_words.sum()) != words or (lanes and int(states.min()) < LEAST_STATE):
        raise DeltaFormatError(f"{name}: the lanes of coded numbers have other lengths or states than possible")
    return CodedNumbers(
        count, steps, block_lanes, table, lane_words, states, cursor.take("<u2", words), cursor.take("u1", low_bytes)
    )


def _table(cursor: Cursor, classes: int, bits: int) -> np.ndarray:
    """Read the frequencies of all classes; see `CodedNumbers.table`."""
    first, used = cursor.take("u1", 2 * classes).astype(np.int64).reshape(2, classes)
    most = DIRECT_TOKENS + ((bits - 4) << LEADING_BITS)
    if int((first + np.maximum(1, used)).max()) > most:
        raise DeltaFormatError(
            f"{cursor.name}: coded numbers with a token beyond {most - 1}, the largest of {bits} bits"
        )
    stored = np.where(used > 1, used, 0)
    values = unpack_frequencies(cursor.take("u1", (int(stored.sum()) * 3 + 1) // 2), int(stored.sum()))
    frequencies = np.zeros((classes, TOKENS), np.int64)
    tokens = np.arange(TOKENS) - first[:, None]
    frequencies[(tokens >= 0) & (tokens < stored[:, None])] = values
    frequencies[stored == 0, first[stored == 0]] = SCALE  # the only token, or that of a class without numbers
    if (frequencies.sum(axis=1) != SCALE).any():
        raise DeltaFormatError(f"{cursor.name}: the frequencies of a class of numbers do not add up to {SCALE}")
    return slot_table(frequencies)


def slot_table(frequencies: np.ndarray) -> np.ndarray:
    """Return `CodedNumbers.table`.

    Args:
        frequencies: int64, shape (classes, TOKENS); each row sums to SCALE.
    """
    first = np.cumsum(frequencies, axis=1) - frequencies
    tokens = np.broadcast_to(np.arange(TOKENS), frequencies.shape)
    fixed = (frequencies << 20) - (first << 8) + tokens  # (slot << 8) is added below
    slots = np.tile(np.arange(SCALE), len(frequencies))
    return np.repeat(fixed.ravel(), frequencies.ravel()) + (slots << 8)


def pack_frequencies(values: np.ndarray) -> np.ndarray:
    """Return numbers below 4096 as 12 bits each: uint8, two of them in three bytes."""
    even = np.append(values, 0)[: len(values) + len(values) % 2].astype(np.uint32)
    pairs = even[0::2] | even[1::2] << 12
    packed = np.stack([pairs, pairs >> 8, pairs >> 16], axis=1).astype(np.uint8)
    return packed.ravel()[: (3 * len(values) + 1) // 2]


def unpack_frequencies(packed: np.ndarray, count: int) -> np.ndarray:
    """Return so many numbers that `pack_frequencies` packed: int64."""
    threes = np.append(packed, np.zeros(-len(packed) % 3, np.uint8)).reshape(-1, 3).astype(np.int64)
    pairs = threes[:, 0] | threes[:, 1] << 8 | threes[:, 2] << 16
    return np.stack([pairs & 0xFFF, pairs >> 12], axis=1).ravel()[:count]


def decode_numbers(coded: CodedNumbers, classes: np.ndarray | None, name: str) -> np.ndarray:
    """Return the numbers: uint32, shape (count,).

    Args:
        classes: uint8, shape (count,): the class of every number, below `coded.classes`; None if all are of class 0.
        name: the tensor's name, for messages.

    Raises:
        DeltaFormatError: if the data are not those that a writer has coded.
    """
    return np.concatenate([np.empty(0, np.uint32), *decode_in_parts(coded, classes, name)])


def decode_in_parts(coded: CodedNumbers, classes: np.ndarray | None, name: str) -> Iterator[np.ndarray]:
    """Yield the numbers in their order, PART at a time, so that little memory is needed besides a byte for each.

    Arguments and errors are those of `decode_numbers`.
    """
    tokens = decode_tokens(coded, classes, name)
    low_words = np.append(coded.low_bits, np.zeros(12 - len(coded.low_bits) % 4, np.uint8)).view("<u4")
    bit, last_bit = 0, 8 * len(coded.low_bits)
    for start in range(0, len(tokens), PART):
        numbers = tokens[start : start + PART].astype(np.uint32)
        large = np.flatnonzero(numbers >= DIRECT_TOKENS)
        own = numbers[large]
        ends = bit + np.cumsum(LOW_BITS[own], dtype=np.int64)
        if len(ends) and ends[-1] > last_bit:
            raise DeltaFormatError(f"{name}: the coded numbers have {last_bit} low bits and need more")
        numbers[large] = SMALLEST[own] | _bits(low_words, ends, LOW_BITS[own])
        bit = int(ends[-1]) if len(ends) else bit
        yield numbers
    if (bit + 7) // 8 != len(coded.low_bits):
        raise DeltaFormatError(f"{name}: the coded numbers have {last_bit} low bits and need {bit}")


def _bits(words: np.ndarray, ends: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Return the numbers of these widths, at most 28 bits, that end before these bits: uint32."""
    starts = ends - widths
    place = starts >> 5
    pair = words[place] | words[place + 1].astype(np.uint64) << np.uint64(32)
    values = (pair >> (starts & 31).astype(np.uint64)).astype(np.uint32)
    return values & ((np.uint32(1) << widths.astype(np.uint32)) - np.uint32(1))


def decode_tokens(coded: CodedNumbers, classes: np.ndarray | None, name: str) -> np.ndarray:
    """Return the tokens: uint8, shape (count,); arguments and errors as for `decode_numbers`."""
    tokens = np.empty(coded.count, np.uint8)
    starts = np.cumsum(coded.lane_words) - coded.lane_words
    size = coded.steps * coded.block_lanes
    for number, at in enumerate(range(0, coded.count, size)):
        lanes = slice(number * coded.block_lanes, (number + 1) * coded.block_lanes)
        states, places = coded.states[lanes].astype(np.int64), starts[lanes] - starts[lanes][0]
        ends = places + coded.lane_words[lanes]
        # A lane reads at most a word for each number, so that even those of a damaged one are inside.
        words = np.zeros(ends[-1] + coded.steps, np.int64)
        words[: ends[-1]] = coded.words[starts[lanes][0] :][: ends[-1]]
        part = slice(at, at + size)
        _decode_block(coded.table, words, states, places, None if classes is None else classes[part], tokens[part])
        if (states != LEAST_STATE).any() or (places != ends).any():
            raise DeltaFormatError(f"{name}: a lane of coded numbers does not end where it should: it is damaged")
    return tokens


def _decode_block(
    table: np.ndarray,
    words: np.ndarray,
    states: np.ndarray,
    places: np.ndarray,
    classes: np.ndarray | None,
    tokens: np.ndarray,
) -> None:
    """Decode the tokens of a block, and change states and places of its lanes to those after the last.

    Of few lanes, a call takes longer than its arithmetic. All arrays are int64, because NumPy takes twice as long for a
    call that converts, and constants are arrays for the same reason.

    Args:
        words: int64, with the words of these lanes.
        places: of each lane's next word.
    """
    lanes, slot_mask, precision = len(states), np.array(SCALE - 1), np.array(PRECISION)
    least, sign, word_bits, eight, twenty = map(np.array, (LEAST_STATE, 63, 16, 8, 20))
    chosen, factors, low, read = (np.empty(lanes, np.int64) for _ in range(4))
    for start in range(0, len(tokens), _STEPS * lanes):
        part = slice(start, start + _STEPS * lanes)
        own = len(tokens[part])
        offsets = np.zeros(own, np.int64) if classes is None else classes[part].astype(np.int64) << PRECISION
        entries = np.empty(own, np.int64)
        for at in range(0, own, lanes):
            if own - at < lanes:  # the last step, of some lanes only
                states, places, chosen, factors, low, read = (
                    array[: own - at] for array in (states, places, chosen, factors, low, read)
                )
            here = slice(at, at + lanes)
            np.bitwise_and(states, slot_mask, chosen)
            np.add(chosen, offsets[here], chosen)
            entry = table.take(chosen, None, entries[here], "clip")
            np.right_shift(states, precision, states)
            np.right_shift(entry, twenty, factors)
            np.multiply(states, factors, states)
            np.right_shift(entry, eight, factors)
            np.bitwise_and(factors, slot_mask, factors)
            np.add(states, factors, states)
            np.subtract(states, least, low)
            np.right_shift(low, sign, low)  # -1 if the state is too low, else 0
            words.take(places, None, read, "clip")
            np.bitwise_and(read, low, read)
            np.subtract(places, low, places)
            np.bitwise_and(low, word_bits, low)
            np.left_shift(states, low, states)
            np.bitwise_or(states, read, states)
        tokens[part] = entries  # the lowest byte
