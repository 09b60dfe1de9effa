"""Merging, against naive versions in float64, against mergekit itself, and against what cannot be merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import (
    edit_tensors,
    fine_tune,
    load_tensors,
    make_model,
    save_model,
    tiny_config,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from impart_hf import ImPartConfig, LowRankConfig, MergeConfig, MergeModel, compress, merge
from impart_hf.merging.task_vectors import dare, impart
from impart_hf.methods.allocation import keep_ratios
from impart_hf.methods.svd import leading_svd

TOKENS = len(tiny_tokenizer())
LINEAR = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, its fine-tunes `a`, `b`, `c` in float32, and `c-delta`, nearly c; not to be written to."""
    folder = tmp_path_factory.mktemp("merging")
    base = make_model(tiny_config("llama", num_hidden_layers=3, vocab_size=TOKENS), dtype=torch.float32)
    save_model(base, folder / "base")
    for seed, name in enumerate("abc", 1):
        save_model(fine_tune(base, seed), folder / name)
    compress(str(folder / "base"), str(folder / "c"), folder / "c-delta", LowRankConfig(compression_ratio=1.5))
    return folder


def config(family: Path, method: str, models: dict[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A merge's configuration, of models of the family with their parameters."""
    listed = [{"model": str(family / name), "parameters": parameters} for name, parameters in models.items()]
    return {"merge_method": method, "base_model": str(family / "base"), "models": listed, **more}


def deltas_of(family: Path, *names: str) -> list[dict[str, torch.Tensor]]:
    """float64 deltas of models of the family, by tensor."""
    base = load_tensors(family / "base")
    return [
        {name: tensor.double() - base[name].double() for name, tensor in load_tensors(family / model).items()}
        for model in names
    ]


def merged_deltas(family: Path, folder: Path) -> dict[str, torch.Tensor]:
    base = load_tensors(family / "base")
    return {name: tensor.double() - base[name].double() for name, tensor in load_tensors(folder).items()}


def assert_near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


def naive_ties(
    deltas: list[torch.Tensor], weights: list[float], densities: list[float], normalize: bool = True
) -> torch.Tensor:
    """TIES entry by entry, in float64."""
    rows = [delta.flatten().tolist() for delta in deltas]
    for row, density in zip(rows, densities, strict=True):
        keep = max(1, int(density * len(row)))
        for place in sorted(range(len(row)), key=lambda i: -abs(row[i]))[keep:]:
            row[place] = 0.0
    merged = []
    for column in zip(*rows, strict=True):
        weighted = [weight * value for weight, value in zip(weights, column, strict=True)]
        positive = sum(weighted) >= 0
        agreeing = [i for i, value in enumerate(weighted) if value != 0 and (value > 0) == positive]
        total = sum(weighted[i] for i in agreeing)
        divisor = sum(weights[i] for i in agreeing)
        merged.append(total / divisor if normalize and divisor else total)
    return torch.tensor(merged, dtype=torch.float64).view(deltas[0].shape)


@pytest.mark.parametrize(
    "method", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "impart_linear", "impart_ties"]
)
def test_one_model_with_nothing_dropped_is_that_model(family, tmp_path, method):
    report = merge(config(family, method, {"a": {}}), tmp_path / "out")
    assert_near(load_tensors(tmp_path / "out"), load_tensors(family / "a"))
    assert report.parameters == sum(t.numel() for t in load_tensors(family / "a").values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM" and AutoTokenizer.from_pretrained(tmp_path / "out")


def test_one_bfloat16_model_is_that_model_bit_by_bit(tmp_path):
    base = make_model(tiny_config("qwen2"))
    save_model(base, tmp_path / "base")
    save_model(fine_tune(base), tmp_path / "tuned")
    merge(config(tmp_path, "task_arithmetic", {"tuned": {"weight": 1}}), tmp_path / "out")
    found, wanted = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "tuned")
    assert all(torch.equal(found[name], tensor) and tensor.dtype == torch.bfloat16 for name, tensor in wanted.items())


def test_task_arithmetic(family, tmp_path):
    merge(
        config(family, "task_arithmetic", {"a": {"weight": 0.7}, "b": {"weight": -0.2}}, parameters={"lambda": 0.8}),
        tmp_path / "out",
    )
    a, b = deltas_of(family, "a", "b")
    assert_near(merged_deltas(family, tmp_path / "out"), {n: 0.8 * (0.7 * a[n] - 0.2 * b[n]) for n in a})
    again = {"weight": 0.5}, {"normalize": True}
    merge(config(family, "task_arithmetic", {"a": again[0], "b": again[0]}, parameters=again[1]), tmp_path / "mean")
    assert_near(merged_deltas(family, tmp_path / "mean"), {n: (a[n] + b[n]) / 2 for n in a})


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_against_a_naive_version(family, tmp_path, normalize):
    weights, densities = [1.0, 0.5, 0.8], [0.4, 0.6, 0.8]
    models = {n: {"weight": w, "density": d} for n, w, d in zip(("a", "b", "c"), weights, densities, strict=True)}
    merge(config(family, "ties", models, parameters={"normalize": normalize, "lambda": 0.9}), tmp_path / "out")
    deltas = deltas_of(family, "a", "b", "c")
    found = merged_deltas(family, tmp_path / "out")
    for name in (LINEAR, "model.norm.weight", "model.layers.2.self_attn.k_proj.weight"):
        wanted = 0.9 * naive_ties([d[name] for d in deltas], weights, densities, normalize)
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=2e-6)


