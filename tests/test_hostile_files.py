"""Delta repositories that are damaged, or made by an enemy who recomputes every checksum.

Each of them must give an error that names the tensor or the file; or, where the change meant nothing, the very same
model. Never a crash, a hang, or an allocation that the base model does not account for.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forged_files import DELTA, UP, Entries, forge, forge_record, header_of, read_entries, replace, write_file
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import Pair, edit_json, edit_tensors, load_tensors
from transformers import AutoModelForCausalLM

from impart_hf import DareConfig, ImPartConfig, LowRankConfig, compress
from impart_hf.modeling.checkpoints import CheckpointError, HubOptions
from impart_hf.modeling.delta_decode import add_delta, decode_record
from impart_hf.modeling.delta_record import (
    BFLOAT16,
    DIRECT,
    FACTORED,
    FLOAT16,
    KEEP_ALL,
    KEEP_PER_COLUMN,
    KEEP_SHARED,
    DeltaFormatError,
    Record,
    Segment,
    pack_record,
    parse_record,
)
from impart_hf.modeling.delta_repository import WrongBaseError
from impart_hf.reconstruct import open_repository

ERRORS = (DeltaFormatError, CheckpointError, WrongBaseError)
NORM = "model.norm.weight"
UP_SHAPE = (128, 64)
# Beside what the process has already. A repository of the tiny model takes a few megabytes to open and decode.
ROOM = 300 << 20
FUZZ = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def expected(tiny_repository: Path) -> dict[str, torch.Tensor]:
    """The tensors that the unspoilt repository stands for."""
    return decode_all(tiny_repository)


@pytest.fixture(autouse=True)
def little_memory(expected: dict[str, torch.Tensor]) -> Iterator[None]:
    """No test here may allocate more than ROOM: the kernel then refuses, and torch raises a RuntimeError.

    `expected` comes first, for thread pools and libraries to take their share.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def repository(tiny_repository: Path, tmp_path: Path) -> Path:
    """A copy of the tiny repository that a test may spoil."""
    return Path(shutil.copytree(tiny_repository, tmp_path / "delta"))


def decode_all(folder: Path, base: str | None = None) -> dict[str, torch.Tensor]:
    opened = open_repository(str(folder), HubOptions(), base)
    return {name: opened.tensor(name) for name in opened.names()}


def refuses(folder: Path, match: str, error: type[Exception] | tuple[type[Exception], ...] = DeltaFormatError) -> None:
    started = time.monotonic()
    with pytest.raises(error, match=match):
        decode_all(folder)
    assert time.monotonic() - started < 10


