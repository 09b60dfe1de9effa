"""docs/FORMAT.md holds: its test vectors, and that a reader written from it alone reads what the writer writes."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import naive_reader
from support.tiny_models import Pair, edit_tensors, fine_tune, make_model, save_model, tiny_config

from impart_hf import LowRankConfig, compress
from impart_hf.compression.encoding import mask_seed
from impart_hf.methods import method_class, method_names
from impart_hf.modeling import compact_planes, delta_decode, planes
from impart_hf.modeling.checksums import tensor_bytes, tensor_checksum
from impart_hf.modeling.codebook import BFLOAT16, CODEBOOKS, FLOAT16, NORMAL_LEVELS, pack_codes, unpack_codes
from impart_hf.modeling.delta_decode import add_delta, add_delta_part, decode_planes, decode_record
from impart_hf.modeling.delta_file import names_checksum
from impart_hf.modeling.delta_record import (
    DIRECT,
    FACTORED,
    KEEP_ALL,
    KEEP_PER_COLUMN,
    KEEP_SHARED,
    Record,
    Segment,
    pack_record,
    parse_record,
)
from impart_hf.modeling.exact_record import restore
from impart_hf.modeling.model_files import HubOptions
from impart_hf.modeling.seeded_mask import column_keys, keep_mask, mix32
from impart_hf.repository.open import open_repository

DOCUMENT = (Path(__file__).parents[2] / "docs" / "FORMAT.md").read_text("utf-8")


def documented(label: str) -> list[str]:
    """The backquoted or plain cell that stands beside a label in the document's tables."""
    (cell,) = re.findall(rf"^\| {re.escape(label)} \| (.*) \|$", DOCUMENT, re.MULTILINE)
    return cell.strip("`").replace(",", " ").split()


def documented_record(heading: str) -> np.ndarray:
    """The bytes of the record whose hexadecimal block follows a heading."""
    block = DOCUMENT.split(heading, 1)[1].split("\n\n", 2)[1]
    return np.frombuffer(bytes.fromhex("".join(block.split())), np.uint8)


def bits(mask: torch.Tensor) -> str:
    return "".join("1" if kept else "0" for kept in mask.tolist())


def test_mask_vectors() -> None:
    hashed = mix32(np.array([0, 1, 2, 0xFFFFFFFF], np.uint32))
    assert [f"{x:#010x}" for x in hashed] == documented("mix of 0, 1, 2, 0xFFFFFFFF")
    for side in (0, 1):
        keys = [f"{x:#010x}" for x in column_keys(12345, side, np.arange(3))]
        assert keys == documented(f"keys, seed 12345, side {side}, columns 0, 1, 2")
    (last,) = column_keys(0xFFFFFFFF, 1, np.array([1_000_000]))
    assert [f"{last:#010x}"] == documented("key, seed 0xFFFFFFFF, side 1, column 1000000")
    masks = keep_mask(12345, 0, np.array([16383, 32767], np.uint16), 16)
    assert [bits(masks[0])] == documented("kept of 16 entries, seed 12345, side 0, column 0, T = 16383")
    assert [bits(masks[1])] == documented("the same, column 1, T = 32767")
    counts = keep_mask(12345, 1, np.full(4, 13106, np.uint16), 4096).sum(1).tolist()
    label = "kept of 4096 entries, seed 12345, side 1, columns 0 to 3, T = 13106"
    assert [str(c) for c in counts] == documented(label)


def test_exact_record_vectors() -> None:
    base = torch.tensor([[1, -1, 0.5], [2, 1.5, -0.25]], dtype=torch.bfloat16)
    found = restore(base, documented_record("A dense record of 2 × 3 bfloat16 entries"), "dense", torch.bfloat16)
    expected = torch.tensor([[1.0078125, -1, 0.5], [2, 1.484375, float("nan")]], dtype=torch.bfloat16)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
    ones = torch.ones(4, 3, dtype=torch.float16)
    found = restore(ones, documented_record("A sparse record of 4 × 3 float16 entries"), "sparse", torch.float16)
    ones[2] = torch.tensor([1.0009765625, 1, 0.9990234375])
    assert torch.equal(found, ones)


def test_checksum_vectors() -> None:
    vectors = {
        "int16 0, 1, 2, 3, 4": torch.arange(5, dtype=torch.int16),
        "float32 0, 1, …, 9999": torch.arange(10_000, dtype=torch.float32),
        "no elements": torch.empty(0),
    }
    for label, tensor in vectors.items():
        assert [f"{tensor_checksum(tensor):#018x}"] == documented(label)
        assert tensor_checksum(tensor) == naive_reader.checksum(tensor.numpy().tobytes())
    names = f"{names_checksum(['a.weight', 'b.weight']):#018x}"
    assert [names] == documented("names `a.weight`, `b.weight` (the table's last number)")