def test_ties_trims_a_model_to_its_largest_entries(family, tmp_path):
    merge(config(family, "ties", {"a": {"density": 0.3}}), tmp_path / "out")
    (delta,), found = deltas_of(family, "a"), merged_deltas(family, tmp_path / "out")[LINEAR]
    kept = found.abs() > 1e-9
    assert int(kept.sum()) == int(0.3 * kept.numel())
    assert delta[LINEAR].abs()[kept].min() >= delta[LINEAR].abs()[~kept].max()


MERGEKIT_FILES = {
    "task arithmetic": """
        merge_method: task_arithmetic
        base_model: BASE
        models:
          - {model: A, parameters: {weight: 0.6}}
          - {model: B, parameters: {weight: [0.2, 0.9]}}
        parameters: {lambda: 0.7}
        dtype: float32
    """,
    "task arithmetic, normalised": """
        merge_method: task_arithmetic
        base_model: BASE
        models: [{model: A, parameters: {weight: 0.6}}, {model: C, parameters: {weight: 0.9}}]
        parameters: {normalize: true}
    """,
    # The example of mergekit's own repository: gradients, filters, and the base among the models
    "ties": """
        models:
          - model: BASE # no parameters necessary for base model
          - model: A
            parameters:
              density: [1, 0.7, 0.1] # density gradient
              weight: 1.0
          - model: B
            parameters:
              density: 0.5
              weight: [0, 0.3, 0.7, 1] # weight gradient
          - model: C
            parameters:
              density: 0.33
              weight:
                - filter: mlp
                  value: 0.5
                - value: 0
        merge_method: ties
        base_model: BASE
        parameters:
          normalize: true
          int8_mask: true
        dtype: float32
    """,
    "ties, not normalised": """
        merge_method: ties
        base_model: BASE
        models:
          - {model: A, parameters: {weight: 1e-1}}
          - {model: B, parameters: {weight: {filter: self_attn, value: 0.3}}}
          - {model: C, parameters: {weight: [{filter: "*", value: [0.1, 0.5]}]}}
        parameters: {normalize: false, density: 0.4, weight: 0.25, lambda: [{filter: q_proj, value: 2}, {value: 0.5}]}
    """,
    "dare with nothing to drop": """
        merge_method: dare_ties
        base_model: BASE
        models: [{model: A, parameters: {weight: 0.6}}, {model: B, parameters: {weight: 0.5, density: 1.0}}]
    """,
}


