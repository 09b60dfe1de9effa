"""Decoding in Triton kernels means what docs/FORMAT.md says; run by Triton's interpreter, or on a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from support.kernel_bounds import watched_kernels
from support.packed_records import DEVICE, assert_near, make_record, naive_delta, needs_kernels
from support.random_deltas import make_delta

from impart_hf.methods import method_class, method_names
from impart_hf.modeling import triton_decode
from impart_hf.modeling.delta_decode import add_delta
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
from impart_hf.modeling.packed_tables import KERNELS_VARIABLE, kernels_wanted
from impart_hf.modeling.width_codes import BFLOAT16, BITS, FLOAT16

pytestmark = [needs_kernels, pytest.mark.gpu]

WIDTHS = list(BITS)
# The interpreter truncates where it stores bfloat16.
DTYPES = [torch.float32] if DEVICE.type == "cpu" else [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def watched() -> Iterator[None]:
    with watched_kernels():
        yield


def as_array(*records: Record) -> np.ndarray:
    return np.frombuffer(b"".join(pack_record(record) for record in records), np.uint8)


def decode(data: np.ndarray, base: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """By kernels, in any case."""
    with patch("impart_hf.modeling.delta_decode.TILE_ROWS", None):  # what torch's way would read
        return add_delta(base.to(DEVICE), data, "the tensor", dtype, kernels=True)


def assert_decodes(record: Record, base: torch.Tensor | None = None) -> None:
    """Both ways give what the second reader reads."""
    base = torch.zeros(record.rows, record.columns) if base is None else base
    expected = base + naive_delta(record)
    assert_near(decode(as_array(record), base), expected)
    if record.layout == FACTORED:
        decoder = triton_decode.Decoder(DEVICE, fused=True)
        out = torch.empty(base.shape, device=DEVICE)
        decoder.add_record(out, base.to(DEVICE), record, "the tensor")
        assert decoder.finite()
        assert_near(out, expected)


def segment(layout: int, columns: int, u: int, v: int, keep: int = KEEP_ALL, scaled: int = 0) -> Segment:
    return Segment(columns, u, v if layout == FACTORED else 0, keep, scaled)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [KEEP_ALL, KEEP_SHARED, KEEP_PER_COLUMN])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_mask_and_scale(width: int, keep: int) -> None:
    other = WIDTHS[(WIDTHS.index(width) + 5) % len(WIDTHS)]
    for layout, scaled in ((FACTORED, 0), (FACTORED, 1), (DIRECT, 0), (DIRECT, 1)):
        shape = (70, 131) if layout == FACTORED else (5, 131)
        segments = [segment(layout, 3, width, other, keep, scaled), segment(layout, 2, other, width)]
        record = make_record(layout, shape, segments, seed=width)
        assert_decodes(record)


@pytest.mark.parametrize("layout", [FACTORED, DIRECT])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 200), (200, 1), (2, 3), (64, 128), (129, 65), (9, 1030), (130, 1)],
    ids=lambda s: f"{s[0]}x{s[1]}",
)
def test_odd_sizes(layout: int, shape: tuple[int, int]) -> None:
    columns = min(*shape, 3) if layout == FACTORED else shape[0]
    halves = [columns] if columns == 1 else [columns // 2, columns - columns // 2]
    kinds = [(3, 35, KEEP_PER_COLUMN), (FLOAT16, 5, KEEP_ALL)]
    segments = [segment(layout, n, u, v, keep) for n, (u, v, keep) in zip(halves, kinds, strict=False)]
    record = make_record(layout, shape, segments, seed=3)
    base = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert_decodes(record, base)


def test_ranks_of_none_and_of_more_than_one_tile_of_components() -> None:
    base = torch.randn(80, 70)
    none = make_record(FACTORED, (80, 70), [])
    assert_decodes(none, base)
    tall = make_record(FACTORED, (1030, 5), [Segment(2, 3, 4, KEEP_PER_COLUMN)], seed=3)
    assert_decodes(tall)
    # Tiles of 32 components with masks in all, some and none of their columns
    segments = [Segment(30, 2, 3), Segment(4, 36, 4, KEEP_SHARED), Segment(33, 3, 34, KEEP_PER_COLUMN, 1)]
    record = make_record(FACTORED, (80, 70), segments)
    assert_decodes(record, base)


@pytest.mark.slow
def test_matrices_that_are_decoded_in_panels() -> None:
    segments = [Segment(2, 3, 4, KEEP_PER_COLUMN), Segment(1, 34, FLOAT16)]
    record = make_record(FACTORED, (140, 300), segments)
    base = torch.randn(140, 300, generator=torch.Generator().manual_seed(0))
    for size in ((128, 128), (128, 384), (256, 128), (128, 1024)):
        with patch.object(triton_decode, "panel_size", return_value=size) as asked:
            assert_decodes(record, base)
        asked.assert_called_with(140, 300, 3)
    assert triton_decode.panel_size(4096, 4096, 100) == (4096, 4096)
    for m, n, rank in ((4096, 11008, 1600), (262144, 5376, 2000), (1, 5, 1), (130, 17, 17), (4096, 4096, 4096)):
        rows, columns = triton_decode.panel_size(m, n, rank)
        assert rows % 128 == columns % 128 == 0 and rows < m + 128 and columns < n + 128
        assert rank * (rows + columns) <= max(m * n // 5, 1 << 22) or max(rows, columns) <= 1024


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_stack_of_matrices(base_dtype: torch.dtype, dtype: torch.dtype) -> None:
    base = torch.randn(3, 20, 90, generator=torch.Generator().manual_seed(0)).to(base_dtype)
    records = [
        make_record(FACTORED, (20, 90), [Segment(2, 4, BFLOAT16, KEEP_SHARED)], seed=1),
        make_record(DIRECT, (20, 90), [Segment(20, 1, scaled=1)], seed=2),
        make_record(FACTORED, (20, 90), [], seed=3),
    ]
    expected = base.double() + torch.stack([naive_delta(record) for record in records])
    found = decode(as_array(*records), base, dtype)
    assert found.dtype == dtype
    if dtype == torch.float32:
        assert_near(found, expected)
    else:
        assert (found.cpu() == expected.to(dtype)).float().mean() > 0.99
    transposed = base.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(decode(as_array(*records), transposed, dtype), found)


@pytest.mark.parametrize("name", method_names())
def test_records_of_every_method(name: str) -> None:
    delta = make_delta(96, 80, seed=4)
    data = method_class(name)(compression_ratio=6).encode(delta, delta.numel() * 2 // 6, 5).data
    record, _ = parse_record(np.frombuffer(data, np.uint8), (96, 80), name)
    assert_near(decode(np.frombuffer(data, np.uint8), torch.zeros(96, 80)), naive_delta(record))


def outcome(data: np.ndarray, base: torch.Tensor, kernels: bool, dtype: torch.dtype = torch.float32) -> Any:
    """The decoded tensor, or what was said against the records."""
    try:
        return add_delta(base.to(DEVICE), data, "the tensor", dtype, kernels=kernels)
    except DeltaFormatError as error:
        return str(error)


def test_bad_records_are_refused_in_the_same_words() -> None:
    base = torch.randn(30, 40)
    masked = make_record(FACTORED, (30, 40), [Segment(2, 4, FLOAT16, KEEP_SHARED)])
    whole = as_array(masked)
    # The number of the record's bytes stands at byte 28.
    longer = np.concatenate([whole, np.zeros(3, np.uint8)])
    longer[28:32] = np.frombuffer(np.uint32(len(longer)).tobytes(), np.uint8)
    shorter = whole[:-1].copy()
    shorter[28:32] = np.frombuffer(np.uint32(len(shorter)).tobytes(), np.uint8)
    infinite = whole.copy()
    infinite[-2:] = (0x00, 0x7C)
    loud = make_record(FACTORED, (30, 40), [Segment(2, BFLOAT16, 8)])
    loud.scale = 3e38
    for data in (longer, shorter, infinite, as_array(loud), whole[:40], np.concatenate([whole, whole])):
        said = outcome(data, base, kernels=False)
        assert isinstance(said, str) and outcome(data, base, kernels=True) == said
    # Float16 ends at 65504.
    big = torch.full((30, 40), 65504.0, dtype=torch.float16)
    loud.scale = 1000.0
    said = outcome(as_array(loud), big, kernels=False, dtype=torch.float16)
    assert isinstance(said, str) and outcome(as_array(loud), big, kernels=True, dtype=torch.float16) == said


def test_rows_of_padding_may_hold_nan() -> None:
    record = make_record(FACTORED, (30, 40), [Segment(2, 4, 4)])
    base = torch.randn(30, 40)
    base[7], base[9, 3] = float("nan"), float("inf")
    found = decode(as_array(record), base).cpu()  # torch's way is closed here
    assert torch.equal(found.isfinite(), base.isfinite())
    assert_near(found[10:], (base + naive_delta(record))[10:])


@pytest.mark.slow
def test_spoilt_records_fare_as_they_do_with_torch() -> None:
    generator = np.random.default_rng(0)
    base = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    segments = [Segment(2, 3, FLOAT16, KEEP_SHARED), Segment(2, 36, BFLOAT16, KEEP_PER_COLUMN, 1)]
    factored = make_record(FACTORED, (30, 40), segments)
    direct = make_record(DIRECT, (30, 40), [Segment(30, BFLOAT16, 0, KEEP_PER_COLUMN)])
    for data in (as_array(factored), as_array(direct)):
        decoded = 0
        for _ in range(30):
            spoilt = data.copy()
            for _ in range(generator.integers(1, 3)):
                at = generator.choice([generator.integers(80), generator.integers(len(data))])
                spoilt[at] = generator.integers(256)
            with np.errstate(all="ignore"):
                expected, found = (outcome(spoilt, base, kernels) for kernels in (False, True))
            if isinstance(expected, str):
                assert isinstance(found, str)  # of two faults, either may be found first
            else:
                decoded += 1
                assert_near(found, expected)
        assert 0 < decoded < 30


def test_where_kernels_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, meta = torch.device("cpu"), torch.device("cuda", 1), torch.device("meta")
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    assert [kernels_wanted(device) for device in (cpu, cuda, meta)] == [False, True, False]
    monkeypatch.setenv(KERNELS_VARIABLE, "never")
    assert not kernels_wanted(cuda)
    monkeypatch.setenv(KERNELS_VARIABLE, "always")
    assert kernels_wanted(cpu)
    record = make_record(FACTORED, (30, 40), [Segment(2, 4, 4)])
    assert triton_decode.works_on(DEVICE)
    with patch.object(triton_decode, "launch", side_effect=AssertionError("launched")) as launched:
        base = torch.zeros(30, 40, device=DEVICE)
        with pytest.raises(AssertionError, match="launched"):
            add_delta(base, as_array(record), "the tensor", torch.float32)
        for dtype in (torch.float64, torch.float8_e5m2):  # what kernels do not know, torch decodes
            assert add_delta(base.to(dtype), as_array(record), "the tensor", torch.float32).shape == (30, 40)
        monkeypatch.delenv(KERNELS_VARIABLE)
        add_delta(base.cpu(), as_array(record), "the tensor", torch.float32)
    assert launched.call_count == 1


def test_without_a_working_compiler_torch_decodes() -> None:
    record, base = make_record(FACTORED, (30, 40), [Segment(2, 4, 4)]), torch.zeros(30, 40)
    triton_decode.works_on.cache_clear()
    try:
        with patch.object(triton_decode, "launch", side_effect=RuntimeError("no C compiler")) as launched:
            for _ in range(2):
                assert_near(outcome(as_array(record), base, kernels=True), naive_delta(record))
        assert launched.call_count == 1
    finally:
        triton_decode.works_on.cache_clear()