@pytest.mark.parametrize(
    ("heading", "shape", "rows"),
    [
        (
            "A factored 4×5 record",
            (4, 5),
            [
                [0.25, -0.223214, 0.0625, 0.0625, -0.508929],
                [-0.125, 0.125, -0.0625, -0.03125, 0.25],
                [0.5, -0.419643, 0.0625, 0.125, -1.026786],
                [1, -1, 0.5, 0.049107, -2],
            ],
        ),
        ("A direct 2×3 record", (2, 3), [[0, 2, -4], [1, 8, 16]]),
    ],
)
def test_record_vectors(heading: str, shape: tuple[int, int], rows: list[list[float]]) -> None:
    data = documented_record(heading)
    record, length = parse_record(data, shape, "vector")
    assert length == len(data)
    np.testing.assert_allclose(decode_record(record, "vector").numpy(), rows, atol=1e-6)
    np.testing.assert_allclose(naive_reader.decode_record(data.tobytes())[0], rows, atol=1e-6)
    assert pack_record(record) == data.tobytes()


@given(
    width=st.integers(1, 8),
    codes=st.lists(st.integers(0, 255), max_size=70),
)
def test_level_codes_unpack_for_every_width_and_length(width: int, codes: list[int]) -> None:
    codes = [code & ((1 << width) - 1) for code in codes]
    stream = sum(code << (width * position) for position, code in enumerate(codes))
    data = bytearray(stream.to_bytes(CODEBOOKS[width].packed_bytes(len(codes)) + 1, "little"))
    packed = torch.frombuffer(data, dtype=torch.uint8)
    assert unpack_codes(packed[:-1], width, len(codes)).tolist() == codes


@st.composite
def records(draw: st.DrawFn) -> Record:
    """A valid record of either layout with any mixture of segments."""
    layout = draw(st.sampled_from([FACTORED, DIRECT]))
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rank = draw(st.integers(0, min(rows, columns))) if layout == FACTORED else 0
    plane_columns = rank if layout == FACTORED else rows
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    heights = [rows, columns] if layout == FACTORED else [columns]
    segments, thresholds, scales, codes = [], [], [], []
    start = 0
    while start < plane_columns:
        count = draw(st.integers(1, plane_columns - start))
        widths = [draw(st.sampled_from([*range(1, 9), FLOAT16, BFLOAT16, *NORMAL_LEVELS])) for _ in heights]
        keep = draw(st.sampled_from([KEEP_ALL, KEEP_SHARED, KEEP_PER_COLUMN]))
        # Columns that keep everything between others that do not: a decoder may treat them apart
        limits = np.where(generator.random(count) < 0.5, generator.integers(0, 65536, count), 65535).astype(np.uint16)
        if keep != KEEP_PER_COLUMN:
            limits[:] = 65535 if keep == KEEP_ALL else limits[0]
        scaled = draw(st.booleans())
        segments.append(Segment(count, widths[0], widths[1] if layout == FACTORED else 0, keep, int(scaled)))
        thresholds.append(limits)
        scales.append(generator.normal(size=(len(heights), count)).astype(np.float16) if scaled else None)
        for side, (height, width) in enumerate(zip(heights, widths, strict=True)):
            kept = sum(
                naive_reader.kept(seed, side, start + column, entry, int(limits[column]))
                for column in range(count)
                for entry in range(height)
            )
            if width in (FLOAT16, BFLOAT16):
                dtype = torch.float16 if width == FLOAT16 else torch.bfloat16
                codes.append(tensor_bytes(torch.from_numpy(generator.normal(size=kept)).to(dtype)))
            else:
                size = CODEBOOKS[width].bits
                stream = sum(int(c) << (size * i) for i, c in enumerate(generator.integers(0, 1 << size, kept)))
                codes.append(np.frombuffer(stream.to_bytes(CODEBOOKS[width].packed_bytes(kept), "little"), np.uint8))
        start += count
    return Record(
        layout=layout,
        rows=rows,
        columns=columns,
        rank=rank,
        mask_seed=seed,
        scale=float(np.float32(generator.normal())),
        relative_error=0.0,
        segments=segments,
        sigma=generator.normal(size=rank).astype(np.float16),
        thresholds=np.concatenate(thresholds) if thresholds else np.empty(0, np.uint16),
        column_scales=scales,
        codes=np.concatenate(codes) if codes else np.empty(0, np.uint8),
    )