def refuses_or_is_the_same(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    """Whether it was refused; fails if the model that comes back is another one."""
    try:
        tensors = decode_all(folder)
    except ERRORS as error:
        assert str(error)
        return True
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    return False


def test_forging_alone_is_not_noticed(repository: Path, expected: dict[str, torch.Tensor]) -> None:
    """What shows that the tests below fail for the reason that they state."""
    forge_record(repository, lambda data: data)
    assert refuses_or_is_the_same(repository, expected) is False


# --- damage


@FUZZ
@given(data=st.data())
def test_random_damage(
    tiny_repository: Path,
    expected: dict[str, torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    original = (tiny_repository / DELTA).read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    damaged = bytearray(original)
    # Half of the damage to the header, where it is cleverest.
    place = st.one_of(st.integers(0, header - 1), st.integers(0, len(original) - 1))
    for _ in range(data.draw(st.integers(1, 3))):
        at = min(data.draw(place), len(damaged) - 1)
        how = data.draw(st.sampled_from(["bit", "byte", "cut", "drop", "insert"]))
        if how == "bit":
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "byte":
            damaged[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del damaged[max(1, at) :]
        elif how == "drop":
            del damaged[at : at + data.draw(st.integers(1, 16))]
        else:
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=16))
        damaged = damaged or bytearray(1)
    folder = tmp_path_factory.mktemp("damaged", numbered=True)
    for path in tiny_repository.iterdir():
        if path.name != DELTA:
            (folder / path.name).symlink_to(path)
    replace(folder / DELTA, damaged)
    refused = refuses_or_is_the_same(folder, expected)
    assert refused or len(damaged) == len(original)
    shutil.rmtree(folder)


def test_every_kind_of_truncation(repository: Path) -> None:
    data = (repository / DELTA).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        replace(repository / DELTA, data[:length])
        refuses(repository, f"{DELTA} is damaged or not a safetensors file")


def test_one_bit_in_every_entry(repository: Path) -> None:
    data = (repository / DELTA).read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        for at in (entry["data_offsets"][0], entry["data_offsets"][1] - 1):
            damaged = bytearray(data)
            damaged[size + at] ^= 16
            replace(repository / DELTA, damaged)
            refuses(repository, "delta entry .* is damaged" if name == "crc32" else f"delta entry {name} is damaged")


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
HOSTILE_RECORDS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "layout 0": (patched(LAYOUT, "<B", 0), "unknown record layout 0"),
    "layout 3": (patched(LAYOUT, "<B", 3), "unknown record layout 3"),
    "reserved byte": (patched(RESERVED, "<B", 1), "unknown record layout"),
    "huge rows": (patched(ROWS, "<I", HUGE), "the record is for a 4294967295x64 matrix"),
    "huge columns": (patched(COLUMNS, "<I", HUGE), "the record is for a 128x4294967295 matrix"),
    "huge both": (patched(ROWS, "<II", HUGE, HUGE), "the record is for a 4294967295x4294967295 matrix"),
    "no rows": (patched(ROWS, "<I", 0), "the record is for a 0x64 matrix"),
    "transposed": (patched(ROWS, "<II", 64, 128), "the record is for a 64x128 matrix"),
    "huge rank": (patched(RANK, "<I", HUGE), "rank 4294967295 is impossible"),
    "rank over both sides": (patched(RANK, "<I", 65), "rank 65 is impossible"),
    "rank of no segments": (patched(RANK, "<I", 1), "the segments do not add up to 1 columns"),
    "most segments": (patched(COUNT, "<H", 0xFFFF), "needs|unknown storage"),
    "no segments": (patched(COUNT, "<H", 0), "the segments do not add up"),
    "scale NaN": (patched(SCALE, "<f", math.nan), "the record's scale is nan"),
    "scale infinite": (patched(SCALE, "<f", math.inf), "the record's scale is inf"),
    "scale overflows": (
        rewritten(scale=3e38, sigma=lambda r: np.full_like(r.sigma, 65504)),
        f"{UP} decodes to NaN or infinity",
    ),
    "error NaN": (patched(ERROR, "<f", math.nan), "relative error nan"),
    "length 0": (patched(LENGTH, "<I", 0), "claims 0 bytes"),
    "length under the header": (patched(LENGTH, "<I", 31), "claims 31 bytes"),
    "length huge": (patched(LENGTH, "<I", HUGE), "claims 4294967295 bytes"),
    "segment huge": (patched(SEGMENT, "<I", HUGE), "the segments do not add up"),
    "segment empty": (patched(SEGMENT, "<I", 0), "unknown storage of a column segment"),
    "width 0": (patched(SEGMENT + 4, "<B", 0), "unknown storage of a column segment"),
    "width 9": (patched(SEGMENT + 4, "<BB", 9, 9), "unknown storage of a column segment"),
    "width 18": (patched(SEGMENT + 4, "<BB", 18, 18), "unknown storage of a column segment"),
    "width of V missing": (patched(SEGMENT + 5, "<B", 0), "unknown storage of a column segment"),
    "floats and levels mixed": (patched(SEGMENT + 4, "<BB", FLOAT16, 4), "codes are more than the masks keep"),
    "levels without scales": (patched(SEGMENT + 4, "<BB", 8, 8), UP),
    "keep 3": (patched(SEGMENT + 6, "<B", 3), "unknown storage of a column segment"),
    "scales that are not there": (patched(SEGMENT + 7, "<B", 1), "codes are fewer than the masks keep"),
    "a flag that is neither": (patched(SEGMENT + 7, "<B", 2), "unknown storage of a column segment"),
    "thresholds that are not there": (patched(SEGMENT + 6, "<B", KEEP_PER_COLUMN), "codes are (fewer|more) than"),
    "shared threshold not there": (patched(SEGMENT + 6, "<B", KEEP_SHARED), "codes are (fewer|more) than"),
    "direct in name": (patched(LAYOUT, "<B", DIRECT), "rank .* is impossible"),
    "direct with a side V": (patched(LAYOUT, "<B15xI", DIRECT, 0), UP),
    "too short by a byte": (resized(lambda data: data[:-1]), "codes are fewer than the masks keep"),
    "too short by half": (resized(lambda data: data[: len(data) // 2]), "codes are fewer than the masks keep"),
    "only a header": (resized(lambda data: data[:32]), "the record ends at byte 32"),
    "too long by a byte": (resized(lambda data: data + b"\0"), "codes are more than the masks keep"),
    "too long by much": (resized(lambda data: data + bytes(10_000)), "codes are more than the masks keep"),
    "half a header": (lambda data: data[:31], "31 bytes are too few for a record"),
    "nothing": (lambda data: b"", "0 bytes are too few for a record"),
    "a byte after the record": (lambda data: data + b"\0", "1 bytes follow the last record"),
    "a second record": (lambda data: data + data, "bytes follow the last record"),
    "segments that wrap around": (
        rewritten(segments=lambda r: [Segment(HUGE, 16, 16), Segment(r.rank + 1, 16, 16)], column_scales=[None, None]),
        "the segments do not add up",
    ),
    "65535 empty segments": (
        rewritten(segments=[Segment(0, 16, 16)] * 0xFFFF, column_scales=[None] * 0xFFFF),
        "unknown storage of a column segment",
    ),
    "sigma NaN": (rewritten(sigma=lambda r: r.sigma * np.float16(math.nan)), "a singular value or scale is not finite"),
    "sigma infinite": (rewritten(sigma=lambda r: r.sigma / np.float16(0)), "a singular value or scale is not finite"),
    "too many sigmas": (rewritten(sigma=lambda r: np.append(r.sigma, r.sigma)), "codes are more than"),
    "codes NaN": (rewritten(codes=lambda r: np.full_like(r.codes, 0xFF)), "a stored value is not finite"),
    "codes infinite": (
        rewritten(codes=lambda r: np.frombuffer(b"\x00\x7c" * (len(r.codes) // 2), np.uint8)),
        "a stored value is not finite",
    ),
    "thresholds keep least": (
        rewritten(
            segments=lambda r: [Segment(r.rank, 16, 16, KEEP_PER_COLUMN)],
            thresholds=lambda r: np.zeros(r.rank, np.uint16),
        ),
        "codes are more than the masks keep",
    ),
    "levels with scales that are not finite": (
        rewritten(
            segments=lambda r: [Segment(r.rank, 4, 4, KEEP_ALL, 1)],
            column_scales=lambda r: [np.full((2, r.rank), np.inf, np.float16)],
            codes=lambda r: np.zeros(-(-r.rank * 128 // 2) + -(-r.rank * 64 // 2), np.uint8),
        ),
        "a singular value or scale is not finite",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_RECORDS)
def test_hostile_records(repository: Path, case: str) -> None:
    edit, match = HOSTILE_RECORDS[case]
    with np.errstate(all="ignore"):
        forge_record(repository, edit)
    with pytest.raises(DeltaFormatError, match=match) as caught:
        decode_all(repository)
    assert UP in str(caught.value)


def test_hostile_direct_records(tiny_pair: Pair, tmp_path: Path) -> None:
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / "delta", DareConfig(4))
    original = (tmp_path / "delta" / DELTA).read_bytes()
    for edit, match in (
        (patched(RANK, "<I", 1), "rank 1 is impossible"),
        (patched(SEGMENT + 5, "<B", FLOAT16), "unknown storage"),
        (patched(SEGMENT, "<I", 127), "do not add up to 128 columns"),
        (patched(SEGMENT + 8, "<H", 0xFFFF), "codes are fewer than the masks keep"),
        (patched(SEGMENT + 8, "<H", 0), "codes are more than the masks keep"),
        (patched(SCALE, "<f", 3.4e38), f"{UP} decodes to NaN or infinity|{UP}"),
    ):
        replace(tmp_path / "delta" / DELTA, original)
        forge_record(tmp_path / "delta", edit)
        if match.startswith(UP):
            # The largest scale on values of at most 1 may stay just inside the range.
            assert refuses_or_finite(tmp_path / "delta")
        else:
            refuses(tmp_path / "delta", match)


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
    with pytest.raises(DeltaFormatError, match="3 bytes of codes are more than the masks keep"):
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


# --- hostile files with checksums that hold


def put(name: str, dtype: str, shape: list[int], data: bytes) -> Callable[[Entries], None]:
    return lambda entries: entries.update({name: (dtype, shape, data)})


def moved(old: str, new: str) -> Callable[[Entries], None]:
    return lambda entries: entries.update({new: entries.pop(old)})


HOSTILE_ENTRIES: dict[str, tuple[Callable[[Entries], Any], str]] = {
    "records of a vector": (
        lambda e: e.update({f"{NORM}.delta": e.pop(f"{UP}.delta")}) or e.pop(NORM), f"{NORM} has records, but its shape"
    ),
    "records of no tensor": (moved(f"{UP}.delta", "model.layers.9.mlp.up_proj.weight.delta"), "belongs to no tensor"),
    "records of another tensor": (
        lambda e: e.update({f"{UP}.delta": e["model.layers.0.self_attn.q_proj.weight.delta"]}),
        f"{UP}: the record is for a 64x64 matrix",
    ),
    "unknown tensor": (put("surprise", "F32", [1], bytes(4)), "delta entry surprise belongs to no tensor"),
    "unknown rows": (put("surprise.added_rows", "F32", [1, 1], bytes(4)), "surprise.added_rows belongs to no tensor"),
    "records of signed bytes": (
        lambda e: e.update({f"{UP}.delta": ("I8", *e[f"{UP}.delta"][1:])}), f"{UP}.delta should be a row of bytes"
    ),
    "records in two dimensions": (
        lambda e: e.update({f"{UP}.delta": ("U8", [1, len(e[f"{UP}.delta"][2])], e[f"{UP}.delta"][2])}),
        f"{UP}.delta should be a row of bytes",
    ),
    "replaced and changed": (put(UP, "BF16", [128, 64], bytes(128 * 64 * 2)), f"{UP} is both replaced and changed"),
    "replaced by another shape": (put(NORM, "BF16", [32], bytes(64)), f"{NORM} has shape"),
    "replaced by two dimensions": (put(NORM, "BF16", [1, 64], bytes(128)), f"{NORM} has shape"),
    "replaced by whole numbers": (put(NORM, "I16", [64], bytes(128)), f"{NORM} does not go with torch.bfloat16"),
    "replaced by 8-bit floats": (put(NORM, "F8_E4M3", [64], bytes(64)), f"{NORM} has the unknown dtype F8_E4M3"),
    "replaced by NaN": (put(NORM, "BF16", [64], b"\xff\x7f" * 64), f"{NORM} holds NaN or infinity"),
    "replaced by infinity": (put(NORM, "BF16", [64], b"\x80\x7f" * 64), f"{NORM} holds NaN or infinity"),
    "added rows too narrow": (
        put("lm_head.weight.added_rows", "BF16", [4, 32], bytes(256)), "lm_head.weight cannot grow by rows of shape"
    ),
    "added rows in one dimension": (
        put("lm_head.weight.added_rows", "BF16", [64], bytes(128)), "lm_head.weight cannot grow by rows of shape"
    ),
    "added rows of another dtype": (
        put("lm_head.weight.added_rows", "F32", [4, 64], bytes(1024)), "rows added to lm_head.weight have another dtype"
    ),
    "added rows of NaN": (
        put("lm_head.weight.added_rows", "BF16", [4, 64], b"\xff\x7f" * 256), "added_rows holds NaN or infinity"
    ),
    "rows added to a vector": (
        put(f"{NORM}.added_rows", "BF16", [4, 64], bytes(512)), f"{NORM} cannot grow by rows of shape"
    ),
    "no checksums of the base": (lambda e: e.pop("base_checksums"), "has no checksums of its base"),
    "checksums of another dtype": (
        lambda e: e.update(base_checksums=("I64", *e["base_checksums"][1:])), "has no checksums of its base"
    ),
    "checksums as a number": (put("base_checksums", "U64", [], bytes(8)), "has no checksums of its base"),
    "checksums in two dimensions": (
        lambda e: e.update(base_checksums=("U64", [1, *e["base_checksums"][1]], e["base_checksums"][2])),
        "has no checksums of its base",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_ENTRIES)
def test_hostile_entries(repository: Path, case: str) -> None:
    edit, match = HOSTILE_ENTRIES[case]
    forge(repository, edit)
    refuses(repository, match)


@pytest.mark.parametrize("rows", [0, 3])
def test_checksums_of_another_base(repository: Path, rows: int) -> None:
    forge(repository, put("base_checksums", "U64", [rows], bytes(8 * rows)))
    refuses(repository, "is not the base of .*: it has other tensors than", WrongBaseError)


@pytest.mark.parametrize(
    "edit",
    [
        lambda e: e.pop("crc32"),
        lambda e: e.update(crc32=("I32", *e["crc32"][1:])),
        lambda e: e.update(crc32=("U32", [e["crc32"][1][0] - 1], e["crc32"][2][4:])),
        lambda e: e.update(crc32=("U32", [1, *e["crc32"][1]], e["crc32"][2])),
        lambda e: e.update(crc32=("U32", [], bytes(4))),
        lambda e: e.update(crc32=("F8_E5M2", [4], bytes(4))),
    ],
    ids=["missing", "signed", "short", "two dimensions", "number", "8-bit floats"],
)
def test_hostile_checksum_tables(repository: Path, edit: Callable[[Entries], Any]) -> None:
    forge(repository, edit, checksums=False)
    refuses(repository, f"{DELTA}.* 'crc32' table")


HOSTILE_HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "overlap": lambda h: h[f"{UP}.delta"].update(data_offsets=[0, len_of(h, f"{UP}.delta")]),
    "hole": lambda h: h.pop(f"{UP}.delta"),
    "backwards": lambda h: h[f"{UP}.delta"].update(data_offsets=h[f"{UP}.delta"]["data_offsets"][::-1]),
    "beyond the end": lambda h: h[f"{UP}.delta"].update(data_offsets=[1 << 40, (1 << 40) + len_of(h, f"{UP}.delta")]),
    "negative": lambda h: h[f"{UP}.delta"].update(data_offsets=[-1, len_of(h, f"{UP}.delta") - 1]),
    "not a number": lambda h: h[f"{UP}.delta"].update(data_offsets=["0", "1"]),
    "shape that overflows": lambda h: h[f"{UP}.delta"].update(shape=[1 << 62, 1 << 62]),
    "shape that is too large": lambda h: h[f"{UP}.delta"].update(shape=[1 << 40]),
    "negative shape": lambda h: h[f"{UP}.delta"].update(shape=[-1]),
    "unknown dtype": lambda h: h[f"{UP}.delta"].update(dtype="X99"),
    "no dtype": lambda h: h[f"{UP}.delta"].pop("dtype"),
    "not an object": lambda h: h.update({f"{UP}.delta": 7}),
}


def len_of(header: dict[str, Any], name: str) -> int:
    start, stop = header[name]["data_offsets"]
    return stop - start


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
def test_hostile_headers(repository: Path, case: str) -> None:
    entries = read_entries(repository / DELTA)
    header = header_of(entries)
    HOSTILE_HEADERS[case](header)
    write_file(repository / DELTA, json.dumps(header).encode(), b"".join(data for _, _, data in entries.values()))
    refuses(repository, f"{DELTA} is damaged or not a safetensors file")


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"[]", b"7", b"\xff\xfe{}", b"[" * 50_000, b'{"a":' * 50_000, b"{}" + b" " * (1 << 20)],
    ids=["empty", "open", "list", "number", "not text", "deep list", "deep object", "nothing in it"],
)
def test_headers_that_are_none(repository: Path, header: bytes) -> None:
    write_file(repository / DELTA, header, b"")
    refuses(repository, DELTA)


@pytest.mark.parametrize("length", [1 << 24, 100_000_001, 1 << 62, (1 << 64) - 1])
def test_headers_longer_than_the_file(repository: Path, length: int) -> None:
    data = (repository / DELTA).read_bytes()
    replace(repository / DELTA, length.to_bytes(8, "little") + data[8:])
    refuses(repository, f"{DELTA} is damaged or not a safetensors file")


@pytest.mark.parametrize("same", [True, False])
def test_a_name_that_stands_in_the_header_twice(
    repository: Path, expected: dict[str, torch.Tensor], same: bool
) -> None:
    entries = read_entries(repository / DELTA)
    header = header_of(entries)
    text = json.dumps(header)
    twin = dict(header[f"{UP}.delta"])
    if not same:
        twin["data_offsets"] = header["model.layers.1.mlp.up_proj.weight.delta"]["data_offsets"]
        twin["shape"] = header["model.layers.1.mlp.up_proj.weight.delta"]["shape"]
    text = text[:-1] + f', "{UP}.delta": {json.dumps(twin)}}}'
    write_file(repository / DELTA, text.encode(), b"".join(data for _, _, data in entries.values()))
    refused = refuses_or_is_the_same(repository, expected)
    assert refused or same


# --- hostile configurations


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config": None},
        {"text_config": {}},
        {"text_config": {"model_type": "transformer-of-tomorrow"}},
        {"text_config": {"model_type": 7}},
        {"text_config": {"model_type": "delta_compressed"}},
        {"text_config": [1]},
        {"text_config": "llama"},
        {"format_version": 2},
        {"format_version": "1"},
        {"format_version": 0},
        {"tensor_dtype": "float99"},
        {"tensor_dtype": "Tensor"},
        {"tensor_dtype": "int8"},
        {"tensor_dtype": "__name__"},
        {"tensor_dtype": 7},
        {"tensor_dtype_exceptions": {UP: "uint8"}},
        {"tensor_dtype_exceptions": {UP: 3}},
        {"tensor_dtype_exceptions": [UP]},
        {"base_model_name_or_path": ""},
        {"base_model_name_or_path": 7},
        {"base_model_name_or_path": "../../etc"},
        {"base_model_name_or_path": "/nowhere/at/all"},
        {"base_model_revision": 7},
        {"model_type": "llama"},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_hostile_configurations(repository: Path, changes: dict[str, Any]) -> None:
    edit_json(repository / "config.json", **changes)
    # A value of the wrong type is refused by transformers' own strict dataclasses, as in any model's configuration.
    refuses(repository, ".", (ValueError, CheckpointError, StrictDataclassError))
    if "model_type" not in changes:
        with pytest.raises((ValueError, CheckpointError, StrictDataclassError)):
            AutoModelForCausalLM.from_pretrained(repository)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 50_000])
def test_configurations_that_are_none(repository: Path, text: str) -> None:
    (repository / "config.json").write_text(text)
    refuses(repository, "config.json", CheckpointError)


# --- hostile sets of files


@pytest.fixture
def sharded(tiny_pair: Pair, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), folder, LowRankConfig(3), max_shard_size="30KB")
    assert len(shards(folder)) > 2
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("delta_model-*.safetensors"))


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / f"{DELTA}.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "..", ".", "", "sub/x", None, 7, ["x"], {"x": 1}], ids=lambda name: repr(name)
)
def test_index_that_leads_elsewhere(sharded: Path, name: Any) -> None:
    (sharded.parent / "x").write_bytes(shards(sharded)[0].read_bytes())
    edit_index(sharded, lambda index: index["weight_map"].update({f"{UP}.delta": name}))
    refuses(sharded, f"{DELTA}.index.json holds no valid weight_map")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 7])
