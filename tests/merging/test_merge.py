"""Merging, against naive versions in float64, against mergekit itself, and against what cannot be merged."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from support.merge_family import LINEAR, config, deltas_of, merged_deltas
from support.messages import naming
from support.tiny_models import (
    edit_json,
    edit_tensors,
    fine_tune,
    load_tensors,
    make_model,
    save_model,
    tiny_config,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
)

from impart_hf import ExactConfig, ImPartConfig, MergeConfig, MergeModel, merge
from impart_hf.coding.keep_ratios import keep_ratios
from impart_hf.coding.svd import leading_svd
from impart_hf.merging.task_vectors import dare, impart


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
def test_one_model_with_nothing_dropped_is_that_model(tunes, tmp_path, method):
    report = merge(config(tunes, method, {"a": {}}), tmp_path / "out")
    assert_near(load_tensors(tmp_path / "out"), load_tensors(tunes / "a"))
    assert report.parameters == sum(t.numel() for t in load_tensors(tunes / "a").values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM" and AutoTokenizer.from_pretrained(tmp_path / "out")


def test_one_bfloat16_model_is_that_model_bit_by_bit(tmp_path):
    base = make_model(tiny_config("qwen2"))
    save_model(base, tmp_path / "base")
    save_model(fine_tune(base), tmp_path / "tuned")
    merge(config(tmp_path, "task_arithmetic", {"tuned": {"weight": 1}}), tmp_path / "out")
    found, wanted = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "tuned")
    assert all(torch.equal(found[name], tensor) and tensor.dtype == torch.bfloat16 for name, tensor in wanted.items())


def test_task_arithmetic(tunes, tmp_path):
    merge(
        config(tunes, "task_arithmetic", {"a": {"weight": 0.7}, "b": {"weight": -0.2}}, parameters={"lambda": 0.8}),
        tmp_path / "out",
    )
    a, b = deltas_of(tunes, "a", "b")
    assert_near(merged_deltas(tunes, tmp_path / "out"), {n: 0.8 * (0.7 * a[n] - 0.2 * b[n]) for n in a})
    again = {"weight": 0.5}, {"normalize": True}
    merge(config(tunes, "task_arithmetic", {"a": again[0], "b": again[0]}, parameters=again[1]), tmp_path / "mean")
    assert_near(merged_deltas(tunes, tmp_path / "mean"), {n: (a[n] + b[n]) / 2 for n in a})


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_against_a_naive_version(tunes, tmp_path, normalize):
    weights, densities = [1.0, 0.5, 0.8], [0.4, 0.6, 0.8]
    models = {n: {"weight": w, "density": d} for n, w, d in zip(("a", "b", "c"), weights, densities, strict=True)}
    merge(config(tunes, "ties", models, parameters={"normalize": normalize, "lambda": 0.9}), tmp_path / "out")
    deltas = deltas_of(tunes, "a", "b", "c")
    found = merged_deltas(tunes, tmp_path / "out")
    for name in (LINEAR, "model.norm.weight", "model.layers.2.self_attn.k_proj.weight"):
        wanted = 0.9 * naive_ties([d[name] for d in deltas], weights, densities, normalize)
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=2e-6)


def test_ties_trims_a_model_to_its_largest_entries(tunes, tmp_path):
    merge(config(tunes, "ties", {"a": {"density": 0.3}}), tmp_path / "out")
    (delta,), found = deltas_of(tunes, "a"), merged_deltas(tunes, tmp_path / "out")[LINEAR]
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
def test_the_same_as_mergekit(tunes, tmp_path, name):
    """mergekit's own files, unchanged, give what mergekit gives."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    text = MERGEKIT_FILES[name]
    for key, model in (("BASE", "base"), ("A", "a"), ("B", "b"), ("C", "c")):
        text = text.replace(f"model: {key}", f"model: {tunes / model}")
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
def test_sparsified_beforehand(tunes, tmp_path, method):
    models = {"a": {"weight": 0.5, "density": 0.4}, "b": {"weight": 0.5, "density": 0.9}}
    found = {}
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(found)}"
        merge(config(tunes, method, models, parameters={"seed": seed}), out)
        found[len(found)] = merged_deltas(tunes, out)
    a, b = deltas_of(tunes, "a", "b")
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