@contextmanager
def small_parts() -> Iterator[None]:
    """Decode so little at once that even a small matrix is decoded in several parts, everywhere."""
    with ExitStack() as stack:
        for name, value in {"TILE_ROWS": 5, "LEAST_ENTRIES": 20, "LEAST_COLUMNS": 3, "DIRECT_ENTRIES": 7}.items():
            stack.enter_context(patch.object(delta_decode, name, value))
        stack.enter_context(patch.object(compact_planes, "PIECE_ENTRIES", 11))
        yield


@settings(max_examples=150, deadline=None)
@given(record=records())
def test_every_record_round_trips_and_means_the_same_to_both_readers(record: Record) -> None:
    data = pack_record(record)
    parsed, length = parse_record(np.frombuffer(data, np.uint8), (record.rows, record.columns), "record")
    assert length == len(data) and pack_record(parsed) == data
    naive, naive_length = naive_reader.decode_record(data)
    assert naive_length == length
    decoded = decode_record(parsed, "record").numpy()
    near = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(naive).max(initial=0))))
    near(decoded, naive)
    # Rows and columns of a matrix are decoded some at a time
    array, base = np.frombuffer(data, np.uint8), torch.zeros(decoded.shape)
    with small_parts():
        near(add_delta(base, array, "record", torch.float32), naive)
        rows, columns = slice(record.rows // 3, record.rows), slice(record.columns // 4, record.columns - 1)
        part = add_delta_part(base[rows, columns], array, "record", torch.float32, base.shape, rows, columns)
        near(part, naive[rows, columns])
    with patch.object(planes, "MOST_TURNS", 0):
        assert torch.equal(decode_record(parsed, "record"), torch.from_numpy(decoded))


@settings(max_examples=300, deadline=None)
@given(codes=st.lists(st.integers(0, 255), max_size=70), width=st.integers(1, 8))
def test_levels_are_packed_densely_and_come_back(codes: list[int], width: int) -> None:
    values = torch.tensor(codes, dtype=torch.uint8) & ((1 << width) - 1)
    packed = pack_codes(values, width)
    assert len(packed) == -(-len(codes) * width // 8) == CODEBOOKS[width].packed_bytes(len(codes))
    assert unpack_codes(torch.from_numpy(packed), width, len(codes)).tolist() == values.tolist()
    stream = int.from_bytes(packed.tobytes(), "little")
    assert [stream >> (width * i) & ((1 << width) - 1) for i in range(len(codes))] == values.tolist()


@pytest.mark.parametrize("name", method_names())
def test_naive_reader_reads_a_repository(name: str, tiny_pair: Pair, tmp_path: Path) -> None:
    method = method_class(name)(compression_ratio=6)
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / "delta", method)
    check_naive_reader(tmp_path / "delta", tiny_pair.base)


def odd_pair(folder: Path) -> Pair:
    """A base that ties, from inside wrappers, with a buffer; a fine-tune with fewer tokens and a head of its own."""
    base = make_model(tiny_config("llama-tied"))
    tuned = fine_tune(base)
    tuned.resize_token_embeddings(300)
    pair = Pair(save_model(base, folder / "base"), save_model(tuned, folder / "tuned"))

    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.bias"] = torch.ones(1, 1, 8, 8)
        for name in list(tensors):
            tensors[f"module._orig_mod.{name}"] = tensors.pop(name)

    edit_tensors(pair.base, wrap)
    edit_tensors(pair.finetuned, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 1.5}))
    return pair


def test_naive_reader_reads_an_odd_repository(tmp_path: Path) -> None:
    pair = odd_pair(tmp_path)
    compress(str(pair.base), str(pair.finetuned), tmp_path / "delta", LowRankConfig(compression_ratio=4))
    config = json.loads((tmp_path / "delta" / "config.json").read_text())
    assert config["absent_tensors"] == ["model.layers.0.self_attn.bias"]
    assert config["row_counts"] == {"lm_head.weight": 300, "model.embed_tokens.weight": 300}
    assert config["base_tensors"] == {"lm_head.weight": "model.embed_tokens.weight"}
    check_naive_reader(tmp_path / "delta", pair.base)