def test_index_without_a_map(sharded: Path, weight_map: Any) -> None:
    edit_index(sharded, lambda index: index.update(weight_map=weight_map))
    refuses(sharded, f"{DELTA}.index.json holds no valid weight_map")


def test_index_that_lost_a_file(sharded: Path) -> None:
    """Without its entries, a third of the tensors would pass for the base's."""
    first = shards(sharded)[0].name
    edit_index(
        sharded, lambda index: index.update(weight_map={k: v for k, v in index["weight_map"].items() if v != first})
    )
    refuses(sharded, "no checksums of its base|names other entries than its files hold")


def test_index_that_lost_or_gained_an_entry(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].pop(f"{UP}.delta"))
    refuses(sharded, "names other entries than its files hold")
    last = shards(sharded)[-1].name
    edit_index(sharded, lambda index: index["weight_map"].update({f"{UP}.delta": last, "ghost": last}))
    refuses(sharded, "names other entries than its files hold")


def test_missing_and_mixed_files(sharded: Path) -> None:
    *_, other, last = shards(sharded)
    data = last.read_bytes()
    last.unlink()
    refuses(sharded, f"lacks {last.name}, which", CheckpointError)
    last.symlink_to("nowhere")
    refuses(sharded, f"lacks {last.name}, which", CheckpointError)
    last.unlink()
    last.mkdir()
    refuses(sharded, f"lacks {last.name}, which", CheckpointError)
    last.rmdir()
    shutil.copy(other, last)
    refuses(sharded, "stands in two files")
    last.write_bytes(data)
    assert decode_all(sharded)


