"""The encoders against the papers' formulas, written out naively."""

import re

import numpy as np
import pytest
import torch
from support import naive_impart
from support.messages import naming
from support.random_deltas import make_delta
from transformers import HfArgumentParser

from impart_hf import DareConfig, ImPartConfig, LowRankConfig
from impart_hf.coding.keep_ratios import keep_ratios
from impart_hf.coding.record_sizes import kept_ratios
from impart_hf.methods import MethodConfig, method_class, method_names
from impart_hf.modeling.delta_decode import decode_planes, decode_record
from impart_hf.modeling.delta_record import Record, parse_record

SHAPES = [(96, 96), (48, 128), (128, 48), (400, 64)]


def encode(method: MethodConfig, delta: torch.Tensor, ratio: float, seed: int = 1) -> tuple[Record, int]:
    budget = int(delta.numel() * 2 / ratio)
    data = method.encode(delta, budget, seed).data
    assert len(data) <= budget
    record, length = parse_record(np.frombuffer(data, np.uint8), tuple(delta.shape), "delta")
    assert length == len(data)
    return record, budget


@pytest.mark.parametrize("decay", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("c", [0.5, 1.0, None])
@pytest.mark.parametrize("beta", [0.0, 0.6, 0.8])
@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.95, 0.99])
def test_keep_ratios_are_those_of_algorithm_1(decay: float, c: float | None, beta: float, sparsity: float) -> None:
    sigma = np.arange(1, 161, dtype=np.float64) ** -decay
    naive = 1 - np.array(naive_impart.drop_ratios(sigma.tolist(), 160, sparsity, beta, c))
    ours = keep_ratios(sigma, 160, sparsity, beta, c)
    np.testing.assert_allclose(ours, naive[: len(ours)], atol=1e-12)
    assert (naive[len(ours) :] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["impart", "dare", "lowrank"])
@pytest.mark.parametrize("ratio", [1.5, 4, 12])
def test_records_fit_and_use_their_budget(name: str, shape: tuple[int, int], ratio: float) -> None:
    delta = make_delta(*shape)
    method = method_class(name)(compression_ratio=ratio)
    if delta.numel() * 2 / ratio < method.least_bytes(*shape):
        pytest.skip("the ratio is out of reach for this shape")
    record, budget = encode(method, delta, ratio)
    size = len(method.encode(delta, budget, 1).data)
    # What is left is at most one singular component of float16 values.
    assert size > min(budget - 2 * (sum(shape) + 2), delta.numel() * 2) * 0.97
    assert record.relative_error == pytest.approx(
        ((decode_record(record, "delta") - delta).norm() / delta.norm()).item(), rel=1e-5
    )


@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_without_importance_all_components_have_one_ratio(beta: float) -> None:
    record, budget = encode(ImPartConfig(importance=False, beta=beta), make_delta(96, 96), 8)
    (ratio,) = set(kept_ratios(record.thresholds).tolist())
    assert record.rank == int(96 * (1 - beta) + 1e-9)
    # Each component has a singular value and a threshold of 2 bytes, and 2 bytes for each entry that is kept.
    assert ratio == pytest.approx((budget / record.rank - 4) / 2 / (96 + 96), rel=0.15)


def test_without_rescale_values_are_kept_as_they_are() -> None:
    delta = make_delta(96, 96)
    plain, _ = encode(ImPartConfig(importance=False, rescale=False), delta, 8)
    rescaled, _ = encode(ImPartConfig(importance=False), delta, 8)
    ratio = kept_ratios(plain.thresholds)[0].item()
    torch.testing.assert_close(decode_record(plain, "delta"), decode_record(rescaled, "delta") * ratio**2)


@pytest.mark.parametrize(("name", "value"), [("importance", 1), ("rescale", "no")])
def test_switches_are_true_or_false(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=naming(name, value)):
        ImPartConfig(**{name: value})


def test_an_exponent_of_no_importance_is_refused() -> None:
    with pytest.raises(ValueError, match=naming("c", "importance")):
        ImPartConfig(c=0.5, importance=False)


def test_impart_uses_every_budget() -> None:
    """Masks keep more or fewer entries than expected; whatever the budget, at most one component of it stays unused."""
    delta = make_delta(48, 72)
    component = 2 * (48 + 72) + 4
    for budget in range(500, 6000, 53):
        for seed in range(3):
            size = len(ImPartConfig(compression_ratio=4).encode(delta, budget, seed).data)
            assert budget - 1.5 * component < size <= budget, (budget, seed)


@pytest.mark.slow
def test_impart_is_unbiased_over_seeds() -> None:
    """Equations 4 and 5: rescaling by 1/q makes the expectation the un-dropped leading part."""
    delta = make_delta(64, 64)
    method = ImPartConfig(compression_ratio=4)
    records = [encode(method, delta, 4, seed)[0] for seed in range(400)]
    mean = torch.stack([decode_record(r, "delta") for r in records]).mean(0)
    u, sigma, vt = torch.linalg.svd(delta)
    rank = max(r.rank for r in records)
    leading = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
    one = (decode_record(records[0], "delta") - leading).norm()
    # the error of a mean of 400 falls twentyfold
    assert (mean - leading).norm() < 0.08 * one


