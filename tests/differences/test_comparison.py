"""One tensor against its base: counts, norms and spectra by hand, and the bits against a codec's arithmetic."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from impart_hf.coding.exact_encoder import encode_exact
from impart_hf.differences.comparison import compared
from impart_hf.differences.exact_bits import exact_bits
from impart_hf.modeling.ordered_bits import exponents, integers, rounded, steps

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moved(base: torch.Tensor, places: torch.Tensor, by: int = 1) -> torch.Tensor:
    """The tensor with some entries moved away from zero, by that many of its dtype's steps."""
    bits = integers(base).clone()
    bits[places] += by
    return bits.view(base.dtype).view(base.shape)


def entropy(*shares: float) -> float:
    """The entropy of these shares and the rest, in bits."""
    return sum(-share * math.log2(share) for share in (*shares, 1 - sum(shares)))


def naive_bits(base: torch.Tensor, finetuned: torch.Tensor) -> float:
    """The definition, one number at a time."""
    base = rounded(base, finetuned.dtype)
    tokens, low = [], 0
    for step in steps(base, finetuned).tolist():
        step %= 1 << 8 * finetuned.itemsize
        if step < 16:
            tokens.append(step)
            continue
        leading = step.bit_length() - 1
        tokens.append(16 + 8 * (leading - 4) + ((step >> (leading - 3)) & 7))
        low += leading - 3
    of = exponents(base).tolist()
    pairs, alone = Counter(zip(of, tokens, strict=True)), Counter(of)
    return low + sum(-count * math.log2(count / alone[exponent]) for (exponent, _), count in pairs.items())


@pytest.mark.parametrize("dtype", FLOATS)
def test_two_per_cent_that_moved_by_one_step(dtype: torch.dtype) -> None:
    base = torch.full((400, 250), 1.5, dtype=dtype)  # one exponent
    places = torch.arange(0, base.numel(), 50)
    found = compared("model.layers.3.mlp.up_proj.weight", base, moved(base, places))
    assert found.changed == 2000 and found.changed_rows == 400 and found.entries == 100_000
    assert found.bits == pytest.approx(entropy(0.02), rel=1e-6)
    assert found.exact_bytes == math.ceil(entropy(0.02) * 100_000 / 8) and found.dense_bytes == 100_000 * dtype.itemsize
    step = float(moved(base, places[:1]).flatten()[0]) - 1.5
    assert found.largest == step and found.norm == pytest.approx(step * math.sqrt(2000))
    assert found.relative_norm == pytest.approx(step * math.sqrt(2000) / (1.5 * math.sqrt(100_000)))
    assert (found.kind, found.layer, found.nonfinite, found.added_rows) == ("up_proj", 3, 0, 0)
    assert not found.is_equal


@pytest.mark.parametrize("base_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1e-4, 0.01, 3.0])
def test_bits_are_those_of_the_definition(dtype: torch.dtype, base_dtype: torch.dtype, size: float) -> None:
    base = numbers(40, 50, dtype=base_dtype)
    finetuned = (base.float() * (1 + size * numbers(40, 50, seed=1))).to(dtype)
    assert exact_bits(base, finetuned) == pytest.approx(min(naive_bits(base, finetuned), 8 * dtype.itemsize * 2000))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_eight_bits(dtype: torch.dtype) -> None:
    base = numbers(80, 64, dtype=dtype)
    finetuned = moved(base, torch.arange(0, 80 * 64, 10), 2)
    found = compared("weight", base, finetuned)
    assert found.changed == 512 and found.norm == pytest.approx(float((finetuned.float() - base.float()).norm()))
    assert found.bits == pytest.approx(naive_bits(base, finetuned) / 5120) and 0.4 < found.bits < 0.7


def test_integers_are_counted_and_stored_as_they_are() -> None:
    found = compared("model.step", torch.arange(6), torch.tensor([0, 1, 2, 3, 4, 9]))
    assert (found.changed, found.norm, found.largest, found.bits) == (1, 4.0, 4.0, 64.0)
    assert found.changed_rows is None and found.stable_rank is None and found.exact_bytes == 48
    same = compared("model.step", torch.arange(6), torch.arange(6))
    assert same.is_equal and same.bits == 0
    flags = compared("model.mask", torch.tensor([True, False]), torch.tensor([True, True]))
    assert flags.changed == 1


def test_small_integers_have_steps() -> None:
    base = torch.arange(120, dtype=torch.int8).reshape(4, 30)
    found = compared("model.table", base, base + (base == 7).to(torch.int8))
    assert found.changed == 1 and found.changed_rows == 1
    assert found.bits == pytest.approx(entropy(1 / 120))


def test_rows_that_changed_are_chosen() -> None:
    """Of ten rows in a thousand every entry moves by one step: only which they are takes bits."""
    base = torch.ones(1000, 64, dtype=torch.bfloat16)
    finetuned = base.clone()
    finetuned[::100] = moved(base[:1], torch.arange(64))
    found = compared("weight", base, finetuned)
    assert found.changed_rows == 10 and found.bits == pytest.approx(1000 * entropy(0.01) / 64_000)


def test_nan_and_infinity_are_counted_and_left_out_of_norms() -> None:
    base = numbers(64, 64)
    base[0, :2] = torch.tensor([math.nan, math.inf])  # the same in both
    finetuned = base.clone()
    finetuned[1, 1:4] = torch.tensor([math.nan, -math.inf, math.inf])
    finetuned[2, 5] += 0.5
    found = compared("a.q_proj.weight", base, finetuned)
    assert (found.changed, found.nonfinite, found.changed_rows) == (4, 3, 2)
    assert found.norm == pytest.approx(0.5, rel=1e-5) and found.largest == pytest.approx(0.5, rel=1e-5)
    assert found.stable_rank == pytest.approx(1, rel=1e-4)  # a single entry is a matrix of rank one
    assert math.isfinite(found.base_norm) and found.bits > 0


def test_a_base_is_rounded_before_it_is_compared() -> None:
    base = numbers(64, 64)
    finetuned = base.bfloat16()
    assert compared("weight", base, finetuned).is_equal
    assert compared("weight", base, moved(finetuned, torch.tensor([5]))).changed == 1


def test_negative_zero_is_another_number() -> None:
    found = compared("weight", torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert found.changed == 1 and found.norm == 0 and found.relative_norm == 0


def test_a_delta_of_a_zero_base_has_no_relative_norm() -> None:
    assert compared("weight", torch.zeros(3), torch.ones(3)).relative_norm is None


def test_the_spectrum_is_that_of_the_delta() -> None:
    base, left, right = numbers(300, 400), numbers(300, 20, seed=1), numbers(20, 400, seed=2)
    found = compared("weight", base, base + 0.01 * left @ right)
    sigma = torch.linalg.svdvals(0.01 * (left @ right).double())
    assert found.stable_rank == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2), rel=1e-3)
    assert found.leading[16] == pytest.approx(float(sigma[:16].square().sum() / sigma.square().sum()), rel=1e-3)
    assert found.leading[64] == pytest.approx(1, abs=1e-4) and found.leading[256] == pytest.approx(1, abs=1e-4)
    (spectrum,) = found.spectra
    assert (spectrum.rows, spectrum.columns) == (300, 400)
    assert spectrum.relative_norm == pytest.approx(
        float(sigma.square().sum().sqrt() / (base + left @ right / 100).norm())
    )
    assert compared("weight", base, base + left @ right, with_spectra=False).stable_rank is None


