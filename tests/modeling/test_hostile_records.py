"""Records that are damaged, or made by an enemy who recomputes every checksum."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.forged_files import DELTA, UP, forge_record, read_entries, replace
from support.hostile import FUZZ, refuses
from support.loaded_models import decode_all
from support.messages import naming
from support.tiny_models import Pair

from impart_hf import DareConfig, ImPartConfig, LowRankConfig, compress
from impart_hf.modeling.codebook import BFLOAT16, FLOAT16
from impart_hf.modeling.delta_decode import add_delta, decode_record
from impart_hf.modeling.delta_record import (
    DIRECT,
    FACTORED,
    KEEP_ALL,
    KEEP_PER_COLUMN,
    KEEP_SHARED,
    DeltaFormatError,
    Record,
    Segment,
    pack_record,
    parse_record,
)

pytestmark = pytest.mark.usefixtures("little_memory")
UP_SHAPE = (128, 64)


# --- hostile records with checksums that hold


def patched(offset: int, layout: str, *values: Any) -> Callable[[bytes], bytes]:
    """Overwrites numbers of the record; offsets as in docs/FORMAT.md."""

    def patch(data: bytes) -> bytes:
        out = bytearray(data)
        struct.pack_into(layout, out, offset, *values)
        return bytes(out)

    return patch


def resized(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Changes the record's bytes, and lets its own length field say so."""

    def patch(data: bytes) -> bytes:
        out = bytearray(change(data))
        struct.pack_into("<I", out, 28, len(out))
        return bytes(out)

    return patch


def rewritten(**changes: Any) -> Callable[[bytes], bytes]:
    """The record parsed, fields replaced, and packed again without any check."""

    def patch(data: bytes) -> bytes:
        record, _ = parse_record(np.frombuffer(data, np.uint8), UP_SHAPE, UP)
        for name, value in changes.items():
            setattr(record, name, value(record) if callable(value) else value)
        return pack_record(record)

    return patch


