"""Exact records: every bit comes back, as few bytes as theory allows, and a second reader agrees."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import naive_reader

from impart_hf.coding.exact_encoder import encode_exact
from impart_hf.coding.number_encoder import encode_numbers, scaled_frequencies, tokens_of
from impart_hf.modeling.checksums import tensor_bytes
from impart_hf.modeling.coded_numbers import SCALE, SMALLEST, decode_numbers, parse_numbers
from impart_hf.modeling.delta_record import Cursor, DeltaFormatError
from impart_hf.modeling.exact_record import DENSE, SPARSE, WHOLE, parse_exact, restore
from impart_hf.modeling.ordered_bits import exponents, integers, moved, steps

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32)
STORED_WHOLE = (torch.int64, torch.float64, torch.bool, torch.complex64)
CODINGS = (None, WHOLE, DENSE, SPARSE)
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8", torch.int32: "I32"}


def noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers of any bits: NaN with payloads, infinities, subnormals, both zeros."""
    size = torch.Size(shape).numel() * dtype.itemsize
    data = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, size, np.uint8)
    tensor = torch.empty(shape, dtype=dtype)
    tensor_bytes(tensor)[:] = data
    return tensor


def changed(tensor: torch.Tensor, share: float, seed: int = 1) -> torch.Tensor:
    """A tensor with so many of its numbers one step up or down."""
    bits = integers(tensor).clone()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(bits.shape, generator=generator) < share
    up = torch.rand(bits.shape, generator=generator) < 0.5
    bits[chosen] += torch.where(up, 1, -1)[chosen].to(bits.dtype)
    return bits.view(tensor.dtype).view(tensor.shape)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and np.array_equal(tensor_bytes(one), tensor_bytes(other))