def test_both_models_have_masks_of_their_own(tunes, tmp_path):
    shutil.copytree(tunes / "a", tmp_path / "a2")
    models = {"a": {"density": 0.5}, str(tmp_path / "a2"): {"density": 0.5, "weight": -1}}
    merge(config(tunes, "dare_linear", models), tmp_path / "out")
    assert merged_deltas(tunes, tmp_path / "out")[LINEAR].abs().max() > 1e-3


def test_trimmed_after_sparsifying(tunes, tmp_path):
    models = {"a": {"density": 0.5, "trim_density": 0.2}}
    merge(config(tunes, "impart_ties", models), tmp_path / "out")
    kept = merged_deltas(tunes, tmp_path / "out")[LINEAR].abs() > 1e-9
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


def test_blocks_make_no_difference(tunes, tmp_path, monkeypatch):
    models = {"a": {"density": 0.4}, "b": {"density": 0.6}}
    merge(config(tunes, "ties", models), tmp_path / "whole")
    monkeypatch.setattr("impart_hf.merging.merge.BLOCK_ENTRIES", 200)
    merge(config(tunes, "ties", models), tmp_path / "blocks")
    whole, blocks = load_tensors(tmp_path / "whole"), load_tensors(tmp_path / "blocks")
    assert all(torch.equal(blocks[name], tensor) for name, tensor in whole.items())


def test_dense_and_delta_repositories_mixed(tunes, tmp_path):
    for name in ("c", "c-delta"):
        merge(config(tunes, "ties", {"a": {"density": 0.5}, name: {"density": 0.5}}), tmp_path / name)
    dense, delta = (merged_deltas(tunes, tmp_path / name)[LINEAR] for name in ("c", "c-delta"))
    assert torch.cosine_similarity(dense.flatten(), delta.flatten(), dim=0) > 0.98
    assert not torch.equal(dense, delta)


def test_to_a_delta_repository(tunes, tmp_path):
    mixed = config(tunes, "task_arithmetic", {"a": {"weight": 0.5}, "c-delta": {"weight": 0.5}})
    merge(mixed, tmp_path / "dense")
    report = merge(mixed, tmp_path / "delta", compression=ImPartConfig(compression_ratio=2))
    assert report.compression is not None and report.compression.ratio >= 2
    assert json.loads((tmp_path / "delta" / "config.json").read_text())["base_model_name_or_path"] == str(
        tunes / "base"
    )
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "delta").state_dict()[LINEAR]
    base = load_tensors(tunes / "base")[LINEAR]
    wanted = load_tensors(tmp_path / "dense")[LINEAR]
    assert torch.cosine_similarity((found - base).flatten(), (wanted - base).flatten(), dim=0) > 0.8
    assert "c-delta" not in (tmp_path / "delta" / "config.json").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta", "dense"]
    # An older delta repository is replaced, as compress does
    merge(mixed, tmp_path / "delta", compression=ImPartConfig(compression_ratio=3))


def test_to_an_exact_delta(tunes, tmp_path):
    both = config(tunes, "ties", {"a": {}, "c": {}})
    merge(both, tmp_path / "dense")
    report = merge(both, tmp_path / "delta", compression=ExactConfig())
    assert report.compression is not None and report.compression.method == {"name": "exact"}
    found, wanted = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").state_dict() for name in ("delta", "dense")
    )
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert "ties" in (tmp_path / "delta" / "README.md").read_text()


def test_to_a_delta_repository_of_so_many_bytes(tunes, tmp_path):
    mixed, method = config(tunes, "ties", {"a": {}, "c-delta": {}}), ImPartConfig()
    for size, named in (("1TB", 10**12), ("much", "'much'")):
        with pytest.raises(ValueError, match=naming("max_bytes", named)):
            merge(mixed, tmp_path / "no", compression=method, max_bytes=size)
    with pytest.raises(ValueError, match=naming("max_bytes", "delta repository")):
        merge(mixed, tmp_path / "no", max_bytes="60KB")
    assert not list(tmp_path.iterdir())
    report = merge(mixed, tmp_path / "delta", compression=method, max_bytes="200KB")
    assert report.compression is not None and 150_000 < report.compression.repository_bytes <= 200_000