@pytest.mark.parametrize("name", MERGEKIT_FILES)
def test_the_same_as_mergekit(family, tmp_path, name):
    """mergekit's own files, unchanged, give what mergekit gives."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    text = MERGEKIT_FILES[name]
    for key, model in (("BASE", "base"), ("A", "a"), ("B", "b"), ("C", "c")):
        text = text.replace(f"model: {key}", f"model: {family / model}")
    (tmp_path / "merge.yaml").write_text(text)
    merge(tmp_path / "merge.yaml", tmp_path / "ours")
    configuration = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(configuration, str(tmp_path / "theirs"), MergeOptions(copy_tokenizer=False, quiet=True))
    ours, theirs = load_tensors(tmp_path / "ours"), load_tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for tensor, wanted in theirs.items():
        torch.testing.assert_close(ours[tensor], wanted, rtol=0, atol=2e-6)


def test_dare():
    delta = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    found = dare(delta, 0.25, True, 3)
    assert torch.equal(torch.get_rng_state(), state)
    kept = found != 0
    assert abs(float(kept.float().mean()) - 0.25) < 0.03
    torch.testing.assert_close(found[kept], delta[kept] / 0.25)
    assert torch.equal(found, dare(delta, 0.25, True, 3)) and not torch.equal(found, dare(delta, 0.25, True, 4))
    torch.testing.assert_close(dare(delta, 0.25, False, 3)[kept], delta[kept])


@pytest.mark.parametrize("shape", [(96, 96), (160, 64), (64, 160)])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_impart(shape, density):
    """As many entries of U and V as the paper's sparsity says, unbiased, and better than DARE."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, min(shape) + 1) ** -1.0
    u, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator))
    v, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator))
    delta = (u * scale) @ v.t()
    seen = []

    def svd(matrix, wanted):
        seen.append(leading_svd(matrix, wanted))
        return seen[-1]

    found = torch.stack([impart(delta, density, 0.6, 1.0, seed, svd) for seed in range(200)])
    u, sigma, v = seen[0]
    sparsity = 1 - density * shape[0] * shape[1] / (sum(shape) * min(shape))
    kept = keep_ratios(sigma.double().numpy(), min(shape), sparsity, 0.6, 1.0)
    assert sum(shape) * kept.sum() <= density * shape[0] * shape[1] + 1e-6
    u, sigma, v = (part[..., : len(kept)] for part in seen[0])
    leading = (u * sigma) @ v.t()
    variance = (found - leading).square().sum((1, 2)).mean()
    assert (found.mean(0) - leading).square().sum() < 1.5 * variance / len(found) + 1e-9  # at 0.9 nothing is random
    if density < 0.9:  # the components that are pruned beforehand cost more than DARE's noise there
        assert (found - delta).square().sum((1, 2)).mean() < delta.square().sum() * (1 / density - 1)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "impart_linear", "impart_ties"])
def test_sparsified_beforehand(family, tmp_path, method):
    models = {"a": {"weight": 0.5, "density": 0.4}, "b": {"weight": 0.5, "density": 0.9}}
    found = {}
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(found)}"
        merge(config(family, method, models, parameters={"seed": seed}), out)
        found[len(found)] = merged_deltas(family, out)
    a, b = deltas_of(family, "a", "b")
    assert torch.equal(found[0][LINEAR], found[1][LINEAR]) and not torch.equal(found[0][LINEAR], found[2][LINEAR])
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):  # whole
        plain = (
            naive_ties([a[name], b[name]], [0.5, 0.5], [1, 1], False) if "ties" in method else (a[name] + b[name]) / 2
        )
        torch.testing.assert_close(found[0][name], plain, rtol=0, atol=2e-6)
    if "linear" in method:
        mean = (a[LINEAR] + b[LINEAR]) / 2
        cosine = torch.cosine_similarity(found[0][LINEAR].flatten(), mean.flatten(), dim=0)
        assert 0.5 < cosine < 0.999


