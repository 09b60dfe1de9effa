"""Exact records on an accelerator: a kernel decodes the tokens, a thread for each lane, and torch does the rest."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from transformers.utils import logging

from .coded_numbers import DIRECT_TOKENS, LEAST_STATE, LOW_BITS, PRECISION, SCALE, SMALLEST, CodedNumbers, slot_table
from .coded_numbers import decode_numbers as decode_on_cpu
from .delta_record import DeltaFormatError
from .exact_record import CodedSteps, exponent_classes
from .ordered_bits import exponents
from .triton_planes import available, constexpr, jit, launching, on_device, tl

logger = logging.get_logger(__name__)

_PRECISION, _SLOT, _LEAST = constexpr(PRECISION), constexpr(SCALE - 1), constexpr(LEAST_STATE)
_LANES = 64  # of a program: two warps, so that small tensors keep many processors busy
_PART = 1 << 23  # numbers whose low bits are read at once


@jit(do_not_specialize=["count", "steps", "block_lanes", "lanes"])
def tokens_kernel(
    table, words, starts, ends, states, classes, tokens, bad, count, steps, block_lanes, lanes, LANES: tl.constexpr
):
    """Decode the tokens of all lanes, and store 1 in `bad` if one does not end where it should.

    Args:
        table, words: int64, as in `coded_numbers`; a lane may read as many words beyond the last as it has numbers.
        starts, ends: int64 (lanes,): the first word of each lane, and the one after its last.
        states: int64 (lanes,).
        classes, tokens: uint8 (count,).
    """
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < lanes
    block = lane // block_lanes
    first = block.to(tl.int64) * steps * block_lanes
    stop = tl.minimum(first + steps * block_lanes, count)
    width = tl.minimum(stop - first, block_lanes)
    place = first + (lane - block * block_lanes)
    word = tl.load(starts + lane, mask=inside, other=0)
    state = tl.load(states + lane, mask=inside, other=0)
    for _ in range(steps):
        live = inside & (place < stop)
        own = tl.load(classes + place, mask=live, other=0).to(tl.int64)
        entry = tl.load(table + (own << _PRECISION) + (state & _SLOT), mask=live, other=0)
        tl.store(tokens + place, entry.to(tl.uint8), mask=live)
        after = (state >> _PRECISION) * (entry >> 20) + ((entry >> 8) & _SLOT)
        low = live & (after < _LEAST)
        read = tl.load(words + word, mask=low, other=0)
        state = tl.where(live, tl.where(low, (after << 16) | read, after), state)
        word += low.to(tl.int64)
        place += width
    wrong = inside & ((state != _LEAST) | (word != tl.load(ends + lane, mask=inside, other=0)))
    if tl.max(wrong.to(tl.int32), 0) > 0:
        tl.store(bad, 1)


def decode_tokens(coded: CodedNumbers, classes: torch.Tensor, name: str) -> torch.Tensor:
    """Return the tokens of coded numbers: uint8 (count,), on the device of their classes.

    Raises:
        DeltaFormatError: if the data are not those that a writer has coded.
    """
    device, lanes = classes.device, len(coded.states)
    tokens = torch.empty(coded.count, dtype=torch.uint8, device=device)
    if not lanes:
        return tokens
    ends = np.cumsum(coded.lane_words)
    words = np.append(coded.words.astype(np.int64), np.zeros(coded.steps, np.int64))
    arrays = (coded.table, words, ends - coded.lane_words, ends, coded.states.astype(np.int64))
    on_it = [torch.from_numpy(array).to(device) for array in arrays]
    bad = torch.zeros(1, dtype=torch.int32, device=device)
    with launching, on_device(device):
        tokens_kernel[(-(-lanes // _LANES),)](
            *on_it, classes, tokens, bad, coded.count, coded.steps, coded.block_lanes, lanes,
            LANES=_LANES, num_warps=_LANES // 32,
        )  # fmt: skip
    if bad.item():
        raise DeltaFormatError(f"{name}: a lane of coded numbers does not end where it should: it is damaged")
    return tokens


def decode_numbers(coded: CodedNumbers, classes: torch.Tensor, name: str) -> Iterator[torch.Tensor]:
    """Yield the numbers of a sequence, int64, some at a time; arguments and errors as for `decode_tokens`."""
    tokens = decode_tokens(coded, classes, name)
    padded = np.append(coded.low_bits, np.zeros(12 - len(coded.low_bits) % 4, np.uint8)).view("<u4")
    words, widths, smallest = (
        torch.from_numpy(array.astype(np.int64)).to(tokens.device) for array in (padded, LOW_BITS, SMALLEST)
    )
    bit = 0
    for part in tokens.split(_PART):
        numbers = part.long()
        large = (numbers >= DIRECT_TOKENS).nonzero().view(-1)
        if len(large):
            own = numbers[large]
            sizes = widths[own]
            ends = bit + sizes.cumsum(0)
            if int(ends[-1]) > 8 * len(coded.low_bits):
                raise DeltaFormatError(f"{name}: the coded numbers need more low bits than they have")
            starts, bit = ends - sizes, int(ends[-1])
            at = starts >> 5
            value = (words[at] >> (starts & 31)) | (words[at + 1] << (32 - (starts & 31)))
            numbers[large] = smallest[own] | (value & ((1 << sizes) - 1))
        yield numbers
    if (bit + 7) // 8 != len(coded.low_bits):
        raise DeltaFormatError(f"{name}: the coded numbers have {8 * len(coded.low_bits)} low bits and need {bit}")


def all_steps(coded: CodedSteps, base: torch.Tensor, name: str) -> Iterator[torch.Tensor]:
    """Yield the steps of all of a base's numbers, int64, some at a time, on its device; see `exact_record`."""
    of_exponents = torch.from_numpy(exponent_classes(coded)).to(base.device)
    classes = torch.empty(base.numel(), dtype=torch.uint8, device=base.device)
    for part, out in zip(base.reshape(-1).split(_PART), classes.split(_PART), strict=True):
        out.copy_(of_exponents[exponents(part).long()])
    if coded.gaps is None:
        yield from decode_numbers(coded.numbers, classes, name)
        return
    changed = coded.gaps.changed
    own = np.repeat(np.arange(len(changed), dtype=np.uint8), changed)
    gaps = torch.from_numpy(decode_on_cpu(coded.gaps.numbers, own, name).astype(np.int64)).to(base.device)
    found = list(decode_numbers(coded.numbers, torch.from_numpy(own).to(base.device), name))
    values = torch.cat([gaps[:0], *found]) + 1
    steps = torch.zeros(base.numel(), dtype=torch.int64, device=base.device)
    start = 0
    for own_class, count in enumerate(changed.tolist()):
        if not count:
            continue
        ranks = (gaps[start : start + count] + 1).cumsum(0) - 1
        places = (classes == own_class).nonzero().view(-1)
        if int(ranks[-1]) >= len(places):
            raise DeltaFormatError(f"{name}: the exact record changes more numbers than the base has")
        steps[places[ranks]] = values[start : start + count]
        start += count
    yield steps


