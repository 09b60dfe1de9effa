"""Layer pruning: what goes, what is merged, and that the rest is as it was."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import naming
from support.pruned_models import dense_config
from support.pruning_reports import made_up_importance
from support.tiny_models import VOCABULARY, edit_json, load_tensors, make_model, save_model, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.pruning import prune_layers
from impart_hf.pruning.decoder_shape import FAMILIES, DecoderShape
from impart_hf.pruning.layers import merge_targets

LAYERS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers, float32; not to be written to."""
    config = tiny_config("llama", num_hidden_layers=LAYERS)
    return save_model(make_model(config, dtype=torch.float32), tmp_path_factory.mktemp("model") / "llama")


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(0))


def skipping(model: Path, layers: list[int]) -> PreTrainedModel:
    """The whole model, with layers that hand on what they are given."""
    whole = AutoModelForCausalLM.from_pretrained(model)
    for number in layers:
        whole.model.layers[number].forward = lambda hidden_states, **_: hidden_states
    return whole


def test_a_dropped_layer_equals_one_that_is_skipped(model: Path, tmp_path: Path) -> None:
    prune_layers(str(model), tmp_path / "out", layers=[2, 3], merge=False, progress=False)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = skipping(model, [2, 3])(tokens(), use_cache=False).logits
        assert torch.equal(pruned(tokens(), use_cache=False).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_keep_their_kind_of_attention(family: str, tmp_path: Path) -> None:
    """Sliding or full, also where config.json says it by a rule that the layers' numbers follow."""
    config = dense_config(family=family)
    model = save_model(make_model(config, dtype=torch.float32), tmp_path / "model")
    by_rule = {"layer_types": None, "sliding_window_pattern": 2} if family == "gemma3_text" else {"layer_types": None}
    edit_json(model / "config.json", **by_rule)
    before = AutoConfig.from_pretrained(model)
    for number, layers in enumerate(([1], [0, 2])):
        out = tmp_path / f"out-{number}"
        prune_layers(str(model), out, layers=layers, merge=False, protect=False, progress=False)
        pruned = AutoModelForCausalLM.from_pretrained(out)
        assert type(pruned.config) is type(config) and len(pruned.model.layers) == 4 - len(layers)
        if (layer_types := getattr(before, "layer_types", None)) is not None:
            assert pruned.config.layer_types == [t for n, t in enumerate(layer_types) if n not in layers]
        with torch.no_grad():
            expected = skipping(model, layers)(tokens(), use_cache=False).logits
            assert torch.equal(pruned(tokens(), use_cache=False).logits, expected)
        assert pruned.generate(tokens(), max_new_tokens=9, do_sample=False).shape == (2, 26)
    if family == "qwen2":
        assert (before.max_window_layers, pruned.config.max_window_layers) == (2, 1)


def test_a_list_by_layer_that_is_not_known(tmp_path: Path) -> None:
    model = save_model(make_model(dense_config()), tmp_path / "model")
    edit_json(model / "config.json", eos_token_id=[2, 5, 6, 7], scale_of_layer=[1.0, 1.0, 1.0, 0.5])
    with pytest.raises(ValueError, match=naming(model, "scale_of_layer", 4)):
        prune_layers(str(model), tmp_path / "out", layers=[1], merge=False, progress=False)
    assert not (tmp_path / "out").exists()
    edit_json(model / "config.json", scale_of_layer=None)
    prune_layers(str(model), tmp_path / "out", layers=[1], merge=False, progress=False)


def test_a_model_of_both_directions(tmp_path: Path) -> None:
    model = save_model(make_model(dense_config(family="gemma3_text")), tmp_path / "model")
    edit_json(model / "config.json", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match=naming(model, "use_bidirectional_attention")):
        prune_layers(str(model), tmp_path / "out", layers=[1], merge=False, progress=False)


def test_the_result_is_a_plain_llama_with_its_tokenizer(model: Path, tmp_path: Path) -> None:
    report = prune_layers(str(model), tmp_path / "out", made_up_importance(model), drop=2, progress=False)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config and not list((tmp_path / "out").glob("*.py"))
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(pruned) is LlamaForCausalLM
    assert pruned.num_parameters() == report.parameters_after == DecoderShape.of(config).parameters
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert config["pruning"]["base_model"] == "llama"
    assert config["pruning"]["base_parameters"] == report.parameters_before
    removed = ", ".join(map(str, report.step["removed"]))
    assert re.search(naming(f"layers {removed}"), (tmp_path / "out/README.md").read_text())


@pytest.mark.parametrize("score", ["igia", "gradient_norm"])
def test_the_lowest_scores_go_and_the_ends_stay(model: Path, tmp_path: Path, score: str) -> None:
    layers = {s: torch.rand(LAYERS).double() + 1 for s in ("igia", "gradient_norm")}
    layers[score] = torch.tensor([0.0, 5.0, 1.0, 4.0, 2.0, 0.5]).double()
    importance = made_up_importance(model, layers=layers)
    protected = prune_layers(str(model), tmp_path / "a", importance, drop=2, score=score, progress=False)
    assert protected.step["removed"] == [2, 4]
    free = prune_layers(str(model), tmp_path / "b", importance, drop=2, score=score, protect=False, progress=False)
    assert free.step["removed"] == [0, 5]
    assert free.step["merged_into"] == {"5": 4}
    assert re.search(naming("layer 0"), free.notes[0])


@pytest.mark.parametrize(("ratio", "count"), [(0.12, 1), (0.33, 2), (0.4, 2), (0.45, 3), (0.7, 4)])
def test_a_ratio_is_met_as_nearly_as_layers_come(model: Path, tmp_path: Path, ratio: float, count: int) -> None:
    report = prune_layers(str(model), tmp_path / "out", made_up_importance(model), ratio=ratio, progress=False)
    assert len(report.step["removed"]) == count
    assert report.decoder_after == report.decoder_before * (LAYERS - count) // LAYERS


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_merging_adds_masked_entries_of_the_same_sign(family: str, tmp_path: Path) -> None:
    """Into the nearest kept layer before, whatever the windows of its attention are."""
    changes = {"layer_types": ["full_attention", "sliding_attention"] * 3} if family == "gemma3_text" else {}
    config = dense_config(family=family, num_hidden_layers=LAYERS, **changes)
    model = save_model(make_model(config, dtype=torch.float32), tmp_path / "model")
    importance = made_up_importance(model)
    linears = importance.shape.linear_names
    prune_layers(str(model), tmp_path / "out", importance, layers=[2, 3, 4], progress=False)
    before, after = load_tensors(model), load_tensors(tmp_path / "out")
    for linear in linears:
        expected = before[f"model.layers.1.{linear}.weight"].double().clone()
        kept = expected.clone()
        for source in (2, 3, 4):
            dropped = before[f"model.layers.{source}.{linear}.weight"].double()
            mask = importance.mask(source, linear)
            for row, column in mask.nonzero().tolist():
                if dropped[row, column] * kept[row, column] > 0:
                    expected[row, column] += dropped[row, column]
        assert not torch.equal(expected, kept)
        torch.testing.assert_close(after[f"model.layers.1.{linear}.weight"].double(), expected, rtol=1e-6, atol=0)
    names = {0: 0, 2: 5}  # what follows is renumbered and unchanged
    for new, old in names.items():
        for linear in linears:
            assert torch.equal(
                after[f"model.layers.{new}.{linear}.weight"], before[f"model.layers.{old}.{linear}.weight"]
            )
    for norm in ("input_layernorm", "post_attention_layernorm"):
        assert torch.equal(after[f"model.layers.1.{norm}.weight"], before[f"model.layers.1.{norm}.weight"])


@pytest.mark.parametrize("kind", ["bfloat16", "sharded", "tied", "biases"])
def test_other_checkpoints(tmp_path: Path, kind: str) -> None:
    changes = {"tied": {"tie_word_embeddings": True}, "biases": {"attention_bias": True, "mlp_bias": True}}
    config = tiny_config("llama", num_hidden_layers=4, **changes.get(kind, {}))
    whole = make_model(config, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    for name, parameter in whole.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model = save_model(whole, tmp_path / "model", **({"max_shard_size": "100KB"} if kind == "sharded" else {}))
    size = "100KB" if kind == "sharded" else "5GB"
    prune_layers(str(model), tmp_path / "out", layers=[1], merge=False, max_shard_size=size, progress=False)
    assert (tmp_path / "out/model.safetensors.index.json").exists() == (kind == "sharded")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.dtype == whole.dtype
    with torch.no_grad():
        assert torch.equal(pruned(tokens()).logits, skipping(model, [1])(tokens()).logits)


def test_a_pruned_model_can_lose_layers_again(model: Path, tmp_path: Path) -> None:
    prune_layers(str(model), tmp_path / "once", layers=[1], merge=False, progress=False)
    prune_layers(str(tmp_path / "once"), tmp_path / "twice", layers=[3], merge=False, progress=False)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    with torch.no_grad():
        assert torch.equal(pruned(tokens()).logits, skipping(model, [1, 4])(tokens()).logits)
    history = pruned.config.pruning
    assert history["base_model"] == "llama" and [step["removed"] for step in history["steps"]] == [[1], [3]]


def test_merge_targets() -> None:
    assert merge_targets([0, 1, 4, 5, 7], [2, 3, 6]) == {4: 3, 5: 3, 7: 6}


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({}, ("drop", "ratio", "layers")),
        ({"drop": 1, "ratio": 0.5}, ("drop", "ratio", "layers")),
        ({"drop": 0}, ("0 layers", "1 to 4")),
        ({"drop": 5}, ("5 layers", "1 to 4", "protected")),
        ({"drop": 6, "protect": False}, ("6 layers", "1 to 5")),
        ({"ratio": 0.0}, ("ratio", 0, 1)),
        ({"ratio": float("nan")}, ("ratio", "nan")),
        ({"ratio": 0.05}, ("ratio", 0.05)),
        ({"ratio": 0.9}, ("ratio", 0.9, "4 layers")),
        ({"layers": []}, "layers"),
        ({"layers": [6]}, "layer 6"),
        ({"layers": [-1]}, "layer -1"),
        ({"layers": [0]}, ("layer 0", "protected")),
        ({"layers": [0, 1, 2, 3, 4, 5], "protect": False}, "layers"),
        ({"drop": 1, "score": "size"}, ("score", "'size'", "igia")),
        ({"drop": 1, "max_shard_size": "many"}, "max_shard_size"),
    ],
)
def test_bad_choices(model: Path, tmp_path: Path, choice: dict, names: Any) -> None:
    with pytest.raises(ValueError, match=naming(names)):
        prune_layers(str(model), tmp_path / "out", made_up_importance(model), progress=False, **choice)
    assert not list(tmp_path.iterdir())