def test_experts_in_a_stack_have_a_spectrum_each() -> None:
    base = numbers(3, 64, 80)
    finetuned = base.clone()
    finetuned[0] += 0.1 * numbers(64, 1, seed=1) @ numbers(1, 80, seed=2)
    finetuned[2] += torch.eye(64, 80)
    found = compared("model.layers.0.mlp.experts.gate_up_proj", base, finetuned)
    assert len(found.spectra) == 2 and found.kind == "experts"
    assert found.stable_rank == pytest.approx((1 + 64) / 2, rel=1e-2)
    assert found.changed == 64 * 80 + 64 and found.changed_rows == 128


def test_more_entries_than_are_looked_at_together() -> None:
    base = torch.ones(3000, 2000, dtype=torch.bfloat16)
    finetuned = base.clone()
    finetuned[::10, 7] = 2
    finetuned[-1, 8] = 3
    found = compared("weight", base, finetuned)
    assert (found.changed, found.changed_rows, found.largest) == (301, 301, 2.0)
    assert found.norm == pytest.approx(math.sqrt(300 + 4)) and found.stable_rank == pytest.approx(304 / 300, rel=1e-3)
    # 128 and 192 steps up are 256 and 384 in the order of steps: two tokens, with five bits below each.
    assert found.bits == pytest.approx(entropy(300 / 6e6, 1 / 6e6) + 5 * 301 / 6e6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [400, 40])
def test_the_codec_takes_about_as_much(dtype: torch.dtype, rows: int) -> None:
    base = numbers(400, 500, dtype=dtype)
    finetuned = base.clone()
    finetuned[:rows] = (base[:rows].float() * (1 + 0.01 * numbers(rows, 500, seed=1))).to(dtype)
    record = encode_exact(base, finetuned)
    assert exact_bits(base, finetuned) / 8 < len(record) < 1.1 * exact_bits(base, finetuned) / 8 + 2000


def test_rows_that_were_added() -> None:
    base = numbers(100, 64, dtype=torch.bfloat16)
    found = compared("embed", base, torch.cat([base, base[:3] + 1]), vocabulary=True)
    assert found.added_rows == 3 and found.changed == 0 and not found.is_equal
    assert found.exact_bytes == 3 * 64 * 2 and found.dense_bytes == 103 * 64 * 2 and found.shape == (100, 64)


@pytest.mark.parametrize("shape", [(), (0, 64), (5,), (2, 3, 4, 5)])
def test_shapes_without_a_matrix(shape: tuple[int, ...]) -> None:
    base = numbers(*shape)
    assert compared("x.weight", base, base.clone()).is_equal
    found = compared("x.weight", base, base + 1)
    assert found.changed == base.numel() and found.stable_rank is None
    assert found.to_dict()["changed_share"] == (1.0 if base.numel() else 0.0)


@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 4), (2, 0, 3)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    found = compared("empty", torch.zeros(shape), torch.zeros(shape))
    assert (found.entries, found.changed, found.bits) == (0, 0, 0.0)
