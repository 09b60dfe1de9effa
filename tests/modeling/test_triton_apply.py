"""Batches whose rows belong to different deltas, by Triton kernels and by torch; see test_triton_decode.py."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch
from support.kernel_bounds import watched_kernels
from support.messages import naming
from support.packed_records import DEVICE, assert_near, make_record, naive_delta, needs_kernels
from support.random_deltas import make_delta

from impart_hf.methods import method_class, method_names
from impart_hf.modeling import triton_apply
from impart_hf.modeling.delta_record import (
    DIRECT,
    FACTORED,
    KEEP_PER_COLUMN,
    KEEP_SHARED,
    DeltaFormatError,
    Record,
    Segment,
    parse_record,
)
from impart_hf.modeling.packed_deltas import PackedDeltas, RowGroups
from impart_hf.modeling.width_codes import BFLOAT16, BITS, FLOAT16

pytestmark = pytest.mark.gpu

M, N = 70, 130
EITHER = pytest.mark.parametrize(
    "kernels", [pytest.param(True, marks=needs_kernels, id="kernels"), pytest.param(False, id="torch")]
)


@pytest.fixture(autouse=True)
def watched() -> Iterator[None]:
    with watched_kernels():
        yield


def deltas_of_all_kinds() -> list[Record]:
    return [
        make_record(FACTORED, (M, N), [Segment(3, 2, 36, KEEP_SHARED)], seed=1),
        make_record(FACTORED, (M, N), [Segment(1, FLOAT16, FLOAT16), Segment(40, 35, 3, KEEP_PER_COLUMN, 1)], seed=2),
        make_record(FACTORED, (M, N), [], seed=3),
        make_record(DIRECT, (M, N), [Segment(M, 1, scaled=1)], seed=4),
        make_record(FACTORED, (M, N), [Segment(1, 8, BFLOAT16)], seed=5),
        make_record(DIRECT, (M, N), [Segment(M - 1, BFLOAT16, 0, KEEP_SHARED), Segment(1, 5)], seed=6),
    ]


def packed(records: list[Record], kernels: bool) -> PackedDeltas:
    deltas = PackedDeltas(records, "the tensor", DEVICE, kernels=kernels)
    assert deltas.kernels == kernels
    return deltas


def groups_of(numbers: list[int], count: int) -> RowGroups:
    return RowGroups.of(torch.tensor(numbers, dtype=torch.int64, device=DEVICE), count)


def expected_of(records: list[Record], numbers: list[int], inputs: torch.Tensor) -> torch.Tensor:
    """What each row gets, float64, by the second reader."""
    matrices = {number: naive_delta(records[number]) for number in set(numbers) if 0 <= number < len(records)}
    nothing = torch.zeros(records[0].rows, dtype=torch.float64)
    rows = inputs.reshape(-1, inputs.shape[-1]).double().cpu()
    return torch.stack([matrices[d] @ row if d in matrices else nothing for d, row in zip(numbers, rows, strict=True)])


@pytest.mark.slow
@EITHER
def test_rows_of_different_deltas(kernels: bool) -> None:
    records = deltas_of_all_kinds()
    numbers = [4, -1, 0, 1, 5, 1, 3, 2, 0, 3, 1, -1, 6]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(len(numbers), N, generator=generator).to(DEVICE)
    outputs = torch.randn(len(numbers), M, generator=generator).to(DEVICE)
    deltas, groups = packed(records, kernels), groups_of(numbers, len(records))
    found = deltas.add_to(outputs.clone(), inputs, groups)
    assert_near(found, outputs.double().cpu() + expected_of(records, numbers, inputs))
    none = [i for i, number in enumerate(numbers) if number in (-1, 2, 6)]
    assert torch.equal(found[none], outputs[none])
    for i, number in enumerate(numbers):
        alone = deltas.add_to(outputs[i : i + 1].clone(), inputs[i : i + 1], groups_of([number], len(records)))
        assert_near(alone, found[i : i + 1])


@EITHER
@pytest.mark.parametrize("rows", [1, 17, 70])
def test_many_rows_of_one_delta(kernels: bool, rows: int) -> None:
    """More than a program takes at once."""
    records = [make_record(FACTORED, (M, N), [Segment(2, 4, 3, KEEP_SHARED), Segment(33, 34, 2)])]
    records.append(make_record(DIRECT, (M, N), [Segment(M, 3, 0, KEEP_PER_COLUMN)]))
    inputs = torch.randn(rows, N, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for one in records:
        outputs = torch.zeros(rows, M, device=DEVICE)
        found = packed([one], kernels).add_to(outputs, inputs, groups_of([0] * rows, 1))
        assert found is outputs
        assert_near(found, expected_of([one], [0] * rows, inputs))


@needs_kernels
def test_more_rows_than_kernels_multiply() -> None:
    records = deltas_of_all_kinds()
    numbers = [4, -1, 0, 1, 5, 1, 3, 2, 0, 3, 1, -1, 6]
    inputs = torch.randn(len(numbers), N, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    deltas, groups = packed(records, True), groups_of(numbers, len(records))
    with patch.object(triton_apply, "MOST_ROWS", len(numbers) - 1):
        found = deltas.add_to(torch.zeros(len(numbers), M, device=DEVICE), inputs, groups)
    assert_near(found, expected_of(records, numbers, inputs))


@needs_kernels
def test_every_width() -> None:
    widths = list(BITS)
    records = [
        make_record(FACTORED, (M, N), [Segment(2, width, other, seed % 3, seed % 2)], seed)
        for seed, (width, other) in enumerate(zip(widths, widths[5:] + widths[:5], strict=True))
    ]
    numbers = list(range(len(records)))
    inputs = torch.randn(len(records), N).to(DEVICE)
    outputs = torch.zeros(len(records), M, device=DEVICE)
    found = packed(records, True).add_to(outputs, inputs, groups_of(numbers, len(records)))
    assert_near(found, expected_of(records, numbers, inputs))


@EITHER
@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (200, 1), (65, 64)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_odd_sizes(kernels: bool, shape: tuple[int, int]) -> None:
    records = [
        make_record(FACTORED, shape, [Segment(1, 3, 36, KEEP_SHARED)], seed=1),
        make_record(DIRECT, shape, [Segment(shape[0], 2, 0, KEEP_PER_COLUMN)], seed=2),
    ]
    numbers = [1, 0, 1]
    inputs = torch.randn(3, shape[1]).to(DEVICE)
    found = packed(records, kernels).add_to(torch.zeros(3, shape[0], device=DEVICE), inputs, groups_of(numbers, 2))
    assert_near(found, expected_of(records, numbers, inputs))


@EITHER
def test_records_of_every_method(kernels: bool) -> None:
    records = []
    for seed, name in enumerate(method_names()):
        data = method_class(name)(compression_ratio=6).encode(make_delta(M, N, seed), M * N * 2 // 6, seed).data
        records.append(parse_record(np.frombuffer(data, np.uint8), (M, N), name)[0])
    numbers = list(range(len(records)))
    inputs = torch.randn(len(numbers), N).to(DEVICE)
    outputs = torch.zeros(len(numbers), M, device=DEVICE)
    found = packed(records, kernels).add_to(outputs, inputs, groups_of(numbers, len(records)))
    assert_near(found, expected_of(records, numbers, inputs))


@EITHER
def test_sequences_and_other_dtypes(kernels: bool) -> None:
    records = deltas_of_all_kinds()[:2]
    inputs = torch.randn(2, 3, N).to(DEVICE, torch.bfloat16)
    numbers = [0, 0, 0, 1, 1, 1]
    outputs = torch.zeros(2, 3, M, device=DEVICE)
    deltas, groups = packed(records, kernels), groups_of(numbers, 2)
    found = deltas.add_to(outputs, inputs, groups)
    expected = expected_of(records, numbers, inputs).view(2, 3, M)
    assert_near(found, expected)
    if not kernels or DEVICE.type != "cpu":  # the interpreter truncates where it stores bfloat16
        half = deltas.add_to(torch.zeros_like(outputs, dtype=torch.bfloat16), inputs, groups)
        assert (half.cpu() == expected.to(torch.bfloat16)).float().mean() > 0.99
    nothing = torch.zeros(0, M, device=DEVICE)
    assert deltas.add_to(nothing, torch.zeros(0, N, device=DEVICE), groups_of([], 2)) is nothing


@EITHER
def test_what_does_not_fit_is_refused(kernels: bool) -> None:
    records = deltas_of_all_kinds()[:2]
    deltas, groups = packed(records, kernels), groups_of([0, 1], 2)
    inputs, outputs = torch.zeros(2, N, device=DEVICE), torch.zeros(2, M, device=DEVICE)
    for y, x, g, names in (
        (outputs, outputs, groups, ("inputs", (2, M), f"{M}x{N}")),
        (inputs, inputs, groups, ("outputs", (2, N), f"{M}x{N}")),
        (outputs, inputs[:1], groups, ("inputs", (1, N))),
        (outputs, inputs, groups_of([0], 2), ("groups", "1 rows")),
        (outputs, inputs, groups_of([0, 0], 3), ("groups", "3 deltas")),
        (torch.zeros(M, 2, device=DEVICE).t(), inputs, groups, ("outputs", "contiguous")),
    ):
        with pytest.raises(ValueError, match=naming("the tensor", *names)):
            deltas.add_to(y, x, g)
    for wrong in ([], [records[0], make_record(FACTORED, (M, N + 1), [])]):
        with pytest.raises(ValueError, match=naming("the tensor", "one shape")):
            PackedDeltas(wrong, "the tensor", DEVICE, kernels=kernels)


@EITHER
def test_bad_records_are_refused(kernels: bool) -> None:
    fewer = make_record(FACTORED, (M, N), [Segment(3, 4, 4, KEEP_SHARED)])
    fewer.codes = fewer.codes[:-1]
    more = make_record(DIRECT, (M, N), [Segment(M, 4, 0, KEEP_SHARED)])
    more.codes = np.append(more.codes, np.uint8(0))
    infinite = make_record(FACTORED, (M, N), [Segment(3, 4, FLOAT16, KEEP_SHARED)])
    infinite.codes = np.append(infinite.codes[:-2], np.array([0, 0x7C], np.uint8))
    overflowing = make_record(DIRECT, (M, N), [Segment(M, BFLOAT16, 0, 0, 1)])
    overflowing.column_scales = [np.full((1, M), 60000, np.float16)]
    overflowing.codes = np.tile(np.array([0, 0x7F], np.uint8), M * N)
    for record, what in ((fewer, "fewer"), (more, "more"), (infinite, "finite"), (overflowing, "finite")):
        with pytest.raises(DeltaFormatError, match=naming("the tensor", what)):
            PackedDeltas([deltas_of_all_kinds()[0], record], "the tensor", DEVICE, kernels=kernels)
