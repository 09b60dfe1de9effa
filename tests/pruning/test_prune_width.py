"""Width pruning: the result is the masked dense model, whatever its biases, groups and embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import naming
from support.pruned_models import FAMILIES, dense_config
from support.pruning_reports import made_up_importance
from support.tiny_models import VOCABULARY, edit_json, fine_tune, make_model, save_model, tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from impart_hf import PrunedLlamaForCausalLM
from impart_hf.pruning import Importance, prune_layers, prune_width
from impart_hf.pruning.correction import least_squares
from impart_hf.pruning.decoder_shape import DecoderShape

TEXT = [" ".join(f"{a} and {b} are {a + b}." for a in range(20) for b in range(10))]
KINDS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "wide-heads": {"head_dim": 32},
}
FAMILY_NAMES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "gemma2": "Gemma 2"}
FAMILY_NAMES |= {"gemma3_text": "Gemma 3", "phi3": "Phi-3"}


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))


def make_family(folder: Path, family: str) -> Path:
    """Four layers of eight heads, four KV heads and 64 channels, float32; biases and norms are random."""
    return save_model(fine_tune(make_model(dense_config(family=family), dtype=torch.float32)), folder)


def make_llama(folder: Path, kind: str = "gqa", **changes: object) -> Path:
    """Four layers of eight heads, four KV heads and 96 channels, float32; biases are random."""
    shape = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}
    model = make_model(tiny_config("llama", **{**shape, **KINDS[kind], **changes}), dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    return save_model(model, folder)


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("gqa") / "llama")


def masked_dense(model: Path, importance: Importance, pruned: Path, score: str) -> PreTrainedModel:
    """The whole model with zeros where nothing but the removed heads and channels is read; found without our code."""
    dense = AutoModelForCausalLM.from_pretrained(model)
    config = AutoModelForCausalLM.from_pretrained(pruned).config
    head_dim = dense.config.head_dim
    for number, layer in enumerate(dense.model.layers):
        before, width = dense.config.per_layer_config[number], config.per_layer_config[number]
        per_group = before.num_attention_heads // before.num_key_value_heads
        gone_groups = before.num_key_value_heads - width.num_key_value_heads
        with torch.no_grad():
            for group in importance.groups[score][number].argsort()[:gone_groups].tolist():
                start = group * per_group * head_dim
                layer.self_attn.o_proj.weight[:, start : start + per_group * head_dim] = 0
            kept_queries = width.num_attention_heads // width.num_key_value_heads
            if kept_queries < per_group:
                by_group = importance.heads[score][number].view(-1, per_group)
                for group, scores in enumerate(by_group):
                    for query in scores.argsort()[: per_group - kept_queries].tolist():
                        start = (group * per_group + query) * head_dim
                        layer.self_attn.o_proj.weight[:, start : start + head_dim] = 0
            gone = before.intermediate_size - width.intermediate_size
            layer.mlp.down_proj.weight[:, importance.channels[score][number].argsort()[:gone]] = 0
    return dense


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", ["igia", "gradient_norm"])
def test_the_pruned_model_equals_the_masked_dense_one(tmp_path: Path, kind: str, score: str) -> None:
    model = make_llama(tmp_path / "llama", kind)
    importance = made_up_importance(model)
    report = prune_width(str(model), tmp_path / "out", importance, ratio=0.35, score=score, progress=False)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(pruned) is PrunedLlamaForCausalLM
    assert sum(report.step["key_value_heads_removed"]) > 0 and sum(report.step["channels_removed"]) > 0
    torch.testing.assert_close(logits(pruned), logits(masked_dense(model, importance, tmp_path / "out", score)))
    assert pruned.num_parameters() == report.parameters_after
    assert report.parameters_before - report.parameters_after == report.step["removed_parameters"]
    assert report.step["removed_parameters"] == pytest.approx(0.35 * report.decoder_before, abs=3 * 64 + 2)


@pytest.mark.parametrize("family", list(FAMILIES)[1:])
def test_the_same_for_every_family(tmp_path: Path, family: str) -> None:
    """Widths, then layers, then widths again; and query heads."""
    model = make_family(tmp_path / "model", family)
    importance = made_up_importance(model)
    report = prune_width(str(model), tmp_path / "narrow", importance, ratio=0.35, progress=False)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
    assert pruned.config.model_type == f"pruned_{family}" and type(pruned).__name__.startswith("Pruned")
    assert sum(report.step["key_value_heads_removed"]) > 0 and sum(report.step["channels_removed"]) > 0
    torch.testing.assert_close(logits(pruned), logits(masked_dense(model, importance, tmp_path / "narrow", "igia")))
    assert pruned.num_parameters() == report.parameters_after
    assert FAMILY_NAMES[family] in (tmp_path / "narrow/README.md").read_text()

    prune_layers(str(tmp_path / "narrow"), tmp_path / "fewer", layers=[1], merge=False, progress=False)
    fewer = AutoModelForCausalLM.from_pretrained(tmp_path / "fewer")
    assert fewer.config.widths == [w for n, w in enumerate(pruned.config.widths) if n != 1]
    if hasattr(pruned.config, "layer_types"):
        assert fewer.config.layer_types == [t for n, t in enumerate(pruned.config.layer_types) if n != 1]
    pruned.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    with torch.no_grad():
        expected = pruned(tokens(), use_cache=False).logits
        assert torch.equal(fewer(tokens(), use_cache=False).logits, expected)

    again = made_up_importance(tmp_path / "fewer", seed=1)
    prune_width(str(tmp_path / "fewer"), tmp_path / "out", again, ratio=0.1, query_heads=True, progress=False)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    masked = masked_dense(tmp_path / "fewer", again, tmp_path / "out", "igia")
    torch.testing.assert_close(logits(narrow), logits(masked))
    assert [step["kind"] for step in narrow.config.pruning["steps"]] == ["width", "layers", "width"]


def test_removing_what_is_zero_changes_no_logit(tmp_path: Path) -> None:
    """Group 1 and channels 3 to 40 of every layer are zero, and have the lowest scores."""
    dense = make_model(tiny_config("llama", num_attention_heads=8, num_key_value_heads=4), dtype=torch.float32)
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.self_attn.q_proj.weight[16:32] = 0
            layer.self_attn.k_proj.weight[8:16] = 0
            layer.self_attn.v_proj.weight[8:16] = 0
            layer.self_attn.o_proj.weight[:, 16:32] = 0
            layer.mlp.gate_proj.weight[3:41] = 0
            layer.mlp.up_proj.weight[3:41] = 0
            layer.mlp.down_proj.weight[:, 3:41] = 0
    model = save_model(dense, tmp_path / "llama")
    groups, channels = torch.ones(4), torch.ones(128)
    groups[1], channels[3:41] = 0, 0
    importance = made_up_importance(
        model,
        groups=dict.fromkeys(("igia", "gradient_norm"), [groups] * 2),
        channels=dict.fromkeys(("igia", "gradient_norm"), [channels] * 2),
    )
    for out, parts, removed in [("a", ("attention",), 2 * 48 * 64), ("b", ("mlp",), 2 * 38 * 3 * 64)]:
        ratio = removed / DecoderShape.of(json.loads((model / "config.json").read_text())).decoder_parameters
        report = prune_width(
            str(model), tmp_path / out, importance, ratio=ratio, parts=parts, exponent=0.0, progress=False
        )
        assert report.step["removed_parameters"] == removed
        pruned = AutoModelForCausalLM.from_pretrained(tmp_path / out)
        torch.testing.assert_close(logits(pruned), logits(dense), rtol=1e-5, atol=1e-5)


def test_query_heads_of_every_group(gqa: Path, tmp_path: Path) -> None:
    importance = made_up_importance(gqa)
    report = prune_width(
        str(gqa), tmp_path / "out", importance, ratio=0.08, parts=("attention",), query_heads=True, progress=False
    )
    assert set(report.step["key_value_heads_removed"]) == {0} and set(report.step["heads_removed"]) == {0, 4}
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(pruned), logits(masked_dense(gqa, importance, tmp_path / "out", "igia")))


def test_multiple_of(gqa: Path, tmp_path: Path) -> None:
    prune_width(str(gqa), tmp_path / "out", made_up_importance(gqa), ratio=0.3, multiple_of=16, progress=False)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    sizes = [layer.intermediate_size for layer in config.per_layer_config]
    assert all(size % 16 == 0 for size in sizes) and len(set(sizes)) > 1


def test_dtype_shards_card_and_reader_files(tmp_path: Path) -> None:
    whole = make_model(tiny_config("llama", num_hidden_layers=3), dtype=torch.bfloat16)
    model = save_model(whole, tmp_path / "llama")
    (model / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    prune_width(
        str(model), tmp_path / "out", made_up_importance(model), ratio=0.3, max_shard_size="50KB", progress=False
    )
    assert (tmp_path / "out/model.safetensors.index.json").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert (tmp_path / "out/modeling_pruned.py").exists()
    card = (tmp_path / "out/README.md").read_text()
    assert "license: mit" in card and "| layer |" in card


def test_a_checkpoint_whose_reader_has_its_former_names(gqa: Path, tmp_path: Path) -> None:
    """It was written when LLaMA alone could be pruned; the result has the present files, and names them."""
    narrow = tmp_path / "narrow"
    prune_width(str(gqa), narrow, made_up_importance(gqa), ratio=0.2, progress=False)
    present = {path.name for path in narrow.glob("*.py")}
    for name in present:
        (narrow / name).rename(narrow / name.replace("pruned", "pruned_llama"))
    config = json.loads((narrow / "config.json").read_text())
    auto_map = {auto: name.replace("pruned.", "pruned_llama.") for auto, name in config["auto_map"].items()}
    edit_json(narrow / "config.json", auto_map=auto_map)
    loaded = AutoModelForCausalLM.from_pretrained(narrow)
    assert loaded.config.auto_map == auto_map
    loaded.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["auto_map"] == config["auto_map"]
    prune_layers(str(narrow), tmp_path / "out", layers=[1], merge=False, progress=False)
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == present
    assert json.loads((tmp_path / "out/config.json").read_text())["auto_map"] == config["auto_map"]


def test_code_of_others_under_one_of_our_names(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "llama")
    (model / "modeling_pruned.py").write_text("X = 1\n")
    edit_json(model / "config.json", auto_map={"AutoModel": "modeling_pruned.X"})
    prune_layers(str(model), tmp_path / "out", layers=[1], merge=False, progress=False)
    assert (tmp_path / "out/modeling_pruned.py").read_text() == "X = 1\n"


def test_both_ways_one_after_the_other(gqa: Path, tmp_path: Path) -> None:
    """Layers, then widths, then layers without merging, then widths again."""
    prune_layers(str(gqa), tmp_path / "1", layers=[1], merge=False, progress=False)
    prune_width(str(tmp_path / "1"), tmp_path / "2", made_up_importance(tmp_path / "1"), ratio=0.2, progress=False)
    prune_layers(str(tmp_path / "2"), tmp_path / "3", layers=[1], merge=False, progress=False)
    importance = made_up_importance(tmp_path / "3")
    report = prune_width(str(tmp_path / "3"), tmp_path / "4", importance, ratio=0.2, progress=False)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "4")
    assert [step["kind"] for step in pruned.config.pruning["steps"]] == ["layers", "width", "layers", "width"]
    assert pruned.num_parameters() == report.parameters_after and len(pruned.model.layers) == 2
    assert torch.isfinite(logits(pruned)).all()


def test_layers_of_other_widths_are_not_merged(gqa: Path, tmp_path: Path) -> None:
    prune_width(str(gqa), tmp_path / "narrow", made_up_importance(gqa), ratio=0.3, progress=False)
    importance = made_up_importance(tmp_path / "narrow")
    with pytest.raises(ValueError, match=naming("layer", "widths")):
        prune_layers(str(tmp_path / "narrow"), tmp_path / "out", importance, layers=[1, 2], progress=False)


def test_least_squares_is_the_minimum() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    weight = torch.randn(10, 24, generator=generator)
    stay = torch.tensor([0, 1, 4, 5, 6, 9, 10, 13, 17, 20, 21, 23])
    moment = inputs.T @ inputs / len(inputs)
    found = least_squares(weight, moment, stay).double()

    def loss(candidate: torch.Tensor) -> torch.Tensor:
        damping = 0.01 * moment.double().diagonal().mean()
        outputs = inputs.double() @ weight.double().T - inputs.double()[:, stay] @ candidate.T
        return outputs.square().sum() / len(inputs) + damping * (candidate - weight.double()[:, stay]).square().sum()

    candidate = found.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(candidate), candidate)
    scale = torch.autograd.grad(loss(c := weight.double()[:, stay].clone().requires_grad_()), c)[0].norm()
    assert gradient.norm() < 1e-4 * scale
    assert loss(found) < 0.7 * loss(weight.double()[:, stay])


@pytest.mark.parametrize("family", FAMILIES)
def test_correction_brings_the_outputs_nearer(family: str, tmp_path: Path) -> None:
    whole = make_family(tmp_path / "model", family)
    importance = made_up_importance(whole)
    for name, text in [("plain", None), ("corrected", TEXT)]:
        report = prune_width(
            str(whole), tmp_path / name, importance, ratio=0.35, calibration=text, calibration_length=64, progress=False
        )
        assert report.step["corrected"] == (text is not None)
    dense, plain, corrected = (
        AutoModelForCausalLM.from_pretrained(p) for p in (whole, tmp_path / "plain", tmp_path / "corrected")
    )
    assert plain.config.widths == corrected.config.widths
    for name, parameter in corrected.named_parameters():
        changed = not torch.equal(parameter, plain.get_parameter(name))
        assert changed == name.endswith(("o_proj.weight", "down_proj.weight")), name
    from support.tiny_models import tiny_tokenizer

    from impart_hf.calibration.text import calibration_tokens

    rows = calibration_tokens(TEXT, tiny_tokenizer(), samples=16, length=64)
    with torch.no_grad():
        hidden = [m(rows, output_hidden_states=True).hidden_states[-1] for m in (dense, plain, corrected)]
    assert (hidden[2] - hidden[0]).norm() < 0.9 * (hidden[1] - hidden[0]).norm()


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"ratio": 0.99}, ("ratio", 0.99)),
        ({"ratio": 0.0}, ("ratio", 0)),
        ({"ratio": 1e-6}, ("ratio", 1e-6)),
        ({"ratio": 0.3, "parts": ()}, ("parts", "'none'")),
        ({"ratio": 0.3, "parts": ("heads",)}, ("parts", "'heads'")),
        ({"ratio": 0.3, "multiple_of": 0}, ("multiple_of", 0)),
        ({"ratio": 0.3, "exponent": -1.0}, ("exponent", -1)),
        ({"ratio": 0.3, "exponent": float("nan")}, ("exponent", "nan")),
        ({"ratio": 0.3, "exponent": float("inf")}, ("exponent", "inf")),
        ({"ratio": 0.3, "score": "size"}, ("score", "'size'", "igia")),
        ({"ratio": 0.3, "calibration": ["  "]}, ("list", "no text")),
        ({"ratio": 0.3, "max_shard_size": "0"}, "max_shard_size"),
        ({"ratio": 0.6, "multiple_of": 96}, ("ratio", 0.6, 96)),
    ],
)
def test_bad_settings(gqa: Path, tmp_path: Path, settings: dict, names: Any) -> None:
    with pytest.raises(ValueError, match=naming(names)):
        prune_width(str(gqa), tmp_path / "out", made_up_importance(gqa), progress=False, **settings)
    assert not list(tmp_path.iterdir())


def test_query_heads_without_groups(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "llama", "mha", num_attention_heads=4)
    with pytest.raises(ValueError, match=naming("query head")):
        prune_width(str(model), tmp_path / "out", made_up_importance(model), ratio=0.1, query_heads=True)


def test_scores_that_are_no_numbers_or_nothing(gqa: Path) -> None:
    with pytest.raises(ValueError, match=naming("score", "zero")):
        made_up_importance(gqa, layers=[0.0, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=naming("score", "finite")):
        made_up_importance(gqa, layers=[1.0, float("nan"), 1.0, 1.0])
