"""ImPart by rate and distortion: the choice of bits, the codes, the budget of the whole model."""

from __future__ import annotations

import importlib
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import naive_reader
from support.messages import naming
from support.random_deltas import delta_and_vectors, make_delta
from support.tiny_models import (
    Pair,
    edit_tensors,
    fine_tune,
    make_model,
    same_files,
    save_model,
    save_pair,
    tiny_config,
)
from support.workspaces import differing
from transformers import AutoModelForCausalLM

from impart_hf import ImPartQtConfig, ImPartRdConfig, compress
from impart_hf.cli.main import main
from impart_hf.coding import rate_distortion
from impart_hf.coding.allocation import allocate
from impart_hf.coding.factor_quantisation import quantised
from impart_hf.coding.gptq import Grid
from impart_hf.coding.rate_distortion import NOISE, Components, ErrorWeights, Matrix
from impart_hf.coding.record_sizes import kept_ratios
from impart_hf.compression.budgets import embedding_weight
from impart_hf.methods import Spectrum, impart_rd
from impart_hf.methods.impart_rd import best_widths
from impart_hf.modeling.delta_decode import decode_record
from impart_hf.modeling.delta_record import Record, parse_record
from impart_hf.modeling.width_codes import level_widths

HARM = ErrorWeights(3, 1, 0.25, 0.06)
SHAPES = [(96, 96), (48, 128), (400, 64)]


def encode(delta: torch.Tensor, budget: int, hessian: torch.Tensor | None = None, **settings: float) -> Record:
    data = ImPartRdConfig(**settings).encode(delta, budget, 1, hessian=hessian).data
    assert len(data) <= max(budget, 32)
    return parse_record(np.frombuffer(data, np.uint8), tuple(delta.shape), "delta")[0]


@pytest.mark.parametrize(
    "harm", [ErrorWeights(3, 1, 0.25, 0.06), ErrorWeights(1.5, 1, 1, 1), ErrorWeights(9, 1, 0.02, 0.01)]
)
@pytest.mark.parametrize("price", [1e-7, 1e-5, 1e-3, 1e-1])
def test_no_other_choice_costs_less(price: float, harm: ErrorWeights) -> None:
    sigma, rows, columns = np.geomspace(1, 1e-3, 40), 250, 70
    found = Components([Matrix(sigma, rows, columns, harm)]).choose(price)
    grid = np.linspace(0.01, 1, 400)

    def cost(energy: float, bits: tuple[int, int], kept: np.ndarray | float) -> np.ndarray:
        noise_u, noise_v = ((1 + NOISE[width]) / kept - 1 for width in bits)
        error = harm.u * noise_u + harm.v * noise_v + harm.both * noise_u * noise_v
        return energy * error + price * ((bits[0] * rows + bits[1] * columns) * kept + 32)

    for energy, bits, threshold in zip(sigma**2, found.bits, found.thresholds, strict=True):
        best = min(cost(energy, pair, grid).min() for pair in itertools.product(NOISE, NOISE))
        own = harm.dropped * energy
        if bits[0]:
            own = cost(energy, tuple(bits.tolist()), float(kept_ratios(np.array(threshold))))
        assert own <= min(best, harm.dropped * energy) * (1 + 1e-3)


def test_what_harms_more_has_more_bits() -> None:
    """Noise in u more than noise in v; strong components more than weak ones, and a matrix that counts for more."""
    sigma = np.geomspace(1, 0.1, 30)
    spectra = [Spectrum(sigma, 128, 128, float(np.square(sigma).sum()), weight=1.0)]
    spectra += [Spectrum(sigma, 128, 128, spectra[0].energy, vocabulary=True, weight=weight) for weight in (1.0, 9.0)]
    method = ImPartRdConfig()
    for spectrum in spectra:
        components = Components([method.matrix(spectrum)])
        bits_u, bits_v = components.choose(components.price_for(4000)).bits.T
        assert (bits_u >= bits_v).all() and (bits_u > bits_v).any() and (np.diff(bits_u) <= 0).all()
    _, tokens, rare = method.allocate(spectra, 6000)
    assert rare > tokens


def test_embeddings_of_few_changed_rows_count_for_more() -> None:
    base = 0.1 * torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    delta = torch.randn(400, 32, generator=torch.Generator().manual_seed(1))
    assert embedding_weight(base, delta) == 1.0
    delta[4:] = 0
    assert embedding_weight(base, delta) == pytest.approx(1 / (4 * 0.01), rel=0.2)
    assert embedding_weight(torch.zeros_like(base), delta) == 1.0  # of which nothing can be told