def test_dtype_and_shards(tunes, tmp_path):
    merge(config(tunes, "ties", {"a": {}}, dtype="bfloat16"), tmp_path / "out", max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert {t.dtype for t in load_tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_the_card(tunes, tmp_path):
    merge(config(tunes, "ties", {"a": {"weight": 0.5}, "b": {}}), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "merge_method: ties" in card and "weight: 0.5" in card and str(tunes) not in card


def test_a_base_that_is_pruned(tmp_path):
    from support.pruned_models import pruned_config  # the widths of every layer differ

    base = make_model(pruned_config(), dtype=torch.float32)
    save_model(base, tmp_path / "base")
    for seed in (1, 2):
        save_model(fine_tune(base, seed), tmp_path / f"{seed}")
    merge(config(tmp_path, "impart_ties", {"1": {"density": 0.5}, "2": {"density": 0.5}}), tmp_path / "out")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "PrunedLlamaForCausalLM"


def test_configurations_in_python(tunes, tmp_path):
    models = tuple(MergeModel(str(tunes / name), {"weight": 0.5}) for name in "ab")
    same = MergeConfig("ties", str(tunes / "base"), models, {"density": 0.5})
    merge(same, tmp_path / "one")
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(same.to_dict()))
    merge(tmp_path / "merge.yaml", tmp_path / "two")
    one, two = load_tensors(tmp_path / "one"), load_tensors(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert MergeConfig.from_yaml(tmp_path / "merge.yaml").to_dict() == same.to_dict()


def test_density_has_no_effect_on_task_arithmetic(tunes, tmp_path):
    report = merge(config(tunes, "task_arithmetic", {"a": {"density": 0.5}}), tmp_path / "out")
    assert re.search(naming("density", "task_arithmetic"), report.notes[0])


def test_layers_are_counted_whatever_the_architecture_calls_them(tmp_path):
    """GPT-Neo's config.json has `num_layers`: a gradient reaches from the first layer to the last all the same."""
    shape = {"num_layers": 3, "attention_types": [[["global"], 3]], "hidden_size": 64, "num_heads": 4}
    base = make_model(GPTNeoConfig(**shape, vocab_size=300, max_position_embeddings=64), dtype=torch.float32)
    save_model(base, tmp_path / "base")
    save_model(fine_tune(base), tmp_path / "a")
    merge(config(tmp_path, "task_arithmetic", {"a": {"weight": [0, 1]}}), tmp_path / "out")
    (delta,), found = deltas_of(tmp_path, "a"), merged_deltas(tmp_path, tmp_path / "out")
    for layer, weight in enumerate((0, 0.5, 1)):
        name = f"transformer.h.{layer}.mlp.c_fc.weight"
        torch.testing.assert_close(found[name], weight * delta[name], rtol=0, atol=2e-6)


def test_a_model_of_several_stacks_with_its_settings_below(tmp_path):
    """Mistral 3's vision layers are a stack of their own, and its vocabulary is in `text_config`."""
    text = tiny_config("mistral", num_hidden_layers=3, vocab_size=320)
    # As wide as the vocabulary: the mlp's matrices are none of its embeddings
    text.intermediate_size = text.vocab_size
    vision = PixtralVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)).float()
    save_model(base, tmp_path / "base")
    save_model(fine_tune(base), tmp_path / "a")
    merge(config(tmp_path, "dare_linear", {"a": {"density": 0.5, "weight": [0, 1]}}), tmp_path / "out")
    (delta,), found = deltas_of(tmp_path, "a"), merged_deltas(tmp_path, tmp_path / "out")
    for name, tensor in found.items():
        layer = re.search(r"(vision_tower|language_model).*\.layers\.(\d)\.", name)
        last = {None: 1, "vision_tower": 1, "language_model": 2}[layer and layer[1]]
        weight = int(layer[2]) / last if layer else 0
        dropped = layer is not None and tensor.dim() == 2 and tensor.numel() >= 4096
        wanted = weight * delta[name] * ((tensor != 0) * 2 if dropped else 1)
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=4e-6, msg=lambda text, n=name: f"{n}: {text}")
        if dropped and weight:
            assert 0.4 < float((tensor != 0).double().mean()) < 0.6, name