def check_naive_reader(folder: Path, base: Path) -> None:
    naive = naive_reader.read_repository(folder, base)
    repository = open_repository(str(folder), HubOptions())
    assert sorted(naive) == repository.names()
    for name, expected in naive.items():
        tensor = repository.tensor(name)
        rounded = torch.from_numpy(expected).to(tensor.dtype)
        # The two sum in different orders, so a value at the border of two bfloat16 numbers may fall either way.
        assert (tensor == rounded).float().mean() > 0.99, name
        torch.testing.assert_close(tensor.double(), torch.from_numpy(expected), rtol=2**-8, atol=1e-6)


def test_no_record_is_taken_apart_column_by_column() -> None:
    """A small hostile one could have as many runs as columns, and time is lost on each."""
    rows, columns = 1000, 3
    limits = np.where(np.arange(rows) % 2, 65535, 32767).astype(np.uint16)
    kept = int(keep_mask(0, 0, limits, columns).sum())
    codes = np.random.default_rng(0).integers(0, 256, CODEBOOKS[8].packed_bytes(kept), np.uint8)
    segments, sigma = [Segment(rows, 8, 0, KEEP_PER_COLUMN)], np.empty(0, np.float16)
    record = Record(DIRECT, rows, columns, 0, 0, 1.0, 0.0, segments, sigma, limits, [None], codes)
    (plane,) = decode_planes(record, "record")
    assert len(plane.runs) == 1
    with patch.object(planes, "MOST_TURNS", rows):
        (apart,) = decode_planes(record, "record")
    assert len(apart.runs) == rows
    for part in (slice(0, rows), slice(17, 18), slice(511, 777), slice(999, 1000)):
        assert torch.equal(plane.select(part).dense(), apart.select(part).dense())
        assert torch.equal(plane.dense()[part], apart.select(part).dense())
    assert torch.equal(plane.positions(), apart.positions()) and torch.equal(plane.values(), apart.values())


@pytest.mark.parametrize("layout", [FACTORED, DIRECT])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_matrix_without_entries_decodes(layout: int, shape: tuple[int, int]) -> None:
    columns = shape[0] if layout == DIRECT else 0
    segments = [Segment(columns, 1)] if columns else []
    empty = np.empty(0, np.uint8)
    limits, none = np.full(columns, 65535, np.uint16), [None] * len(segments)
    record = Record(layout, *shape, 0, 0, 1.0, 0.0, segments, empty.astype(np.float16), limits, none, empty)
    parsed, _ = parse_record(np.frombuffer(pack_record(record), np.uint8), shape, "record")
    assert decode_record(parsed, "record").shape == shape


def test_masks_of_a_part_are_the_part_of_the_masks() -> None:
    thresholds = np.linspace(0, 65535, 301).astype(np.uint16)
    whole = keep_mask(9, 1, thresholds, 1001)
    assert torch.equal(whole[100:200], keep_mask(9, 1, thresholds[100:200], 1001, numbers=np.arange(100, 200)))
    scattered = np.array([0, 7, 8, 255, 300])
    assert torch.equal(whole[scattered], keep_mask(9, 1, thresholds[scattered], 1001, numbers=scattered))
    assert torch.equal(whole[:, :500], keep_mask(9, 1, thresholds, 500))


def test_masks_keep_as_often_as_they_should_and_independently() -> None:
    thresholds = np.full(400, 65536 // 8 - 1, np.uint16)
    mask = keep_mask(3, 0, thresholds, 4000).float()
    # 1.6 million Bernoulli(1/8) entries: standard deviation of the mean 0.00026
    assert abs(mask.mean().item() - 0.125) < 0.0013
    assert mask.mean(1).std().item() == pytest.approx((0.125 * 0.875 / 4000) ** 0.5, rel=0.15)
    assert mask.mean(0).std().item() == pytest.approx((0.125 * 0.875 / 400) ** 0.5, rel=0.15)
    for lag in (1, 2, 3, 7):
        assert abs((mask[:, lag:] * mask[:, :-lag]).mean().item() - 1 / 64) < 0.001
    assert abs((mask[1:] * mask[:-1]).mean().item() - 1 / 64) < 0.001
    other_side = keep_mask(3, 1, thresholds, 4000).float()
    assert abs((mask * other_side).mean().item() - 1 / 64) < 0.001


def test_every_matrix_has_a_seed_of_its_own() -> None:
    seeds = {mask_seed(seed, name, number) for seed in (0, 1) for name in ("a", "b") for number in (0, 1)}
    assert len(seeds) == 8
    assert mask_seed(0, "model.layers.0.self_attn.q_proj.weight", 0) == 3071296675