def test_noise_is_that_of_the_codes() -> None:
    """Relative squared error of the unbiased code of normally distributed numbers, by bits."""
    plane = torch.randn(4, 100_000, generator=torch.Generator().manual_seed(0))
    for bits, noise in NOISE.items():
        widths, scale = best_widths(plane, None, np.full(4, bits))
        grid = Grid(scale[:, None], widths)
        found = torch.nn.functional.cosine_similarity(plane, grid.values(grid.codes(plane)))
        assert (found**-2 - 1).numpy() == pytest.approx(noise, rel=0.05 if bits < 8 else 1.0), bits


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_those_that_round_best(bits: int) -> None:
    mask = torch.ones(2, 5000, dtype=torch.bool)
    normal = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    even = 2 * torch.rand(2, 5000, generator=torch.Generator().manual_seed(0)) - 1
    kinds = level_widths(bits)
    assert kinds == [bits, 32 + bits]
    for plane, width in ((normal, 32 + bits), (even, bits)):
        assert (best_widths(plane, mask, np.full(2, bits))[0] == width).all()


def test_u_makes_up_for_the_error_of_v() -> None:
    """The record is nearer to the delta than with the exact U rounded, and no more biased."""
    delta, u, v = delta_and_vectors(96, 128)
    whole, widths = np.full(40, 0xFFFF, np.uint16), np.full(40, 34)
    factors = u[:, :40], torch.linalg.svdvals(delta)[:40], v[:, :40]
    errors, along = [], []
    for given in (None, delta):
        found_u, weights, found_v, _ = quantised(*factors, whole, widths, 0, None, delta=given)
        found = (found_u * torch.from_numpy(weights).float()) @ found_v.t()
        errors.append(float((found - delta).square().sum()))
        along.append(float((((u.T @ found) * v.T).sum(1)[:40] / factors[1]).mean()))
    assert errors[1] < 0.95 * errors[0]
    assert along[1] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("budget", [500, 5_000, 50_000])
def test_the_price_uses_up_the_budget(budget: int) -> None:
    sigma = np.geomspace(1, 1e-2, 300)
    components = Components([Matrix(part, size, 300, HARM) for part, size in ((sigma[::2], 100), (sigma[1::2], 300))])
    size = components.choose(components.price_for(budget)).bytes.sum()
    assert 0.9 * budget - 100 < size <= budget


@pytest.mark.parametrize("budget", [30_000, 300_000, 2_000_000])
def test_bins_spend_what_single_components_would(budget: int) -> None:
    """The whole budget within 0.1 % and a component, and nearly the same part of it for each matrix."""
    draw = np.random.default_rng(0)
    spectra = [size * np.sort(draw.random(400))[::-1] for size in draw.lognormal(0, 1, 40)]
    method = ImPartRdConfig()
    matrices = [method.matrix(Spectrum(part, 500, 400, float(np.square(part).sum()))) for part in spectra]
    sizes = np.array(allocate(matrices, budget))
    assert budget * 0.999 - 600 < sizes.sum() <= budget  # a component has up to 600 bytes
    components = Components(matrices)
    low, high = 1e-12, 1e12
    while high / low > 1 + 1e-9:  # the price of every single component
        middle = (low * high) ** 0.5
        payload = components.choose(middle).bytes.reshape(40, 400).sum(1)
        low, high = (low, middle) if (payload + 40).sum() <= sizes.sum() else (middle, high)
    differences = np.abs(payload + 40 - sizes)
    assert differences.sum() < 0.01 * budget + 40 * 24  # several kinds of levels have more headers