LAYOUT, RESERVED, COUNT, ROWS, COLUMNS, RANK, SCALE, ERROR, LENGTH, SEGMENT = 0, 1, 2, 4, 8, 12, 20, 24, 28, 32
HUGE = 0xFFFFFFFF
HOSTILE_RECORDS: dict[str, tuple[Callable[[bytes], bytes], Any]] = {
    "layout 0": (patched(LAYOUT, "<B", 0), "layout 0"),
    "layout 3": (patched(LAYOUT, "<B", 3), "layout 3"),
    "reserved byte": (patched(RESERVED, "<B", 1), "layout"),
    "huge rows": (patched(ROWS, "<I", HUGE), "4294967295x64"),
    "huge columns": (patched(COLUMNS, "<I", HUGE), "128x4294967295"),
    "huge both": (patched(ROWS, "<II", HUGE, HUGE), "4294967295x4294967295"),
    "no rows": (patched(ROWS, "<I", 0), "0x64"),
    "transposed": (patched(ROWS, "<II", 64, 128), "64x128"),
    "huge rank": (patched(RANK, "<I", HUGE), "rank 4294967295"),
    "rank over both sides": (patched(RANK, "<I", 65), "rank 65"),
    "rank of no segments": (patched(RANK, "<I", 1), ("segments", "1 columns")),
    "most segments": (patched(COUNT, "<H", 0xFFFF), ()),
    "no segments": (patched(COUNT, "<H", 0), ("segments", "columns")),
    "scale NaN": (patched(SCALE, "<f", math.nan), ("scale", "nan")),
    "scale infinite": (patched(SCALE, "<f", math.inf), ("scale", "inf")),
    "scale overflows": (
        rewritten(scale=3e38, sigma=lambda r: np.full_like(r.sigma, 65504)),
        "NaN",
    ),
    "error NaN": (patched(ERROR, "<f", math.nan), ("error", "nan")),
    "length 0": (patched(LENGTH, "<I", 0), "0 bytes"),
    "length under the header": (patched(LENGTH, "<I", 31), "31 bytes"),
    "length huge": (patched(LENGTH, "<I", HUGE), "4294967295 bytes"),
    "segment huge": (patched(SEGMENT, "<I", HUGE), ("segments", "columns")),
    "segment empty": (patched(SEGMENT, "<I", 0), "column segment"),
    "width 0": (patched(SEGMENT + 4, "<B", 0), "column segment"),
    "width 9": (patched(SEGMENT + 4, "<BB", 9, 9), "column segment"),
    "width 18": (patched(SEGMENT + 4, "<BB", 18, 18), "column segment"),
    "width of V missing": (patched(SEGMENT + 5, "<B", 0), "column segment"),
    "floats and levels mixed": (patched(SEGMENT + 4, "<BB", FLOAT16, 4), ("codes", "more than", "masks")),
    "levels without scales": (patched(SEGMENT + 4, "<BB", 8, 8), ()),
    "keep 3": (patched(SEGMENT + 6, "<B", 3), "column segment"),
    "scales that are not there": (patched(SEGMENT + 7, "<B", 1), ("codes", "fewer than", "masks")),
    "a flag that is neither": (patched(SEGMENT + 7, "<B", 2), "column segment"),
    "thresholds that are not there": (patched(SEGMENT + 6, "<B", KEEP_PER_COLUMN), ("codes", "masks")),
    "shared threshold not there": (patched(SEGMENT + 6, "<B", KEEP_SHARED), ("codes", "masks")),
    "direct in name": (patched(LAYOUT, "<B", DIRECT), "rank"),
    "direct with a side V": (patched(LAYOUT, "<B15xI", DIRECT, 0), ()),
    "too short by a byte": (resized(lambda data: data[:-1]), ("codes", "fewer than", "masks")),
    "too short by half": (resized(lambda data: data[: len(data) // 2]), ("codes", "fewer than", "masks")),
    "only a header": (resized(lambda data: data[:32]), "byte 32"),
    "too long by a byte": (resized(lambda data: data + b"\0"), ("codes", "more than", "masks")),
    "too long by much": (resized(lambda data: data + bytes(10_000)), ("codes", "more than", "masks")),
    "half a header": (lambda data: data[:31], "31 bytes"),
    "nothing": (lambda data: b"", "0 bytes"),
    "a byte after the record": (lambda data: data + b"\0", ("1 bytes", "record")),
    "a second record": (lambda data: data + data, ("bytes", "record")),
    "segments that wrap around": (
        rewritten(segments=lambda r: [Segment(HUGE, 16, 16), Segment(r.rank + 1, 16, 16)], column_scales=[None, None]),
        ("segments", "columns"),
    ),
    "65535 empty segments": (
        rewritten(segments=[Segment(0, 16, 16)] * 0xFFFF, column_scales=[None] * 0xFFFF),
        "column segment",
    ),
    "sigma NaN": (rewritten(sigma=lambda r: r.sigma * np.float16(math.nan)), ("singular value", "scale", "finite")),
    "sigma infinite": (rewritten(sigma=lambda r: r.sigma / np.float16(0)), ("singular value", "scale", "finite")),
    "too many sigmas": (rewritten(sigma=lambda r: np.append(r.sigma, r.sigma)), ("codes", "more than")),
    "codes NaN": (rewritten(codes=lambda r: np.full_like(r.codes, 0xFF)), ("value", "finite")),
    "codes infinite": (
        rewritten(codes=lambda r: np.frombuffer(b"\x00\x7c" * (len(r.codes) // 2), np.uint8)),
        ("value", "finite"),
    ),
    "thresholds keep least": (
        rewritten(
            segments=lambda r: [Segment(r.rank, 16, 16, KEEP_PER_COLUMN)],
            thresholds=lambda r: np.zeros(r.rank, np.uint16),
        ),
        ("codes", "more than", "masks"),
    ),
    "levels with scales that are not finite": (
        rewritten(
            segments=lambda r: [Segment(r.rank, 4, 4, KEEP_ALL, 1)],
            column_scales=lambda r: [np.full((2, r.rank), np.inf, np.float16)],
            codes=lambda r: np.zeros(-(-r.rank * 128 // 2) + -(-r.rank * 64 // 2), np.uint8),
        ),
        ("singular value", "scale", "finite"),
    ),
}


@pytest.mark.parametrize("case", HOSTILE_RECORDS)
def test_hostile_records(repository: Path, case: str) -> None:
    edit, names = HOSTILE_RECORDS[case]
    with np.errstate(all="ignore"):
        forge_record(repository, edit)
    with pytest.raises(DeltaFormatError, match=naming(UP, names)):
        decode_all(repository)


def test_hostile_direct_records(tiny_pair: Pair, tmp_path: Path) -> None:
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / "delta", DareConfig(4))
    original = (tmp_path / "delta" / DELTA).read_bytes()
    for edit, names in (
        (patched(RANK, "<I", 1), "rank 1"),
        (patched(SEGMENT + 5, "<B", FLOAT16), "column segment"),
        (patched(SEGMENT, "<I", 127), ("segments", "128 columns")),
        (patched(SEGMENT + 8, "<H", 0xFFFF), ("codes", "fewer than", "masks")),
        (patched(SEGMENT + 8, "<H", 0), ("codes", "more than", "masks")),
        (patched(SCALE, "<f", 3.4e38), None),
    ):
        replace(tmp_path / "delta" / DELTA, original)
        forge_record(tmp_path / "delta", edit)
        if names is None:
            # The largest scale on values of at most 1 may stay just inside the range.
            assert refuses_or_finite(tmp_path / "delta")
        else:
            refuses(tmp_path / "delta", naming(UP, names))


def refuses_or_finite(folder: Path) -> bool:
    try:
        return all(bool(torch.isfinite(t.float()).all()) for t in decode_all(folder).values())
    except DeltaFormatError:
        return True


def parse_and_decode(data: bytes, shape: tuple[int, int]) -> torch.Tensor | None:
    """The decoded record, or None where it was refused as it should be."""
    try:
        record, length = parse_record(np.frombuffer(data, np.uint8), shape, "the tensor")
        assert 0 < length <= len(data)
        decoded = decode_record(record, "the tensor")
    except DeltaFormatError as error:
        assert str(error).startswith("the tensor")
        return None
    assert decoded.shape == shape and decoded.dtype == torch.float32
    return decoded


@FUZZ
@given(data=st.binary(max_size=600), shape=st.tuples(st.integers(0, 70), st.integers(0, 70)))
def test_arbitrary_bytes_as_a_record(data: bytes, shape: tuple[int, int]) -> None:
    parse_and_decode(data, shape)


numbers = st.one_of(st.integers(0, 70), st.integers(0, HUGE))
widths = st.one_of(st.integers(0, 18), st.sampled_from([1, 4, 8, 16, 17]))


@settings(FUZZ, max_examples=800)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    layout=st.sampled_from([FACTORED, FACTORED, DIRECT, 0]),
    fit=st.booleans(),
    rank=numbers,
    seed=numbers,
    scale=st.floats(width=32),
    segments=st.lists(st.tuples(st.integers(0, 12), widths, widths, st.integers(0, 3)), max_size=4),
    tail=st.binary(max_size=400),
    length=st.one_of(st.none(), numbers),
)
def test_records_that_nearly_make_sense(
    shape: tuple[int, int], layout: int, fit: bool, rank: int, seed: int, scale: float,
    segments: list[tuple[int, int, int, int]], tail: bytes, length: int | None,
) -> None:  # fmt: skip
    if fit:  # get past the first checks
        rank = sum(s[0] for s in segments) if layout == FACTORED else 0
        segments = [(n, u, u if layout == FACTORED else 0, keep) for n, u, _, keep in segments]
    body = b"".join(struct.pack("<IBBBB", *s, 0) for s in segments) + tail
    total = 32 + len(body) if length is None else length
    header = struct.pack("<BBHIIIIffI", layout, 0, len(segments), *shape, rank, seed, scale, 0.5, total)
    parse_and_decode(header + body, shape)


@settings(FUZZ, max_examples=150)
@given(data=st.data())
@pytest.mark.parametrize("method", [ImPartConfig(4), LowRankConfig(4), DareConfig(4)], ids=lambda m: m.name)
def test_mutated_records(method: Any, data: st.DataObject) -> None:
    """Real records, some bytes changed: refused, or numbers that are finite."""
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(70, 80, generator=generator)
    record = bytearray(method.encode(delta, 4000, 5).data)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, min(80, len(record) - 1)), st.integers(0, len(record) - 1)))
        record[at] = data.draw(st.integers(0, 255))
    base = torch.randn(70, 80, generator=generator)
    for dtype in (torch.float32, torch.float16):
        try:
            out = add_delta(base.to(dtype), np.frombuffer(bytes(record), np.uint8), "the tensor", dtype)
        except DeltaFormatError as error:
            assert str(error).startswith("the tensor")
            continue
        assert out.shape == base.shape and bool(torch.isfinite(out).all())


def test_records_of_no_components_with_codes() -> None:
    empty = Record(FACTORED, 5, 7, 0, 0, 1.0, 0.0, [], np.empty(0, "<f2"), np.empty(0, "<u2"), [], np.zeros(3, "u1"))
    with pytest.raises(DeltaFormatError, match=naming("t", "3 bytes", "codes", "more than")):
        decode_record(parse_record(np.frombuffer(pack_record(empty), np.uint8), (5, 7), "t")[0], "t")


def test_the_largest_record_that_is_allowed_takes_memory_like_its_base() -> None:
    """One bit a value, everything kept, full rank: the most memory for the fewest bytes in the file."""
    side = 512
    codes = np.zeros(2 * side * side // 8, np.uint8)
    record = Record(
        FACTORED, side, side, side, 0, 1.0, 0.0, [Segment(side, 1, 1, KEEP_ALL)], np.ones(side, np.float16),
        np.full(side, 0xFFFF, np.uint16), [None], codes,
    )  # fmt: skip
    assert parse_and_decode(pack_record(record), (side, side)) is not None  # in ROOM, as everything here


def test_bfloat16_codes_that_are_not_finite(tiny_pair: Pair, tmp_path: Path) -> None:
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / "d", LowRankConfig(3, value_dtype="bfloat16"))
    record = read_entries(tmp_path / "d" / DELTA)[f"{UP}.delta"][2]
    assert record[SEGMENT + 4] == BFLOAT16
    forge_record(tmp_path / "d", lambda data: data[:-2] + b"\x80\xff")
    refuses(tmp_path / "d", naming(UP, "value", "finite"))