def restored(data: bytes, base: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return restore(base, np.frombuffer(data, np.uint8), "tensor", dtype)


def bits_of(data: bytes, tensor: torch.Tensor) -> float:
    return 8 * len(data) / tensor.numel()


# --- all bits come back


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from((*FLOATS, *INTEGERS, *STORED_WHOLE)),
    shape=st.sampled_from([(), (0,), (1,), (7,), (40, 30), (1, 50), (3, 5, 8), (0, 4), (4, 0), (70, 1)]),
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    coding=st.sampled_from(CODINGS),
    seed=st.integers(0, 1000),
)
def test_any_bits_of_any_dtype(
    dtype: torch.dtype, shape: tuple[int, ...], share: float, coding: int | None, seed: int
) -> None:
    base, other = random_bits(shape, dtype, seed), random_bits(shape, dtype, seed + 1)
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    finetuned = torch.where(chosen, other, base)
    tensor_bytes(finetuned)  # `where` keeps bits
    assert same_bits(restored(encode_exact(base, finetuned, coding), base, dtype), finetuned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("coding", CODINGS)
def test_a_base_of_another_dtype(dtype: torch.dtype, base_dtype: torch.dtype, coding: int | None) -> None:
    base = 3000 * noise((60, 50)).to(base_dtype) ** 3  # beyond float16's range, too
    base[0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    finetuned = (base.float() + noise((60, 50), 1)).to(dtype)
    finetuned[0, 4:8] = torch.tensor([float("nan"), -float("inf"), -0.0, 1e-40])
    assert same_bits(restored(encode_exact(base, finetuned, coding), base, dtype), finetuned)


def test_a_nan_of_another_dtype_is_one_pattern() -> None:
    """Devices keep different bits of its payload, and the steps from it must be the same on all."""
    patterns = torch.tensor([0x7FC00000, 0x7FC12345, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    finetuned = torch.tensor([1.0, 2.0, 3.0, 4.0]).bfloat16()
    data = encode_exact(patterns, finetuned, DENSE)
    quiet = torch.full((4,), float("nan"))
    assert same_bits(restored(data, quiet, torch.bfloat16), finetuned)


def test_dtypes_without_steps_are_stored_whole() -> None:
    pairs = [(torch.float32, torch.int32), (torch.float8_e4m3fn, torch.bfloat16), (torch.bfloat16, torch.float8_e5m2)]
    for base_dtype, dtype in [*pairs, *((one, one) for one in STORED_WHOLE)]:
        base, finetuned = random_bits((64, 64), base_dtype, 1), random_bits((64, 64), dtype, 2)
        data = encode_exact(base, finetuned)
        assert data[1] == WHOLE and same_bits(restored(data, base, dtype), finetuned)


def test_one_step_is_one_representable_number() -> None:
    zero, tiny = torch.zeros(1), torch.tensor([1e-45])
    assert steps(zero, -zero).tolist() == [1] and steps(-zero, zero).tolist() == [2]  # -0 is just below 0
    assert steps(zero, tiny).tolist() == [2] and steps(zero, -tiny).tolist() == [3]
    ones = torch.ones(1, dtype=torch.bfloat16)
    assert steps(ones, torch.nextafter(ones, ones + 1)).tolist() == [2]
    assert steps(-ones, torch.nextafter(-ones, -ones - 1)).tolist() == [1]


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_steps_lead_back(dtype: torch.dtype) -> None:
    base, finetuned = random_bits((4096,), dtype, 3), random_bits((4096,), dtype, 4)
    assert same_bits(moved(base, steps(base, finetuned)), finetuned)


# --- a second reader


@pytest.mark.parametrize("dtype", list(NAMES))
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("coding", CODINGS)
def test_a_reader_written_from_the_document_agrees(dtype: torch.dtype, share: float, coding: int | None) -> None:
    base = random_bits((24, 40), dtype, 5) if share == 1.0 else (20 * noise((24, 40))).to(dtype)
    finetuned = random_bits((24, 40), dtype, 6) if share == 1.0 else changed(base, share)
    finetuned[5:17] = base[5:17]  # rows that are left out
    finetuned[:, 7:30] = base[:, 7:30]  # and columns
    data = encode_exact(base, finetuned, coding)
    assert coding is None or data[1] == coding
    decoded = naive_reader.decode_exact(data, NAMES[dtype], [24, 40], tensor_bytes(base).tobytes())
    assert decoded == tensor_bytes(finetuned).tobytes()


def test_several_blocks_of_lanes() -> None:
    """Blocks, lanes that end early, and low bits across parts, which small tensors do not have."""
    numbers = np.random.default_rng(0).geometric(0.001, 70_000).astype(np.uint32)
    classes = (np.arange(70_000) % 3).astype(np.uint8)
    data = encode_numbers(numbers, classes, 3)
    cursor = Cursor(np.frombuffer(data, np.uint8), "numbers")
    coded = parse_numbers(cursor, len(numbers), 32)
    assert cursor.at == len(data)
    assert (decode_numbers(coded, classes, "numbers") == numbers).all()
    assert naive_reader.coded_numbers(data, 0, classes.tolist()) == (numbers.tolist(), len(data))


def test_more_lanes_than_a_block_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("impart_hf.coding.number_encoder._MOST_LANES", 4096)
    monkeypatch.setattr("impart_hf.coding.number_encoder._LANES_SQUARED", 600)
    monkeypatch.setattr("impart_hf.coding.number_encoder._LANE_BYTES", 1)
    numbers = np.random.default_rng(0).integers(0, 40, 30_011).astype(np.uint16)
    data = encode_numbers(numbers)
    coded = parse_numbers(Cursor(np.frombuffer(data, np.uint8), "numbers"), len(numbers), 16)
    assert coded.block_lanes < len(coded.states)
    assert (decode_numbers(coded, None, "numbers") == numbers).all()
    assert naive_reader.coded_numbers(data, 0, [0] * len(numbers))[0] == numbers.tolist()


def test_tokens_cover_all_numbers() -> None:
    edges = np.concatenate([np.arange(70_000), SMALLEST, SMALLEST[17:] - 1, [2**32 - 1]]).astype(np.uint32)
    tokens = tokens_of(edges)
    assert (SMALLEST[tokens] <= edges).all()
    below = tokens < len(SMALLEST) - 1
    assert (edges[below] < SMALLEST[tokens[below] + 1]).all()
    small = np.arange(1 << 16, dtype=np.uint16)
    assert (tokens_of(small) == tokens_of(small.astype(np.uint32))).all()


@given(st.lists(st.integers(0, 10**6), min_size=240, max_size=240))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_frequencies_add_up(counts: list[int]) -> None:
    frequencies = scaled_frequencies(np.array(counts))
    assert frequencies.sum() == SCALE
    assert all(f > 0 for f, count in zip(frequencies, counts, strict=True) if count) or not any(counts)


# --- as few bytes as theory allows


def entropy(base: torch.Tensor, finetuned: torch.Tensor) -> float:
    """Bits for each number that the steps take, given the base's exponent."""
    pairs = exponents(base).numpy().astype(np.int64) << 32 | steps(base, finetuned).numpy().view(np.uint16)
    total = 0.0
    for values, sign in ((pairs, -1), (pairs >> 32, 1)):
        counts = np.unique(values, return_counts=True)[1]
        total += sign * float((counts * np.log2(counts)).sum())
    return total / base.numel()


def test_within_five_percent_of_the_entropy() -> None:
    base = (0.02 * noise((1024, 1024))).bfloat16()
    finetuned = (base.float() + 1e-4 * noise((1024, 1024), 1)).bfloat16()
    least = entropy(base, finetuned)
    assert least < bits_of(encode_exact(base, finetuned), base) < 1.05 * least


def test_two_percent_of_changes_take_less_than_three_tenths_of_a_bit() -> None:
    base = (0.02 * noise((1024, 1024))).bfloat16()
    data = encode_exact(base, changed(base, 0.02))
    assert data[1] == SPARSE and bits_of(data, base) < 0.2


def test_where_changes_are_likely_is_known_from_the_base() -> None:
    """An optimiser's small step moves small numbers only: the others are further apart than the step is long."""
    base = (0.02 * noise((1024, 1024))).bfloat16()
    finetuned = (base.float() + 1e-6 * noise((1024, 1024), 1)).bfloat16()
    share = float((base != finetuned).float().mean())
    anywhere = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
    assert bits_of(encode_exact(base, finetuned), base) < 0.7 * anywhere


def test_rows_and_blocks_without_changes_cost_nothing() -> None:
    base = (0.02 * noise((4096, 256))).bfloat16()
    finetuned = base.clone()
    finetuned[100:110] = (base[100:110].float() * 1.01).bfloat16()
    alone = encode_exact(base[100:110], finetuned[100:110])
    assert len(encode_exact(base, finetuned)) < len(alone) + 150
    assert len(encode_exact(base, base)) < 120
    block = base.clone()
    block[1024:2048, 64:128] = (base[1024:2048, 64:128].float() * 1.01).bfloat16()
    of_block = encode_exact(base[1024:2048, 64:128], block[1024:2048, 64:128])
    assert len(encode_exact(base, block)) < len(of_block) + 500


def test_never_more_than_the_tensor() -> None:
    base, finetuned = random_bits((64, 64), torch.bfloat16, 1), random_bits((64, 64), torch.bfloat16, 2)
    assert len(encode_exact(base, finetuned)) <= tensor_bytes(finetuned).size + 28


# --- a file by an enemy

BASE = (0.02 * noise((64, 48))).bfloat16()
RECORDS = {
    coding: encode_exact(BASE, changed(BASE, 0.3) if coding != SPARSE else changed(BASE, 0.05), coding)
    for coding in (WHOLE, DENSE, SPARSE)
}


def refused(data: bytes, match: str = "tensor", base: torch.Tensor = BASE) -> None:
    with pytest.raises(DeltaFormatError, match=match):
        restored(data, base, torch.bfloat16)


@pytest.mark.parametrize("coding", list(RECORDS))
def test_every_truncation_is_refused(coding: int) -> None:
    data = RECORDS[coding]
    for length in range(0, len(data), 7):
        refused(data[:length])
        stated = data[:12] + length.to_bytes(8, "little") + data[20:]
        refused(stated[:length])  # with a length that fits
    refused(data + b"\0")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(coding=st.sampled_from(list(RECORDS)), data=st.data())
def test_damage_never_gives_another_tensor(coding: int, data: st.DataObject) -> None:
    record = bytearray(RECORDS[coding])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, len(record) - 1), st.integers(0, 150)))
        record[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        decoded = restored(bytes(record), BASE, torch.bfloat16)
    except DeltaFormatError as error:
        assert str(error).startswith("tensor")
        return
    assert same_bits(decoded, restored(RECORDS[coding], BASE, torch.bfloat16))


def with_(offset: int, layout: str, value: int, data: bytes = RECORDS[DENSE]) -> bytes:
    changed = bytearray(data)
    struct.pack_into(layout, changed, offset, value)
    return bytes(changed)


CLASSES = RECORDS[DENSE][29] - RECORDS[DENSE][28] + 1  # bytes of the map from exponents to classes
NUMBERS = 30 + CLASSES  # where the coded numbers begin
COUNT = int.from_bytes(RECORDS[DENSE][NUMBERS : NUMBERS + 2], "little")
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "another layout": (lambda: with_(0, "<B", 9), "unknown exact record"),
    "another coding": (lambda: with_(1, "<B", 3), "unknown exact record"),
    "another size of numbers": (lambda: with_(2, "<B", 4), "numbers of 4 bytes"),
    "unknown flags": (lambda: with_(3, "<B", 4), "unknown exact record"),
    "another shape": (lambda: with_(4, "<I", 65), "65x48"),
    "another length": (lambda: with_(12, "<Q", 1 << 60), "has 1152921504606846976 bytes"),
    "another checksum": (lambda: with_(20, "<Q", 1), "checksum differs"),
    "exponents in the wrong order": (lambda: with_(28, "<H", 0x0005), "exponents 5 to 0"),
    "a class without a table": (lambda: with_(30, "<B", 200), "no table for class 200"),
    "no classes": (lambda: with_(NUMBERS, "<H", 0), "0 classes"),
    "too many classes": (lambda: with_(NUMBERS, "<H", 257), "257 classes"),
    "no steps": (lambda: with_(NUMBERS + 2, "<H", 0), "lanes of 0 numbers"),
    "no lanes": (lambda: with_(NUMBERS + 4, "<I", 0), "in 0 lanes"),
    "a block for every number": (lambda: blocks_of_one(), "in 1 lanes"),
    "words without end": (lambda: with_(NUMBERS + 8, "<Q", 1 << 62), "lanes of coded numbers"),
    "low bits without end": (lambda: with_(NUMBERS + 16, "<Q", 1 << 62), "record ends"),
    "a token of a larger number": (lambda: with_(NUMBERS + 24, "<B", 239), "token"),
    "frequencies that do not add up": (lambda: with_(NUMBERS + 24 + 2 * COUNT, "<B", 0xA5), "add up"),
}


def blocks_of_one() -> bytes:
    """Lanes and steps with which a reader would work on one number at a time."""
    data = bytearray(RECORDS[DENSE])
    struct.pack_into("<HI", data, NUMBERS + 2, 1, 1)
    return bytes(data)


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_records(what: str) -> None:
    make, match = HOSTILE[what]
    refused(make(), match)


def test_more_changes_than_numbers() -> None:
    data = RECORDS[SPARSE]
    changes = 30 + data[29] - data[28] + 1
    for number, match in ((64 * 48 + 1, "changes in"), (2**32 - 1, "changes in")):
        refused(with_(changes, "<I", number, data), match)


def test_changes_beyond_the_last_number() -> None:
    """Gaps that lead out of the tensor: a record for a larger one, with this one's shape."""
    large = (0.02 * noise((640, 48))).bfloat16()
    finetuned = large.clone()
    finetuned[-1] += 1
    for coding in (SPARSE, DENSE):
        refused(with_(4, "<I", 64, encode_exact(large, finetuned, coding)), "639 of 64")
    everywhere = changed(large, 0.05)  # in all rows, so that none is left out
    data = encode_exact(large, everywhere, SPARSE)
    assert data[3] == 0
    base = large[:600]  # has fewer numbers than the record has changes and gaps for
    refused(with_(4, "<I", 600, data), "more numbers than the base has", base)


def test_a_record_of_steps_needs_a_base_with_steps() -> None:
    data = encode_exact(BASE, changed(BASE, 0.3), DENSE)
    refused(data, "no steps|has none", torch.zeros(64, 48, dtype=torch.int16))


def test_parsing_needs_no_base() -> None:
    record = parse_exact(np.frombuffer(RECORDS[DENSE], np.uint8), (64, 48), 2, "tensor")
    assert (record.rows, record.columns, record.length) == (64, 48, len(RECORDS[DENSE]))