@pytest.mark.parametrize("budget", [3_000, 300_000, 3_000_000])
def test_many_components_have_the_price_of_single_ones(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    sigma = [size * np.sort(draw.random(100))[::-1] for size in draw.lognormal(0, 2, 20)]
    components = Components([Matrix(part, 64, 300, HARM) for part in sigma])
    found = components.choose(components.price_for(budget))
    monkeypatch.setattr(rate_distortion, "FEW", 10**9)
    whole = components.choose(components.price_for(budget))
    assert abs(found.bytes.sum() - whole.bytes.sum()) <= 1e-3 * budget + 140 and found.bytes.sum() <= budget


def test_bytes_go_where_they_are_worth_most() -> None:
    spectra = [np.geomspace(10, 1, 64), np.geomspace(1, 0.1, 64), np.empty(0)]
    matrices = [Matrix(sigma, 64, 64, HARM) for sigma in spectra]
    sizes = allocate(matrices, 3000)
    assert sum(sizes) <= 3000 and sizes[0] > 2 * sizes[1] and sizes[2] == 40
    assert sum(sizes) > 2800
    assert allocate(matrices, 10) == [40, 40, 40]  # nothing but headers


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [4, 12, 40])
@pytest.mark.parametrize("drop_weight", [3.0, 10.0])
def test_records_fit_and_another_reader_agrees(shape: tuple[int, int], ratio: int, drop_weight: float) -> None:
    """With a high weight for what is dropped, entries are dropped instead: masks come into play."""
    delta = make_delta(*shape)
    budget = delta.numel() * 2 // ratio
    data = ImPartRdConfig(drop_weight=drop_weight).encode(delta, budget, 1).data
    assert budget * 0.8 - sum(shape) // 4 < len(data) <= budget
    record = parse_record(np.frombuffer(data, np.uint8), shape, "delta")[0]
    if ratio > 4 and drop_weight > 3:  # else there is room for all components whole
        assert (record.keep_ratios() < 1).any()
    ours = decode_record(record, "delta").double().numpy()
    np.testing.assert_allclose(naive_reader.decode_record(data)[0], ours, atol=1e-6 * np.abs(ours).max())


def test_every_width_is_used_and_none_is_biased() -> None:
    delta, u, v = delta_and_vectors(256, 256, decay=1.2)
    record = encode(delta, 9000)
    assert {segment.width_u for segment in record.segments} == {8, 36, 35, 34, 1}
    found = decode_record(record, "delta")
    along = ((u.T @ found) * v.T).sum(1)[: record.rank] / ((u.T @ delta) * v.T).sum(1)[: record.rank]
    assert float(along.mean()) == pytest.approx(1, abs=0.02)


def test_calibration_changes_the_output_less() -> None:
    delta = make_delta(96, 128)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(128, 128, generator=generator) * torch.arange(1, 129).float() ** -0.7
    inputs = torch.randn(1024, 128, generator=generator) @ mixing.T
    hessian = inputs.T @ inputs / len(inputs)
    errors = []
    for given in (None, hessian):
        error = decode_record(encode(delta, 2500, given), "delta") - delta
        errors.append(float((error @ hessian * error).sum()))
    assert errors[1] < 0.9 * errors[0]


def test_a_delta_tells_of_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of gradients is rounded so that the output on inputs like those it was made of changes less."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(128, 128, generator=generator) * torch.arange(1, 129).float() ** -0.7
    inputs = torch.randn(4096, 128, generator=generator) @ mixing.T
    gradients = torch.randn(4096, 96, generator=generator)
    delta = 1e-4 * gradients[:2048].T @ inputs[:2048]
    moments = inputs[2048:].T @ inputs[2048:]
    errors = []
    for guess in (True, False):
        with monkeypatch.context() as patch:
            if not guess:
                patch.setattr(impart_rd, "input_moments", lambda task: None)
            error = decode_record(encode(delta, 2500), "delta") - delta
        errors.append(float((error @ moments * error).sum()))
    assert errors[0] < 0.97 * errors[1]