def test_links(repository: Path, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """A link to a good file is what the Hub's cache is made of; one to itself or to a folder is a missing file."""
    delta = repository / DELTA
    delta.rename(tmp_path / "blob")
    delta.symlink_to(tmp_path / "blob")
    assert refuses_or_is_the_same(repository, expected) is False
    for target in (DELTA, "..", "/dev/null/x"):
        delta.unlink()
        delta.symlink_to(target)
        refuses(repository, f"has no {DELTA}: it is not a delta repository", CheckpointError)


# --- another base


def test_another_base(repository: Path, tiny_pair: Pair, tmp_path: Path) -> None:
    base = tmp_path / "base"
    for name in load_tensors(tiny_pair.base):
        shutil.copytree(tiny_pair.base, base)
        edit_tensors(base, lambda t, name=name: t[name].view(torch.int16).view(-1)[-1:].bitwise_xor_(1))
        with pytest.raises(WrongBaseError, match=f"base' is not the base of .*: its tensor {name} differs"):
            decode_all(repository, str(base))
        shutil.rmtree(base)


def test_a_base_of_other_names_or_shapes(repository: Path, tiny_pair: Pair, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_pair.base, tmp_path / "base"))
    edit_tensors(base, lambda t: t.update({NORM: torch.ones(32, dtype=torch.bfloat16)}))
    with pytest.raises((WrongBaseError, DeltaFormatError), match=NORM):
        decode_all(repository, str(base))
    edit_tensors(base, lambda t: t.pop(NORM))
    with pytest.raises(WrongBaseError, match="base' is not the base of .*: it has other tensors than"):
        decode_all(repository, str(base))