def test_both_models_have_masks_of_their_own(family, tmp_path):
    shutil.copytree(family / "a", tmp_path / "a2")
    models = {"a": {"density": 0.5}, str(tmp_path / "a2"): {"density": 0.5, "weight": -1}}
    merge(config(family, "dare_linear", models), tmp_path / "out")
    assert merged_deltas(family, tmp_path / "out")[LINEAR].abs().max() > 1e-3


def test_trimmed_after_sparsifying(family, tmp_path):
    models = {"a": {"density": 0.5, "trim_density": 0.2}}
    merge(config(family, "impart_ties", models), tmp_path / "out")
    kept = merged_deltas(family, tmp_path / "out")[LINEAR].abs() > 1e-9
    assert int(kept.sum()) == int(0.2 * kept.numel())


def test_experts(tmp_path):
    base = make_model(tiny_config("mixtral"), dtype=torch.float32)
    save_model(base, tmp_path / "base")
    for seed in (1, 2):
        save_model(fine_tune(base, seed), tmp_path / f"{seed}")
    for method in ("ties", "impart_linear", "dare_ties"):
        models = {f"{seed}": {"density": 0.5, "weight": 0.5} for seed in (1, 2)}
        merge(config(tmp_path, method, models), tmp_path / method)
        AutoModelForCausalLM.from_pretrained(tmp_path / method)


def test_blocks_make_no_difference(family, tmp_path, monkeypatch):
    models = {"a": {"density": 0.4}, "b": {"density": 0.6}}
    merge(config(family, "ties", models), tmp_path / "whole")
    monkeypatch.setattr("impart_hf.merging.merge._BLOCK_ENTRIES", 200)
    merge(config(family, "ties", models), tmp_path / "blocks")
    whole, blocks = load_tensors(tmp_path / "whole"), load_tensors(tmp_path / "blocks")
    assert all(torch.equal(blocks[name], tensor) for name, tensor in whole.items())


def test_dense_and_delta_repositories_mixed(family, tmp_path):
    for name in ("c", "c-delta"):
        merge(config(family, "ties", {"a": {"density": 0.5}, name: {"density": 0.5}}), tmp_path / name)
    dense, delta = (merged_deltas(family, tmp_path / name)[LINEAR] for name in ("c", "c-delta"))
    assert torch.cosine_similarity(dense.flatten(), delta.flatten(), dim=0) > 0.98
    assert not torch.equal(dense, delta)


def test_to_a_delta_repository(family, tmp_path):
    mixed = config(family, "task_arithmetic", {"a": {"weight": 0.5}, "c-delta": {"weight": 0.5}})
    merge(mixed, tmp_path / "dense")
    report = merge(mixed, tmp_path / "delta", compression=ImPartConfig(compression_ratio=2))
    assert report.compression is not None and report.compression.ratio >= 2
    assert json.loads((tmp_path / "delta" / "config.json").read_text())["base_model_name_or_path"] == str(
        family / "base"
    )
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "delta").state_dict()[LINEAR]
    base = load_tensors(family / "base")[LINEAR]
    wanted = load_tensors(tmp_path / "dense")[LINEAR]
    assert torch.cosine_similarity((found - base).flatten(), (wanted - base).flatten(), dim=0) > 0.8
    assert "c-delta" not in (tmp_path / "delta" / "config.json").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta", "dense"]
    # An older delta repository is replaced, as compress does
    merge(mixed, tmp_path / "delta", compression=ImPartConfig(compression_ratio=3))


