"""GPTQ's kernel rounds blocks as torch does; run by Triton's interpreter, or on a device.

The two differ in the last bits of their sums. A value that lies within that of the edge between two levels may get
either, and then changes the later columns of its row. So nearly all codes are the same, and the errors are.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch
from support.kernel_bounds import watched_kernels
from support.packed_records import DEVICE, needs_kernels
from support.random_deltas import make_delta, make_hessian

from impart_hf.coding.gptq import Grid, inverse_factor, sparse_gptq
from impart_hf.coding.level_scales import fit_levels
from impart_hf.coding.triton_gptq import rounds_on
from impart_hf.methods import ImPartRdConfig
from impart_hf.modeling.delta_decode import decode_record
from impart_hf.modeling.delta_record import parse_record
from impart_hf.modeling.packed_tables import KERNELS_VARIABLE

pytestmark = [needs_kernels, pytest.mark.gpu]

KINDS = [8, 5, 36, 4, 35, 3, 34, 2, 1]


@pytest.fixture(autouse=True)
def watched() -> Iterator[None]:
    with watched_kernels():
        yield


def sweep(way: str, weight: torch.Tensor, mask: torch.Tensor | None, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes by the kernel ("always") or by torch ("never"), where kernels run."""
    there = [None if tensor is None else tensor.to(DEVICE) for tensor in (weight, mask, hessian, grid.scale)]
    with patch.dict("os.environ", {KERNELS_VARIABLE: way}):
        assert rounds_on(DEVICE, weight.dtype) == (way == "always")
        return sparse_gptq(there[0], there[1], inverse_factor(there[2]), Grid(there[3], grid.widths), 16).cpu()


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("density", [None, 0.4])
@pytest.mark.parametrize(
    ("rows", "columns", "kinds"), [(37, 40, KINDS), (260, 9, KINDS), (5, 16, [34]), (3, 17, [2, 8]), (1, 1, [3])]
)
def test_rounds_as_torch_does(axis: str, density: float | None, rows: int, columns: int, kinds: list[int]) -> None:
    rng = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=rng)
    mask = None if density is None else torch.rand(rows, columns, generator=rng) < density
    inputs = torch.randn(2 * columns, columns, generator=rng) @ torch.randn(columns, columns, generator=rng)
    hessian = inputs.t() @ inputs / len(inputs)
    widths = np.random.default_rng(1).choice(kinds, rows if axis == "rows" else columns)
    if axis == "rows":
        grid = Grid(fit_levels(weight, mask, widths).scale[:, None], widths)
    else:
        grid = Grid(fit_levels(weight.t(), None if mask is None else mask.t(), widths).scale[None], widths)
    by_torch, by_kernel = (sweep(way, weight, mask, hessian, grid) for way in ("never", "always"))
    assert (by_torch == by_kernel).double().mean() >= 0.999
    if columns > 1 and density is None:
        assert not torch.equal(by_kernel, grid.codes(weight))  # neither is it just rounding
    errors = []
    for codes in (by_torch, by_kernel):
        values = grid.values(codes) if mask is None else grid.values(codes) * mask
        error = (values - (weight if mask is None else weight * mask)).double()
        errors.append(float(((error @ hessian.double()) * error).sum()))
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("way", ["never", "always"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_stack_is_rounded_as_its_matrices_are(axis: str, way: str, masked: bool) -> None:
    rng, (count, rows, columns) = torch.Generator().manual_seed(0), (3, 21, 40)
    weights = torch.randn(count, rows, columns, generator=rng)
    masks = torch.rand(count, rows, columns, generator=rng) < 0.6 if masked else None
    hessians = torch.stack([make_hessian(columns, seed) for seed in range(count)])
    widths = np.random.default_rng(1).choice(KINDS, (count, rows if axis == "rows" else columns))
    scales = torch.rand(count, widths.shape[1], generator=rng) + 0.5
    scales = scales[..., None] if axis == "rows" else scales[:, None]
    together = sweep(way, weights, masks, hessians, Grid(scales, widths))
    same = [
        together[i] == sweep(way, weights[i], None if masks is None else masks[i], hessians[i], Grid(scales[i], own))
        for i, own in enumerate(widths)
    ]
    assert torch.stack(same).double().mean() >= 0.999


def test_halves_are_rounded_to_even_codes() -> None:
    """As torch does: a weight of 0 lies between two levels."""
    weight, grid = torch.zeros(4, 6), Grid(torch.ones(4, 1), np.array([1, 2, 3, 34]))
    codes = [sweep(way, weight, None, torch.eye(6), grid) for way in ("never", "always")]
    assert torch.equal(codes[0], codes[1]) and codes[1][:, 0].tolist() == [0, 2, 4, 1]


def test_a_record_is_as_good() -> None:
    delta, hessian = make_delta(48, 64), make_hessian(64)
    errors = []
    for way in ("never", "always"):
        with patch.dict("os.environ", {KERNELS_VARIABLE: way}):
            data = ImPartRdConfig(compression_ratio=8).encode(
                delta.to(DEVICE), delta.numel() // 4, 1, hessian=hessian.to(DEVICE)
            )
        record = parse_record(np.frombuffer(data.data, np.uint8), (48, 64), "the matrix")[0]
        error = decode_record(record, "the matrix") - delta
        errors.append(float(((error @ hessian) * error).sum()))
    assert errors[1] == pytest.approx(errors[0], rel=0.01)
