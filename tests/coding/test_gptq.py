"""Sparse GPTQ and the choice of scales, against plain loops and brute force."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from support import naive_gptq
from support.messages import naming

from impart_hf.coding.gptq import Grid, inverse_factor, quantise, sparse_gptq
from impart_hf.coding.level_scales import fit_levels

DENSITIES = (1.0, 0.5, 0.25, 0.1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(columns: int, seed: int, decay: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A Hessian of inputs whose variance along random directions falls as k^-decay, with channels of unequal size."""
    rng = generator(seed)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=rng, dtype=torch.float64))[0]
    size = torch.exp(0.5 * torch.randn(columns, generator=rng, dtype=torch.float64))
    spectrum = torch.arange(1, columns + 1) ** -decay
    return ((basis * spectrum) @ basis.t() * size[:, None] * size).to(dtype)


def problem(rows: int, columns: int, density: float, seed: int, dtype: torch.dtype = torch.float32):
    rng = generator(seed)
    weight = torch.randn(rows, columns, generator=rng, dtype=dtype)
    return weight, torch.rand(rows, columns, generator=rng) < density


def row_grid(weight: torch.Tensor, mask: torch.Tensor | None, width: int) -> Grid:
    scale = fit_levels(weight, mask, width).scale[:, None]
    return Grid(scale, np.full(len(scale), width))


def random_grid(shape: tuple[int, int], seed: int) -> Grid:
    """A width of 1, 2, 3 or 8 bits and a scale for each row (rows, 1) or column (1, columns)."""
    rng = generator(seed)
    widths = torch.tensor([1, 2, 3, 8])[torch.randint(4, shape, generator=rng)].flatten()
    scale = 0.5 + 2 * torch.rand(shape, generator=rng, dtype=torch.float64)
    return Grid(scale, widths.numpy())


