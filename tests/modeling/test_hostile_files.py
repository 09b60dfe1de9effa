"""Delta files that are damaged, or made by an enemy who recomputes every checksum.

Each of them must give an error that names the tensor or the file; or, where the change meant nothing, the very same
model. Never a crash, a hang, or an allocation that the base model does not account for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.forged_files import (
    DELTA,
    NORM,
    UP,
    Entries,
    forge,
    forge_record,
    header_of,
    read_entries,
    replace,
    write_file,
)
from support.hostile import FUZZ, refuses, refuses_or_is_the_same
from support.messages import naming
from support.tiny_models import Pair

from impart_hf.modeling.delta_repository import WrongBaseError

pytestmark = pytest.mark.usefixtures("little_memory")


def test_forging_alone_is_not_noticed(repository: Path, tiny_tensors: dict[str, torch.Tensor]) -> None:
    """What shows that the tests below fail for the reason that they state."""
    forge_record(repository, lambda data: data)
    assert refuses_or_is_the_same(repository, tiny_tensors) is False


# --- damage


@FUZZ
@given(data=st.data())
def test_random_damage(
    tiny_repository: Path,
    tiny_tensors: dict[str, torch.Tensor],
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
    refused = refuses_or_is_the_same(folder, tiny_tensors)
    assert refused or len(damaged) == len(original)
    shutil.rmtree(folder)


def test_every_kind_of_truncation(repository: Path) -> None:
    data = (repository / DELTA).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        replace(repository / DELTA, data[:length])
        refuses(repository, naming(repository / DELTA, "safetensors"))


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
            refuses(repository, naming(repository / DELTA, "CRC-32", () if name == "crc32" else name))


# --- hostile files with checksums that hold


def put(name: str, dtype: str, shape: list[int], data: bytes) -> Callable[[Entries], None]:
    return lambda entries: entries.update({name: (dtype, shape, data)})


def moved(old: str, new: str) -> Callable[[Entries], None]:
    return lambda entries: entries.update({new: entries.pop(old)})


GHOST = "model.layers.9.mlp.up_proj.weight.delta"
HOSTILE_ENTRIES: dict[str, tuple[Callable[[Entries], Any], Any]] = {
    "records of a vector": (
        lambda e: e.update({f"{NORM}.delta": e.pop(f"{UP}.delta")}) or e.pop(NORM), (NORM, "records", "(64,)")
    ),
    "records of no tensor": (moved(f"{UP}.delta", GHOST), GHOST),
    "records of another tensor": (
        lambda e: e.update({f"{UP}.delta": e["model.layers.0.self_attn.q_proj.weight.delta"]}),
        (UP, "64x64"),
    ),
    "unknown tensor": (put("surprise", "F32", [1], bytes(4)), ("entry surprise", "base")),
    "unknown rows": (put("surprise.added_rows", "F32", [1, 1], bytes(4)), "surprise.added_rows"),
    "records of signed bytes": (
        lambda e: e.update({f"{UP}.delta": ("I8", *e[f"{UP}.delta"][1:])}), (f"{UP}.delta", "bytes")
    ),
    "records in two dimensions": (
        lambda e: e.update({f"{UP}.delta": ("U8", [1, len(e[f"{UP}.delta"][2])], e[f"{UP}.delta"][2])}),
        (f"{UP}.delta", "bytes"),
    ),
    "replaced and changed": (put(UP, "BF16", [128, 64], bytes(128 * 64 * 2)), (UP, "replaced", "changed")),
    "replaced by another shape": (put(NORM, "BF16", [32], bytes(64)), (NORM, "(32,)", "(64,)")),
    "replaced by two dimensions": (put(NORM, "BF16", [1, 64], bytes(128)), (NORM, "(1, 64)", "(64,)")),
    "replaced by whole numbers": (put(NORM, "I16", [64], bytes(128)), (NORM, "torch.bfloat16")),
    "replaced by 8-bit floats": (put(NORM, "F8_E4M3", [64], bytes(64)), (NORM, "F8_E4M3")),
    "replaced by NaN": (put(NORM, "BF16", [64], b"\xff\x7f" * 64), (NORM, "NaN")),
    "replaced by infinity": (put(NORM, "BF16", [64], b"\x80\x7f" * 64), (NORM, "NaN")),
    "added rows too narrow": (
        put("lm_head.weight.added_rows", "BF16", [4, 32], bytes(256)), ("lm_head.weight", "(4, 32)")
    ),
    "added rows in one dimension": (
        put("lm_head.weight.added_rows", "BF16", [64], bytes(128)), ("lm_head.weight", "rows", "(64,)")
    ),
    "added rows of another dtype": (
        put("lm_head.weight.added_rows", "F32", [4, 64], bytes(1024)),
        ("rows", "lm_head.weight", "dtype", "torch.bfloat16"),
    ),
    "added rows of NaN": (
        put("lm_head.weight.added_rows", "BF16", [4, 64], b"\xff\x7f" * 256), ("lm_head.weight.added_rows", "NaN")
    ),
    "rows added to a vector": (
        put(f"{NORM}.added_rows", "BF16", [4, 64], bytes(512)), (NORM, "rows", "(4, 64)")
    ),
    "no checksums of the base": (lambda e: e.pop("base_checksums"), ("checksums", "base")),
    "checksums of another dtype": (
        lambda e: e.update(base_checksums=("I64", *e["base_checksums"][1:])), ("checksums", "base")
    ),
    "checksums as a number": (put("base_checksums", "U64", [], bytes(8)), ("checksums", "base")),
    "checksums in two dimensions": (
        lambda e: e.update(base_checksums=("U64", [1, *e["base_checksums"][1]], e["base_checksums"][2])),
        ("checksums", "base"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_ENTRIES)
def test_hostile_entries(repository: Path, case: str) -> None:
    edit, names = HOSTILE_ENTRIES[case]
    forge(repository, edit)
    refuses(repository, naming(names))


@pytest.mark.parametrize("rows", [0, 3])
def test_checksums_of_another_base(repository: Path, tiny_pair: Pair, rows: int) -> None:
    forge(repository, put("base_checksums", "U64", [rows], bytes(8 * rows)))
    refuses(repository, naming(repository, tiny_pair.base, "tensors"), WrongBaseError)


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
    refuses(repository, naming(repository / DELTA, "'crc32'"))


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
    refuses(repository, naming(repository / DELTA, "safetensors"))


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"[]", b"7", b"\xff\xfe{}", b"[" * 50_000, b'{"a":' * 50_000, b"{}" + b" " * (1 << 20)],
    ids=["empty", "open", "list", "number", "not text", "deep list", "deep object", "nothing in it"],
)
def test_headers_that_are_none(repository: Path, header: bytes) -> None:
    write_file(repository / DELTA, header, b"")
    refuses(repository, naming(DELTA))


@pytest.mark.parametrize("length", [1 << 24, 100_000_001, 1 << 62, (1 << 64) - 1])
def test_headers_longer_than_the_file(repository: Path, length: int) -> None:
    data = (repository / DELTA).read_bytes()
    replace(repository / DELTA, length.to_bytes(8, "little") + data[8:])
    refuses(repository, naming(repository / DELTA, "safetensors"))


@pytest.mark.parametrize("same", [True, False])
def test_a_name_that_stands_in_the_header_twice(
    repository: Path, tiny_tensors: dict[str, torch.Tensor], same: bool
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
    refused = refuses_or_is_the_same(repository, tiny_tensors)
    assert refused or same


def test_a_renamed_entry_is_noticed(repository: Path) -> None:
    """One flipped bit in the header can turn one layer's name into another's, and leave all data as it was."""
    path = repository / DELTA
    data = path.read_bytes()
    first, second = b"layers.0.mlp.up_proj.weight.delta", b"layers.1.mlp.up_proj.weight.delta"
    assert data.count(first) == 1 and data.count(second) == 1
    swapped = data.replace(first, b"SWAP").replace(second, first).replace(b"SWAP", second)
    assert len(swapped) == len(data)
    replace(path, swapped)
    refuses(repository, naming("mlp.up_proj.weight.delta", "CRC-32"))