def with_tokens(family: Path, folder: Path, tokens: list[str], seed: int) -> Path:
    """A fine-tune with tokens added to the vocabulary."""
    model = fine_tune(AutoModelForCausalLM.from_pretrained(family / "base"), seed)
    tokenizer = AutoTokenizer.from_pretrained(family / "base")
    tokenizer.add_tokens(tokens)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = len(tokenizer) - 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_added_tokens_come_from_the_models_that_have_them(family, tmp_path):
    one = with_tokens(family, tmp_path / "one", ["[PAD]"], 1)
    two = with_tokens(family, tmp_path / "two", ["[PAD]", "<extra>"], 2)
    models = {str(one): {"weight": 0.5}, "a": {"weight": 0.5}, str(two): {"weight": 0.5}}
    merge(config(family, "task_arithmetic", models), tmp_path / "out")
    found, first, second = (load_tensors(folder) for folder in (tmp_path / "out", one, two))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert found[name].shape[0] == TOKENS + 2
        torch.testing.assert_close(found[name][TOKENS], (first[name][TOKENS] + second[name][TOKENS]) / 2)
        assert torch.equal(found[name][TOKENS + 1], second[name][TOKENS + 1])
    a, b, c = (m[LINEAR].double() for m in (first, load_tensors(family / "a"), second))
    base = load_tensors(family / "base")[LINEAR].double()
    torch.testing.assert_close(found[LINEAR].double(), base + (a + b + c - 3 * base) / 2, rtol=0, atol=2e-6)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["vocab_size"] == TOKENS + 2 and content["pad_token_id"] == TOKENS + 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<extra>") == TOKENS + 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_another_vocabulary_is_chosen(family, tmp_path):
    one = with_tokens(family, tmp_path / "one", ["[PAD]"], 1)
    two = with_tokens(family, tmp_path / "two", ["<x>", "<y>"], 2)
    models = {str(one): {"weight": 0.5}, str(two): {"weight": 0.5}}
    with pytest.raises(ValueError, match=r"is '\[PAD\]' in .*one' and '<x>' in .*two': their added tokens"):
        merge(config(family, "task_arithmetic", models), tmp_path / "out")
    merge(config(family, "task_arithmetic", models, tokenizer_source=str(two)), tmp_path / "two-tokens")
    found, second = (load_tensors(folder)["lm_head.weight"] for folder in (tmp_path / "two-tokens", two))
    assert torch.equal(found[TOKENS:], second[TOKENS:])
    merge(config(family, "task_arithmetic", models, tokenizer_source="base"), tmp_path / "out")
    assert load_tensors(tmp_path / "out")["lm_head.weight"].shape[0] == TOKENS
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tiny_tokenizer())
    models = {str(one): {}, "a": {}}
    merge(config(family, "task_arithmetic", models, tokenizer_source=str(family / "a")), tmp_path / "a")
    assert load_tensors(tmp_path / "a")["lm_head.weight"].shape[0] == TOKENS