def spread(grid: Grid, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Scales and widths of every entry, for the plain loops."""
    return grid.scale.expand(shape).numpy(), np.broadcast_to(grid.widths.reshape(grid.scale.shape), shape)


def output_errors(weight: torch.Tensor, mask: torch.Tensor | None, values: torch.Tensor, hessian: torch.Tensor):
    """e H e^T of every row, in float64."""
    error = (weight if mask is None else weight * mask).double() - values.double()
    return ((error @ hessian.double()) * error).sum(1)


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize(
    ("rows", "columns", "density", "block"),
    [(5, 40, 0.3, 128), (6, 70, 0.5, 32), (4, 150, 0.25, 128), (1, 33, 0.7, 16), (7, 1, 0.5, 128), (3, 50, 1.0, 7)],
)
def test_equals_the_plain_loops(axis: str, rows: int, columns: int, density: float, block: int):
    shape = (rows, columns)
    weight, mask = problem(rows, columns, density, seed=columns, dtype=torch.float64)
    hessian = correlated(columns, seed=rows, dtype=torch.float64)
    grid = random_grid((rows, 1) if axis == "rows" else (1, columns), seed=3)
    arrays = (weight.numpy(), mask.numpy(), hessian.numpy(), *spread(grid, shape))
    codes = sparse_gptq(weight, mask, inverse_factor(hessian), grid, block)
    expected, values = naive_gptq.sparse_gptq(*arrays, damping=0.01)
    assert codes.dtype == torch.uint8 and np.array_equal(codes.numpy(), expected)
    assert torch.allclose(grid.values(codes) * mask, torch.from_numpy(values), atol=1e-12)


def test_the_factor_is_that_of_the_inverse():
    for columns in (1, 7, 700):  # the last is more than a block of its triangular inverse
        hessian = correlated(columns, seed=1, dtype=torch.float64)
        factor = inverse_factor(hessian, damping=0.05)
        identity = torch.eye(columns, dtype=torch.float64)
        damped = hessian + 0.05 * hessian.diagonal().mean() * identity
        damped = damped[factor.order][:, factor.order]
        assert torch.equal(factor.upper, factor.upper.triu()) and factor.notes == ()
        assert torch.all(damped.diagonal().diff() <= 0)
        assert torch.allclose(factor.upper.t() @ factor.upper @ damped, identity, atol=1e-9)


def test_a_mask_of_ones_is_no_mask():
    weight, mask = problem(20, 200, 1.0, seed=0)
    assert mask.all()
    hessian, grid = correlated(200, seed=0), row_grid(weight, None, 2)
    factor = inverse_factor(hessian)
    codes = sparse_gptq(weight, None, factor, grid)
    assert torch.equal(codes, sparse_gptq(weight, mask, factor, grid))
    assert not torch.equal(codes, grid.codes(weight))  # neither is it just rounding
    assert torch.equal(fit_levels(weight, None, 3).scale, fit_levels(weight, mask, 3).scale)


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_inputs_without_correlation_are_rounded(density: float):
    weight, mask = problem(12, 150, density, seed=4, dtype=torch.float64)
    grid = row_grid(weight, mask, 3)
    diagonal = torch.diag(0.1 + torch.rand(150, generator=generator(1), dtype=torch.float64))
    for hessian in (torch.eye(150, dtype=torch.float64), diagonal):
        codes = sparse_gptq(weight, mask, inverse_factor(hessian), grid)
        assert torch.equal(codes, grid.codes(weight) * mask)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("decay", [0.3, 1.0, 2.0])
def test_no_row_is_worse_than_rounded(density: float, decay: float):
    weight, mask = problem(60, 300, density, seed=5)
    hessian = correlated(300, seed=6, decay=decay)
    for grid in (row_grid(weight, mask, 2), Grid(torch.full((1, 300), 1.5), np.full(300, 2))):
        rounded = quantise(weight, mask, None, grid)
        found = quantise(weight, mask, hessian, grid)
        assert torch.equal(rounded.codes, grid.codes(weight) * mask)
        for result in (rounded, found):
            assert torch.equal(result.values, grid.values(result.codes) * mask)
            assert not result.codes[~mask].any() and not result.values[~mask].any()
        before = output_errors(weight, mask, rounded.values, hessian)
        after = output_errors(weight, mask, found.values, hessian)
        assert torch.all(after <= before * (1 + 1e-4))
        assert after.sum() < before.sum()


def test_what_it_gains_on_correlated_inputs():
    hessian = correlated(400, seed=9, decay=1.5)
    ratio = {}
    for density in DENSITIES:
        weight, mask = problem(50, 400, density, seed=10)
        grid = row_grid(weight, mask, 2)
        rounded = output_errors(weight, mask, quantise(weight, mask, None, grid).values, hessian).sum()
        values = quantise(weight, mask, hessian, grid).values
        ratio[density] = float(output_errors(weight, mask, values, hessian).sum() / rounded)
    assert ratio[1.0] < 0.3
    assert ratio[1.0] < ratio[0.5] < ratio[0.25] < ratio[0.1] < 1  # under random masks it gains less


def test_a_singular_hessian_is_damped_more_and_says_so():
    weight, mask = problem(8, 64, 0.5, seed=11)
    grid = row_grid(weight, mask, 2)
    inputs = torch.randn(5, 64, generator=generator(1))
    rank_five = inputs.t() @ inputs / 5
    assert quantise(weight, mask, rank_five, grid).notes == ()  # the usual damping is enough
    for least, damping in ((-0.05, 0.1), (-0.5, 1)):
        hessian = torch.eye(64) + (least - 1) * torch.ones(64, 64) / 64  # one eigenvalue is `least`, all others are 1
        upper = inverse_factor(hessian).upper
        damped = hessian + damping * hessian.diagonal().mean() * torch.eye(64)
        assert torch.allclose(upper.t() @ upper @ damped, torch.eye(64), atol=1e-3)
        found = quantise(weight, mask, hessian, grid)
        (note,) = found.notes
        assert re.search(naming("Hessian", "damping", damping), note)
        assert torch.isfinite(found.values).all()
    with pytest.raises(ValueError, match=naming("Hessian", "semidefinite")):
        inverse_factor(torch.eye(64) - 3 * torch.ones(64, 64) / 64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite(bad: float):
    weight, mask = problem(8, 64, 0.5, seed=11)
    hessian = torch.eye(64)
    hessian[3, 5] = bad
    with pytest.raises(ValueError, match=naming("Hessian", "finite", "calibration")):
        quantise(weight, mask, hessian, row_grid(weight, mask, 2))


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_inputs_that_are_always_zero_are_rounded(axis: str):
    weight, mask = problem(10, 90, 0.6, seed=12)
    hessian = correlated(90, seed=13)
    dead = torch.arange(0, 90, 7)
    hessian[dead] = 0
    hessian[:, dead] = 0
    shape = (10, 1) if axis == "rows" else (1, 90)
    grid = Grid(torch.full(shape, 1.5), np.full(max(shape), 2))
    found = quantise(weight, mask, hessian, grid)
    rounded = grid.codes(weight) * mask
    assert torch.equal(found.codes[:, dead], rounded[:, dead]) and not torch.equal(found.codes, rounded)
    nothing = quantise(weight, mask, torch.zeros(90, 90), grid)
    assert torch.equal(nothing.codes, rounded) and nothing.notes == ()


def test_columns_without_a_kept_entry_harm_no_other():
    weight, mask = problem(30, 80, 0.5, seed=14)
    mask[:, 10:20] = False
    scale = fit_levels(weight.t(), mask.t(), 2).scale
    assert torch.all(scale[10:20] > 0) and torch.all(scale[10:20] < 1e-6)
    grid = Grid(scale[None], np.full(80, 2))
    hessian = correlated(80, seed=15)
    found = quantise(weight, mask, hessian, grid)
    assert torch.isfinite(found.values).all()
    before = output_errors(weight, mask, quantise(weight, mask, None, grid).values, hessian)
    assert output_errors(weight, mask, found.values, hessian).sum() < 0.9 * before.sum()


def test_grid_round_trips_and_clamps():
    widths = np.array([1, 2, 3, 8])
    for grid in (random_grid((4, 1), 1), Grid(torch.tensor([[0.1], [1], [7], [300]]), widths)):
        top = torch.from_numpy(2 ** grid.widths[:, None] - 1)
        codes = torch.arange(256).expand(4, 256).minimum(top).to(torch.uint8)
        values = grid.values(codes)
        assert torch.equal(grid.codes(values), codes)
        assert torch.equal(Grid(grid.scale.t(), grid.widths).codes(values.t()), codes.t())
        nudge = 0.4 * 2 * grid.scale / top  # less than half a step
        assert torch.equal(grid.codes(values + nudge), codes) and torch.equal(grid.codes(values - nudge), codes)
        assert torch.allclose(values.amin(1), -grid.scale[:, 0]) and torch.allclose(values.amax(1), grid.scale[:, 0])
        assert not grid.codes(-5 * grid.scale).any()
        assert torch.equal(grid.codes(5 * grid.scale).to(top.dtype), top)


def squared_errors(values: torch.Tensor, mask: torch.Tensor, scale: torch.Tensor, width: int) -> torch.Tensor:
    grid = Grid(scale[:, None], np.full(len(scale), width))
    return ((grid.values(grid.codes(values)) - values) * mask).square().sum(1)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tails", ["normal", "laplace", "outliers"])
def test_best_scale_is_near_the_best_there_is(width: int, tails: str):
    rng = generator(width)
    values = torch.randn(6, 900, generator=rng, dtype=torch.float64) * torch.tensor([[1e-6], [1], [1], [1], [50], [1]])
    if tails == "laplace":
        values = values * torch.empty_like(values).exponential_(generator=rng).sqrt()
    elif tails == "outliers":
        values[:, :3] *= 30
    mask = torch.rand(6, 900, generator=rng) < torch.tensor([[1], [0.9], [0.5], [0.3], [0.3], [0.1]])
    largest = (values * mask).abs().amax(1)
    tried = torch.stack([squared_errors(values, mask, largest * k / 2000, width) for k in range(4, 2001)])
    found = squared_errors(values, mask, fit_levels(values, mask, width).scale, width)
    # With 256 levels errors go up and down from one scale to the next, and the best of 2000 was lucky
    assert torch.all(found <= (1.02 if width <= 4 else 1.06) * tried.amin(0))


def test_best_scale_of_long_rows_looks_at_a_part():
    values = torch.randn(4, 20_000, generator=generator(1))
    mask = torch.rand(4, 20_000, generator=generator(2)) < torch.tensor([[1.0], [0.5], [0.05], [0.01]])
    for width in (2, 8):
        found = squared_errors(values, mask, fit_levels(values, mask, width).scale, width)
        tried = [squared_errors(values, mask, torch.full((4,), 0.02 * k), width) for k in range(20, 250)]
        assert torch.all(found <= 1.06 * torch.stack(tried).amin(0))


def test_best_scale_where_there_is_nothing():
    values = torch.randn(5, 50, generator=generator(1))
    mask = torch.ones(5, 50, dtype=torch.bool)
    mask[0] = False
    values[1] = 0
    values[2] = 3.0  # one size alone, and one entry alone, are stored exactly
    mask[3, 1:] = False
    for width in (1, 2, 8):
        scale = fit_levels(values, mask, width).scale
        assert torch.all(torch.isfinite(scale)) and torch.all(scale > 0) and torch.all(scale[:2] < 1e-6)
        assert torch.allclose(squared_errors(values, mask, scale, width)[:4], torch.zeros(4), atol=1e-8)
        assert torch.equal(scale, fit_levels(values.clone(), mask.clone(), width).scale)  # the same on every call
    assert torch.allclose(fit_levels(values, mask, 1).scale[4], values[4].abs().mean())