@functools.lru_cache
def works_on(device: torch.device) -> bool:
    """Return whether the kernel decodes a few numbers as it should: a compiler may be missing."""
    if not available:
        return False
    frequencies = np.zeros((1, len(LOW_BITS)), np.int64)
    frequencies[0, :2] = SCALE // 2
    # A lane whose state holds eight tokens, one bit each: those of 0b10110010 from the lowest on.
    state = LEAST_STATE
    for token in (1, 0, 1, 1, 0, 0, 1, 0):
        state = (state // (SCALE // 2)) * SCALE + state % (SCALE // 2) + token * (SCALE // 2)
    coded = CodedNumbers(
        8, 8, 1, slot_table(frequencies), np.zeros(1, np.int64), np.array([state]), np.empty(0, np.uint16),
        np.empty(0, np.uint8),
    )  # fmt: skip
    try:
        tokens = decode_tokens(coded, torch.zeros(8, dtype=torch.uint8, device=device), "eight bits").tolist()
        trouble = "" if tokens == [0, 1, 0, 0, 1, 1, 0, 1] else f"it decodes {tokens}"
    except Exception as error:  # whatever a compiler, a driver or a launch may raise
        trouble = str(error)
    if trouble:
        logger.warning(f"The Triton kernel of exact records does not work on {device}; the CPU decodes: {trouble}")
    return not trouble