def test_impart_record_holds_the_singular_vectors() -> None:
    delta = make_delta(80, 120)
    record, _ = encode(ImPartConfig(compression_ratio=3), delta, 3)
    u, sigma, vt = torch.linalg.svd(delta, full_matrices=False)
    stored = record.scale * record.sigma.astype(np.float64) * record.keep_ratios() ** 2
    np.testing.assert_allclose(stored, sigma[: record.rank].numpy(), rtol=2e-3)
    for plane, true in zip(decode_planes(record, "delta"), (u, vt.T), strict=True):
        dense = plane.dense()
        kept = dense != 0
        similarity = (dense * true[:, : record.rank].T).sum(1)
        expected = (true[:, : record.rank].T ** 2 * kept).sum(1)
        np.testing.assert_allclose(similarity.abs(), expected, atol=2e-3)


def test_impart_lowers_beta_to_fit_and_says_so() -> None:
    delta = make_delta(256, 64)
    encoded = ImPartConfig(compression_ratio=1.2, beta=0.8).encode(delta, int(delta.numel() * 2 / 1.2), 0)
    assert encoded.notes and re.search(naming("beta", 0.8), encoded.notes[0])
    assert not ImPartConfig(compression_ratio=16).encode(delta, delta.numel() * 2 // 16, 0).notes


def test_lowrank_is_the_best_approximation_of_its_rank() -> None:
    delta = make_delta(96, 160)
    record, budget = encode(LowRankConfig(compression_ratio=6), delta, 6)
    assert record.rank == (budget - 40) // (2 * (96 + 160) + 2)
    _, sigma, _ = torch.linalg.svd(delta)
    best = (sigma[record.rank :].norm() / sigma.norm()).item()
    assert record.relative_error == pytest.approx(best, rel=1e-3)


def test_dare_keeps_entries_of_the_delta_times_one_over_q() -> None:
    delta = make_delta(100, 90)
    record, _ = encode(DareConfig(compression_ratio=5), delta, 5)
    decoded = decode_record(record, "delta")
    kept = decoded != 0
    q = record.keep_ratios()[0]
    assert kept.float().mean().item() == pytest.approx(q, abs=0.02)
    torch.testing.assert_close(decoded[kept] * q, delta[kept], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["impart", "dare", "lowrank"])
def test_small_deltas_keep_their_precision(name: str) -> None:
    """Light fine-tunes change weights by millionths, under float16's normal range."""
    delta = make_delta(96, 96)
    method = method_class(name)(compression_ratio=4)
    large, _ = encode(method, delta, 4)
    small, _ = encode(method, delta * 1e-6, 4)
    assert small.relative_error == pytest.approx(large.relative_error, rel=0.02)


@pytest.mark.parametrize("value_dtype", ["float16", "bfloat16"])
def test_value_dtypes(value_dtype: str) -> None:
    delta = make_delta(96, 96)
    exact, _ = encode(LowRankConfig(compression_ratio=2), delta, 2)
    record, _ = encode(LowRankConfig(compression_ratio=2, value_dtype=value_dtype), delta, 2)
    assert record.relative_error < exact.relative_error * 1.05 + 0.003


def test_same_seed_same_bytes() -> None:
    delta = make_delta(64, 96)
    for name in method_names():
        method = method_class(name)(compression_ratio=4)
        assert method.encode(delta, 3000, 5).data == method.encode(delta.clone(), 3000, 5).data
    assert ImPartConfig().encode(delta, 3000, 5).data != ImPartConfig().encode(delta, 3000, 6).data


@pytest.mark.parametrize("ratio", [1, 0, -3, float("nan"), float("inf"), True, "32"])
def test_ratio_must_be_above_one(ratio: object) -> None:
    with pytest.raises(ValueError, match="compression_ratio"):
        ImPartConfig(compression_ratio=ratio)  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", [{"beta": "x"}, {"beta": 1.0}, {"beta": -0.1}, {"c": 0}, {"c": True}, {"c": "x"}])
def test_impart_settings_are_checked(setting: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        ImPartConfig(**setting)


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match=naming("'dart'", "dare")):
        method_class("dart")


@pytest.mark.parametrize("name", method_names())
def test_settings_are_arguments_of_transformers_parser(name: str) -> None:
    """`HfArgumentParser` makes options of a dataclass, with the help of its fields' metadata."""
    parser = HfArgumentParser(method_class(name))
    (method,) = parser.parse_args_into_dataclasses(["--compression_ratio", "8", "--seed", "3"])
    assert (method.name, method.compression_ratio, method.seed) == (name, 8.0, 3)
    assert "checkpoint bytes over repository bytes" in " ".join(parser.format_help().split())