def test_a_base_without_a_tokenizer(family, tmp_path):
    base = shutil.copytree(family / "base", tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    merge(config(family, "ties", {"a": {}}, base_model=str(base)), tmp_path / "out")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == TOKENS


def test_dtype_and_shards(family, tmp_path):
    merge(config(family, "ties", {"a": {}}, dtype="bfloat16"), tmp_path / "out", max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert {t.dtype for t in load_tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_the_card(family, tmp_path):
    merge(config(family, "ties", {"a": {"weight": 0.5}, "b": {}}), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "merge_method: ties" in card and "weight: 0.5" in card and str(family) not in card


def test_a_base_that_is_pruned(tmp_path):
    from pruned_models import pruned_config  # the widths of every layer differ

    base = make_model(pruned_config(), dtype=torch.float32)
    save_model(base, tmp_path / "base")
    for seed in (1, 2):
        save_model(fine_tune(base, seed), tmp_path / f"{seed}")
    merge(config(tmp_path, "impart_ties", {"1": {"density": 0.5}, "2": {"density": 0.5}}), tmp_path / "out")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "PrunedLlamaForCausalLM"


# ---- what cannot be merged


def nothing_left(folder: Path) -> None:
    assert not folder.exists() and not [p for p in folder.parent.iterdir() if p.name.startswith(f".{folder.name}")]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"merge_method": "slerp"}, "unknown merge_method 'slerp'; known are task_arithmetic, ties"),
    "key": ({"slices": []}, "unknown key 'slices'; known are merge_method"),
    "no models": ({"models": []}, "models is missing"),
    "no method": ({"merge_method": None}, "merge_method is missing"),
    "models": ({"models": {"model": "x"}}, "models must be a list"),
    "model": ({"models": [{"modle": "x"}]}, "each must be `model:"),
    "key of a model": ({"models": [{"model": "x", "weight": 1}]}, "unknown key 'weight' of 'x'"),
    "base alone": ({"models": ["BASE"]}, "nothing to merge but the base"),
    "twice": ({"models": ["A", "A"]}, "is listed twice"),
    "twice, in two spellings": ({"models": ["A", "A/."]}, "is listed twice"),
    "parameter": ({"parameters": {"wieght": 1}}, "unknown parameter 'wieght'; known are lambda"),
    "parameters": ({"parameters": [1]}, "must be names with values"),
    "dtype": ({"dtype": "int8"}, "dtype must be one of float16"),
    "tokenizer": ({"tokenizer_source": "elsewhere"}, "tokenizer_source must be base, union"),
    "base": ({"base_model": 3}, "base_model must be a folder or a Hub id"),
    "weight": ({"parameters": {"weight": "heavy"}}, "weight must be a number, got 'heavy'"),
    "weight, null": ({"parameters": {"weight": None}}, "weight must be a number, got None"),
    "weight, true": ({"parameters": {"weight": True}}, "weight must be a number, got True"),
    "weight, infinite": ({"parameters": {"weight": float("inf")}}, "weight must be finite"),
    "weight, NaN": ({"parameters": {"weight": [1, float("nan")]}}, "weight must be a number, got nan"),
    "weight, empty": ({"parameters": {"weight": []}}, "weight is an empty list"),
    "weight, list": ({"parameters": {"weight": [1, [2]]}}, "weight must be a number"),
    "filter": ({"parameters": {"weight": [{"filter": 3, "value": 1}]}}, "a filter of weight must be a part of"),
    "filter without value": ({"parameters": {"weight": [{"filter": "mlp"}]}}, "not `filter: …, value: …`"),
    "filter in filter": ({"parameters": {"weight": [{"value": [{"value": 1}]}]}}, "may be a number or a list of num"),
    "density, 0": ({"parameters": {"density": 0}}, r"density must lie in \(0, 1\], got 0"),
    "density, above 1": ({"parameters": {"density": [0.5, 1.1]}}, r"density must lie in \(0, 1\], got 1.1"),
    "normalize": ({"parameters": {"normalize": "yes please"}}, "normalize must be true or false"),
    "rescale": ({"parameters": {"rescale": True}}, "rescale cannot be True for ties"),
    "beta": ({"parameters": {"beta": 0.5}}, "beta is ImPart's; ties has no use for it"),
    "trim": ({"parameters": {"trim_density": 0.5}}, "trim_density is for dare_ties and impart_ties"),
    "seed": ({"merge_method": "dare_ties", "parameters": {"seed": 1.5}}, "seed must be a whole number"),
    "seeds": ({"merge_method": "dare_ties", "parameters": {"seed": [1, 2]}}, "seed is one value for all tensors"),
    "a model's seed": ({"models": [{"model": "A", "parameters": {"seed": 1}}]}, "parameters of .* unknown parameter"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_configurations(family, tmp_path, name):
    changes, message = WRONG[name]
    content = json.loads(
        json.dumps({**config(family, "ties", {"a": {}}), **changes})
        .replace('"BASE"', json.dumps(str(family / "base")))
        .replace('"A"', json.dumps(str(family / "a")))
        .replace('"A/."', json.dumps(str(family / "a" / "..") + "/a/."))
    )
    with pytest.raises(ValueError, match=message):
        merge(content, tmp_path / "out")
    nothing_left(tmp_path / "out")


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        merge(tmp_path / "gone.yaml", tmp_path / "out")
    for text, message in (("a: [", "not valid YAML"), ("- a", "must be keys with values"), ("", "must be keys")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=rf"bad.yaml.*{message}"):
            merge(tmp_path / "bad.yaml", tmp_path / "out")


@pytest.mark.parametrize("delta", [False, True])
def test_models_of_other_bases(family, tmp_path, delta):
    other = make_model(tiny_config("llama", num_hidden_layers=3), seed=7, dtype=torch.float32)
    save_model(other, tmp_path / "other")
    stranger = save_model(fine_tune(other), tmp_path / "stranger")
    if delta:
        compress(str(tmp_path / "other"), str(stranger), tmp_path / "delta", LowRankConfig(compression_ratio=2))
        stranger = tmp_path / "delta"
    message = "is not the base of|differs from" if delta else r"stranger' is no fine-tune of .*the cosine between"
    with pytest.raises(ValueError, match=message):
        merge(config(family, "ties", {"a": {}, str(stranger): {}}), tmp_path / "out")
    nothing_left(tmp_path / "out")


def test_models_of_other_shapes(family, tmp_path):
    for name, changes, message in (
        ("wide", {"intermediate_size": 96, "num_hidden_layers": 3}, "has shape"),
        ("deep", {"num_hidden_layers": 4}, "is not a fine-tune of"),
    ):
        save_model(make_model(tiny_config("llama", **changes), dtype=torch.float32), tmp_path / name)
        with pytest.raises(ValueError, match=message):
            merge(config(family, "ties", {"a": {}, str(tmp_path / name): {}}), tmp_path / "out")
    save_model(make_model(tiny_config("mistral", num_hidden_layers=3), dtype=torch.float32), tmp_path / "mistral")
    with pytest.raises(ValueError, match="the base is a 'llama' model, the fine-tune a 'mistral' model"):
        merge(config(family, "ties", {str(tmp_path / "mistral"): {}}), tmp_path / "out")
    nothing_left(tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(family, tmp_path, value):
    shutil.copytree(family / "a", tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda tensors: tensors["model.norm.weight"].__setitem__(0, value))
    with pytest.raises(ValueError, match=r"model.norm.weight of '.*a' holds NaN or infinity"):
        merge(config(tmp_path, "ties", {"a": {}}, base_model=str(family / "base")), tmp_path / "out")
    nothing_left(tmp_path / "out")


def test_a_result_beyond_its_dtype(family, tmp_path):
    models = {"a": {"weight": 1e9}}
    with pytest.raises(ValueError, match="holds NaN or infinity: nothing is written"):
        merge(config(family, "task_arithmetic", models, dtype="float16"), tmp_path / "out")
    nothing_left(tmp_path / "out")


def test_models_that_are_not_there(family, tmp_path):
    with pytest.raises(OSError, match="no config.json|neither a local folder"):
        merge(config(family, "ties", {"gone": {}}), tmp_path / "out")
    nothing_left(tmp_path / "out")


@pytest.mark.parametrize("compression", [None, ImPartConfig(compression_ratio=2)])
def test_an_output_folder_that_holds_something_else(family, tmp_path, compression):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(OSError, match="choose another"):
        merge(config(family, "ties", {"a": {}}), tmp_path / "out", compression=compression)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["letter.txt"]


def test_configurations_in_python(family, tmp_path):
    models = tuple(MergeModel(str(family / name), {"weight": 0.5}) for name in "ab")
    same = MergeConfig("ties", str(family / "base"), models, {"density": 0.5})
    merge(same, tmp_path / "one")
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(same.to_dict()))
    merge(tmp_path / "merge.yaml", tmp_path / "two")
    one, two = load_tensors(tmp_path / "one"), load_tensors(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert MergeConfig.from_yaml(tmp_path / "merge.yaml").to_dict() == same.to_dict()


def test_density_has_no_effect_on_task_arithmetic(family, tmp_path):
    report = merge(config(family, "task_arithmetic", {"a": {"density": 0.5}}), tmp_path / "out")
    assert "density has no effect" in report.notes[0]