# --- the same through from_pretrained, whose threads must hand the errors on


def test_errors_reach_the_caller_of_from_pretrained(repository: Path, tiny_pair: Pair, tmp_path: Path) -> None:
    original = (repository / DELTA).read_bytes()
    forge_record(repository, HOSTILE_RECORDS["codes NaN"][0])
    with pytest.raises(DeltaFormatError, match=f"{UP}: a stored value is not finite"):
        AutoModelForCausalLM.from_pretrained(repository)
    damaged = bytearray(original)
    damaged[-100] ^= 1
    replace(repository / DELTA, damaged)
    with pytest.raises(DeltaFormatError, match="delta entry .* is damaged"):
        AutoModelForCausalLM.from_pretrained(repository)
    replace(repository / DELTA, original)
    base = Path(shutil.copytree(tiny_pair.base, tmp_path / "base"))
    edit_tensors(base, lambda t: t[UP][3:4].add_(1))
    with pytest.raises(WrongBaseError, match=f"its tensor {UP} differs"):
        AutoModelForCausalLM.from_pretrained(repository, base_model=str(base))
    assert AutoModelForCausalLM.from_pretrained(repository).delta_config.format_version == 1


def test_bfloat16_codes_that_are_not_finite(tiny_pair: Pair, tmp_path: Path) -> None:
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / "d", LowRankConfig(3, value_dtype="bfloat16"))
    record = read_entries(tmp_path / "d" / DELTA)[f"{UP}.delta"][2]
    assert record[SEGMENT + 4] == BFLOAT16
    forge_record(tmp_path / "d", lambda data: data[:-2] + b"\x80\xff")
    refuses(tmp_path / "d", f"{UP}: a stored value is not finite")


def test_a_renamed_entry_is_noticed(repository: Path) -> None:
    """One flipped bit in the header can turn one layer's name into another's, and leave all data as it was."""
    path = repository / DELTA
    data = path.read_bytes()
    first, second = b"layers.0.mlp.up_proj.weight.delta", b"layers.1.mlp.up_proj.weight.delta"
    assert data.count(first) == 1 and data.count(second) == 1
    swapped = data.replace(first, b"SWAP").replace(second, first).replace(b"SWAP", second)
    assert len(swapped) == len(data)
    replace(path, swapped)
    refuses(repository, "mlp.up_proj.weight.delta is damaged")