def test_scores_and_merging_need_a_report(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=naming("importance report", "impart-hf prune importance")):
        prune_layers(str(model), tmp_path / "out", drop=1, merge=False, progress=False)
    with pytest.raises(ValueError, match=naming("importance report", "impart-hf prune importance")):
        prune_layers(str(model), tmp_path / "out", layers=[1], progress=False)
    without_masks = made_up_importance(model, masks=None)
    with pytest.raises(ValueError, match=naming("importance report", "masks")):
        prune_layers(str(model), tmp_path / "out", without_masks, layers=[1], progress=False)
    prune_layers(str(model), tmp_path / "out", without_masks, drop=1, merge=False, progress=False)


def test_the_report_of_another_model(model: Path, tmp_path: Path) -> None:
    other = save_model(make_model(tiny_config("llama", num_hidden_layers=LAYERS), seed=5), tmp_path / "other")
    with pytest.raises(ValueError, match=naming("importance report", "fingerprint", other)):
        prune_layers(str(other), tmp_path / "out", made_up_importance(model), drop=1, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["gemma", "gpt-neox", "mixtral", "mamba", "gemma3-vision"])
def test_models_of_other_families(tmp_path: Path, kind: str) -> None:
    other = save_model(make_model(tiny_config(kind)), tmp_path / "other")
    model_type = tiny_config(kind).model_type
    with pytest.raises(ValueError, match=naming(other, f"'{model_type}'", *FAMILIES)):
        prune_layers(str(other), tmp_path / "out", layers=[1], merge=False, protect=False, progress=False)


def test_an_output_that_is_taken(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(OSError, match=naming(tmp_path / "out")):
        prune_layers(str(model), tmp_path / "out", layers=[1], merge=False, progress=False)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_failure_while_writing_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Checkpoint, name: str) -> torch.Tensor:
        raise OSError("the disk is gone")

    importance = made_up_importance(model)
    monkeypatch.setattr(Checkpoint, "tensor", fails)
    monkeypatch.setattr("impart_hf.pruning.importance_report.weights_fingerprint", lambda _: importance.fingerprint)
    with pytest.raises(OSError, match="the disk is gone"):
        prune_layers(str(model), tmp_path / "out", importance, drop=1, progress=False)
    assert not list(tmp_path.iterdir())