def test_a_light_delta_is_not_taken_for_its_inputs() -> None:
    """It is rounded for inputs of which nothing is known, and nearest to itself."""
    delta, method = make_delta(96, 128), ImPartRdConfig(compression_ratio=8)

    def data(relative_norm: float | None) -> bytes:
        return method.encode(delta, 96 * 128 // 4, 0, relative_norm=relative_norm).data

    assert data(0.2) == data(None) != data(0.01)
    errors = [
        parse_record(np.frombuffer(data(norm), np.uint8), (96, 128), "m")[0].relative_error for norm in (0.2, 0.01)
    ]
    assert errors[1] < errors[0]


def test_a_matrix_that_is_worth_nothing_is_dropped() -> None:
    delta = make_delta(64, 64)
    encoded = ImPartRdConfig().encode(delta, 40, 1)
    assert len(encoded.data) == 32 and "dropped" in encoded.notes[0]
    assert not decode_record(parse_record(np.frombuffer(encoded.data, np.uint8), (64, 64), "d")[0], "d").any()


@pytest.mark.parametrize("weight", [0.5, float("inf"), float("nan"), "3"])
def test_wrong_settings(weight: object) -> None:
    with pytest.raises(ValueError, match=naming("drop_weight")):
        ImPartRdConfig(drop_weight=weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [1.0, 1e4, 1e12])
@pytest.mark.parametrize("count", [0, 1, 64])
def test_a_budget_of_next_to_nothing(weight: float, count: int) -> None:
    """However much errors count for, there is a price at which nothing is stored."""
    sigma = np.geomspace(1, 0.01, 64)[:count]
    spectra = [Spectrum(sigma, 320, 64, 1.0, True, weight), Spectrum(1e-9 * sigma, 64, 64, 1e-18)]
    assert ImPartRdConfig().allocate(spectra, 100) == [40, 40]
    assert sum(ImPartRdConfig().allocate(spectra, 3000)) <= 3000


def test_a_large_delta_leaves_room_for_small_ones() -> None:
    sigma = np.geomspace(1, 0.5, 64)
    spectra = [Spectrum(scale * sigma, 64, 64, float(np.square(scale * sigma).sum())) for scale in (1e9, 1.0)]
    large, small = ImPartRdConfig().allocate(spectra, 2 * 64 * 140)
    assert small > 0.9 * large


@pytest.mark.parametrize("changed", ["norm", "embed_tokens", "nothing"])
def test_fine_tunes_that_leave_nothing_to_spread(changed: str, tmp_path: Path) -> None:
    pair = save_pair(tmp_path / "pair", tiny_config("llama"), only=lambda name: changed in name)
    config = ImPartRdConfig(compression_ratio=8, embeddings="lowrank")
    report = compress(str(pair.base), str(pair.finetuned), tmp_path / "delta", config)
    assert bool(report.tensors) == (changed != "nothing")
    found, expected = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "delta", pair.finetuned)
    )
    assert all(torch.allclose(found[name], value, atol=0.05) for name, value in expected.items())


def test_calibration_of_a_layer_that_sees_nothing(tmp_path: Path) -> None:
    pair = save_pair(tmp_path / "pair", tiny_config("llama"))
    for folder in (pair.base, pair.finetuned):
        edit_tensors(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].zero_())
    text = {"calibration": ["A small difference. " * 400], "calibration_samples": 4, "calibration_length": 32}
    report = compress(str(pair.base), str(pair.finetuned), tmp_path / "delta", ImPartRdConfig(8.0), **text)
    (down,) = (tensor for tensor in report.tensors if tensor.name == "model.layers.1.mlp.down_proj.weight")
    assert down.relative_error < 1.2


def test_float64_weights(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, tiny_config("llama"), dtype=torch.float64)
    report = compress(str(pair.base), str(pair.finetuned), tmp_path / "delta", ImPartRdConfig(4.0))
    assert all(tensor.relative_error < 0.9 for tensor in report.tensors if tensor.kind == "encoded")


def test_a_resumed_run_has_the_budgets_of_the_first(
    tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = importlib.import_module("impart_hf.compression.encoding")
    real = encoding.tasks_of

    def interrupts(tensor: Any, *others: Any) -> Any:
        if "layers.1" in tensor.name:
            raise KeyboardInterrupt
        return real(tensor, *others)

    models = str(tiny_pair.base), str(tiny_pair.finetuned)
    compress(*models, tmp_path / "unbroken", ImPartRdConfig(8.0))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoding, "tasks_of", interrupts)
        compress(*models, tmp_path / "delta", ImPartRdConfig(8.0))
    monkeypatch.setattr("impart_hf.compression.pipeline.budgets_or_exact", None)
    compress(*models, tmp_path / "delta", ImPartRdConfig(8.0))
    assert differing(tmp_path / "unbroken", tmp_path / "delta") == []


def test_the_budget_is_the_models(tmp_path: Path) -> None:
    """A layer whose delta is ten times as large has most bytes; the embeddings take part."""
    base = make_model(tiny_config("llama"), dtype=torch.float32)
    tuned = fine_tune(base, 1, strength=0.3, only=lambda name: "layers.0." in name)
    tuned = fine_tune(tuned, 2, strength=0.03, only=lambda name: "layers.0." not in name)
    save_model(base, tmp_path / "base")
    save_model(tuned, tmp_path / "tuned")
    report = compress(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "delta", ImPartRdConfig(4.0))
    assert report.ratio >= 4 and not report.shortfall
    sizes = {tensor.name: tensor.bytes for tensor in report.tensors if tensor.kind == "encoded"}
    name = "model.layers.{}.mlp.up_proj.weight"
    assert sizes[name.format(0)] > 2 * sizes[name.format(1)]
    assert "model.embed_tokens.weight" in sizes
    AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "delta", "tuned"]