def test_tensors_without_axes_or_entries(tunes, tmp_path):
    for name in ("base", "a"):
        shutil.copytree(tunes / name, tmp_path / name)
        more = {"model.scale": torch.tensor(1.0 + (name == "a")), "model.none": torch.empty(0, 4)}
        edit_tensors(tmp_path / name, lambda tensors, more=more: tensors.update(more))
    for method in ("ties", "impart_ties"):
        models = {"a": {"density": 0.5, "weight": 0.5}}
        merge(config(tmp_path, method, models, parameters={"normalize": False}), tmp_path / method)
        found = load_tensors(tmp_path / method)
        assert found["model.scale"] == 1.5 and found["model.none"].shape == (0, 4)


def test_the_card_of_a_delta_repository_says_what_was_merged(tunes, tmp_path):
    merge(
        config(tunes, "ties", {"a": {"weight": 0.5}, "b": {}}),
        tmp_path / "out",
        compression=ImPartConfig(compression_ratio=2),
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "merge_method: ties" in card and "weight: 0.5" in card


def test_the_card_shows_no_folder_in_any_spelling(tunes, tmp_path):
    edit_json(shutil.copytree(tunes / "base", tmp_path / "base") / "config.json", _name_or_path=str(tmp_path))
    content = config(tunes, "ties", {"a": {}}, base_model=str(tmp_path / "base" / ".." / "base"))
    content["models"].append({"model": str(tmp_path / "base") + "/"})
    merge({**content, "tokenizer_source": str(tunes / "a")}, tmp_path / "out")
    for name in ("README.md", "config.json"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()
        assert str(tunes) not in (tmp_path / "out" / name).read_text()


def test_what_mergekit_passes_over(tunes, tmp_path):
    models = {"base": {"density": 7, "weight": "x"}, "a": {"lambda": 3, "normalize": 1}}
    report = merge(
        config(tunes, "ties", models, parameters={"normalize": 1.0, "int8_mask": 0, "density": 0.5}), tmp_path / "out"
    )
    merge(config(tunes, "ties", {"a": {"density": 0.5}}), tmp_path / "plain")
    one, two = load_tensors(tmp_path / "out"), load_tensors(tmp_path / "plain")
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    assert re.search(naming("lambda", "normalize", tunes / "a"), report.notes[0])


def test_numbers_of_other_libraries(tunes, tmp_path):
    models = (
        MergeModel(str(tunes / "a"), {"weight": np.float32(0.5), "density": (np.float64(0.5), 1)}),
        str(tunes / "b"),
    )
    merge(MergeConfig("ties", str(tunes / "base"), models, {"lambda": torch.tensor(0.5)}), tmp_path / "out")
    assert "weight: 0.5" in (tmp_path / "out" / "README.md").read_text()


def test_tensors_in_another_dtype_than_most(tmp_path):
    """A router's bias in float32 is not rounded to the dtype that the others have anyway."""
    save_model(make_model(tiny_config("llama")), tmp_path / "base")
    save_model(fine_tune(make_model(tiny_config("llama"))), tmp_path / "a")
    for name, value in (("base", 1.0), ("a", 7.0633)):
        edit_tensors(tmp_path / name, lambda t, v=value: t.update({"model.norm.weight": torch.full((64,), v)}))
    for dtype, norm, others in (("bfloat16", torch.float32, torch.bfloat16), ("float16", torch.float16, torch.float16)):
        merge(config(tmp_path, "task_arithmetic", {"a": {}}, dtype=dtype), tmp_path / dtype)
        found = load_tensors(tmp_path / dtype)
        assert found["model.norm.weight"].dtype == norm and found[LINEAR].dtype == others
    assert torch.equal(load_tensors(tmp_path / "bfloat16")["model.norm.weight"], torch.full((64,), 7.0633))