def test_experts(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, tiny_config("mixtral"))
    compress(str(pair.base), str(pair.finetuned), tmp_path / "delta", ImPartRdConfig(compression_ratio=8))
    AutoModelForCausalLM.from_pretrained(tmp_path / "delta")


def test_nearer_than_impart_qt_at_equal_bytes(tiny_pair: Pair, tmp_path: Path) -> None:
    """Less error that adds up: the outputs on some tokens are nearer to the fine-tune's."""
    wanted = AutoModelForCausalLM.from_pretrained(tiny_pair.finetuned, dtype=torch.float32)
    tokens = torch.arange(64).view(2, 32)
    errors = []
    for method in (ImPartRdConfig(compression_ratio=8), ImPartQtConfig(compression_ratio=8, groups=(1, 4))):
        compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / method.name, method)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / method.name, dtype=torch.float32)
        errors.append(float((model(tokens).logits - wanted(tokens).logits).square().mean()))
    assert errors[0] < errors[1]


@pytest.mark.parametrize("stopped_in", ["encode_all", "singular_values"])
def test_a_stopped_run_goes_on_with_what_was_decomposed(
    stopped_in: str, tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = str(tiny_pair.base), str(tiny_pair.finetuned)
    owner = ImPartRdConfig if stopped_in == "encode_all" else importlib.import_module("impart_hf.compression.budgets")
    work, calls = getattr(owner, stopped_in), []

    def counting(*rest: object, **more: object) -> object:
        calls.append(rest)
        if len(calls) == stops_at:
            raise KeyboardInterrupt
        return work(*rest, **more)

    monkeypatch.setattr(owner, stopped_in, counting)
    stops_at = 0
    compress(*arguments, tmp_path / "whole", ImPartRdConfig(8.0))
    whole, stops_at = len(calls), len(calls) + 3
    with pytest.raises(KeyboardInterrupt):
        compress(*arguments, tmp_path / "delta", ImPartRdConfig(8.0))
    if stopped_in == "encode_all":  # all values are known
        monkeypatch.setattr("impart_hf.compression.budgets.singular_values", None)
    compress(*arguments, tmp_path / "delta", ImPartRdConfig(8.0))
    assert len(calls) == 2 * whole + 1  # only what was stopped was begun again
    assert (tmp_path / "delta" / "delta_model.safetensors").read_bytes() == (
        tmp_path / "whole" / "delta_model.safetensors"
    ).read_bytes()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_size_instead_of_a_ratio(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pair = [str(tiny_pair.base), str(tiny_pair.finetuned)]
    report = compress(*pair, tmp_path / "delta", max_bytes="65KB")
    assert 60_000 < report.repository_bytes <= 65_000 and report.method["name"] == "impart-rd"
    command = ["compress", *pair, str(tmp_path / "command"), "--max-bytes", "65000", "--quiet"]
    assert main(command) == 0
    assert same_files(tmp_path / "delta", tmp_path / "command")
    assert main([*command, "--ratio", "4"]) == 1
    assert re.search(naming("--ratio", "--max-bytes"), capsys.readouterr().err)
    for size, named in (("1TB", 10**12), ("much", "'much'")):
        with pytest.raises(ValueError, match=naming("max_bytes", named)):
            compress(*pair, tmp_path / "no", max_bytes=size)


@pytest.mark.parametrize("seed", range(4))
def test_vectors_of_few_entries_and_nearly_equal_values_are_not_blown_up(seed: int) -> None:
    """Of a diagonal delta, the U that fits the rounded V best may have next to nothing along the exact U."""
    generator = torch.Generator().manual_seed(seed)
    delta = torch.diag(torch.rand(64, generator=generator))
    inputs = torch.randn(64, 192, generator=generator) * torch.logspace(0, -1, 64)[:, None]
    hessian = inputs @ inputs.T / 192
    for budget in (316, 572, 1084):
        error = decode_record(encode(delta, budget, hessian), "delta", "cpu") - delta
        assert (error @ hessian @ error.T).trace() < 1.5 * (delta @ hessian @ delta.T).trace()
