"""Configurations of pruned models: widths per layer, checked, and kept by every way of copying."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import naming
from support.pruned_models import FAMILIES, HEAD_DIM, KEPT_MHA, dense_config, logits, pruned_config
from transformers import AutoConfig, Qwen3Config

import impart_hf
from impart_hf import (
    PrunedLlamaConfig,
    PrunedLlamaForCausalLM,
    PrunedPhi3Config,
    PrunedQwen2Config,
    PrunedQwen3Config,
)
from impart_hf.modeling.configuration_pruned import PRUNED_CONFIGS
from impart_hf.pruning.decoder_shape import FAMILIES as SHAPES

pytestmark = pytest.mark.usefixtures("seeded")
WIDTHS = [(6, 3, 32), (1, 1, 7), (4, 4, 53), (8, 4, 64)]


def test_widths() -> None:
    config = pruned_config(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, dtype="bfloat16")
    assert config.widths == WIDTHS
    assert config.dtype == torch.bfloat16 and config.rope_parameters["rope_theta"] == 5000.0
    fields = config.to_dict()
    assert [fields[n] for n in ("num_attention_heads", "num_key_value_heads", "intermediate_size")] == [8, 4, 64]
    assert fields["head_dim"] == HEAD_DIM and fields["model_type"] == "pruned_llama"
    assert fields["per_layer_config"]["1"] == dict(
        num_attention_heads=1, num_key_value_heads=1, intermediate_size=7
    ) and set(fields["per_layer_config"]) == {"0", "1", "2"}
    with pytest.raises(RuntimeError, match=naming("num_attention_heads")):
        _ = config.num_attention_heads


def test_pruned_again_keeps_the_first_widths() -> None:
    config = pruned_config()
    config.pruning = {"base_model": "org/name", "steps": []}
    again = PrunedLlamaConfig.with_widths(
        config, num_attention_heads=[1, 1, 4, 8], num_key_value_heads=[1, 1, 4, 4], intermediate_size=[5, 7, 53, 64]
    )
    assert again.widths == [(1, 1, 5), (1, 1, 7), (4, 4, 53), (8, 4, 64)]
    assert again.pruning == config.pruning and again.to_dict()["intermediate_size"] == 64
    assert config.widths == WIDTHS, "the original stays"
    whole = PrunedLlamaConfig.with_widths(
        config, num_attention_heads=[8] * 4, num_key_value_heads=[4] * 4, intermediate_size=[64] * 4
    )
    assert whole.widths == [(8, 4, 64)] * 4
    assert logits(PrunedLlamaForCausalLM(whole)).shape == (2, 20, 320)


def test_config_survives_every_way_of_copying(tmp_path: Path) -> None:
    config = pruned_config(tie_word_embeddings=True)
    config.pruning = {"base_model": "org/name", "steps": [{"kind": "layers", "removed": [1]}]}
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config)) == copy.copy(config)
    assert config != pruned_config(KEPT_MHA)
    for twin in (
        PrunedLlamaConfig.from_dict(config.to_dict()),
        PrunedLlamaConfig(**config.to_diff_dict()),
        PrunedLlamaConfig(**json.loads(repr(config).split(maxsplit=1)[1])),
        AutoConfig.for_model(**config.to_dict()),
    ):
        assert twin.to_dict() == config.to_dict() and twin.widths == WIDTHS
    for _ in range(2):
        config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
        config = PrunedLlamaConfig.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pruning"] == config.pruning


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    config, dense = pruned_config(family=family), dense_config(family=family)
    assert config.model_type == f"pruned_{family}" and config.widths == WIDTHS
    assert [config.per_layer_config[2].num_attention_heads, config.per_layer_config[2].head_dim] == [4, HEAD_DIM]
    before = config.before_pruning
    assert before.widths == [(8, 4, 64)] * 4 and not before.is_heterogeneous and config.is_heterogeneous
    own = {"model_type", "per_layer_config", "architectures", "auto_map", "pruning", "head_dim"}
    same = {name: value for name, value in config.to_dict().items() if name not in own}
    assert same == {name: value for name, value in dense.to_dict().items() if name not in own}
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config) and loaded.to_diff_dict() == config.to_diff_dict()
    assert copy.copy(config) == config != before
    assert PRUNED_CONFIGS.keys() == {f"pruned_{name}" for name in SHAPES} and list(SHAPES) == list(FAMILIES)
    for name in (type(config).__name__, *config.model_classes()):
        assert name in impart_hf.__all__ and getattr(impart_hf, name)
    with pytest.raises(ValueError, match=naming("num_key_value_heads", "'4'")):
        type(config).from_dict({**config.to_dict(), "num_key_value_heads": "4"})


def test_head_dim_and_kv_heads_that_are_left_out() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": None}
    for config in (PrunedQwen2Config(**sizes), PrunedPhi3Config(**sizes)):
        assert (config.head_dim, config.num_key_value_heads) == (16, 4)
    assert PrunedQwen3Config(**sizes).head_dim == Qwen3Config().head_dim == 128


def test_a_dict_is_not_changed() -> None:
    fields = pruned_config(family="gemma3_text").to_dict()
    fields["rope_parameters"] = {"full_attention": {"rope_type": "default"}}
    before = copy.deepcopy(fields)
    PRUNED_CONFIGS["pruned_gemma3_text"].from_dict(fields)
    assert fields == before


HOSTILE: dict[str, tuple[dict[str, Any], Any]] = {
    "a layer beyond the last": ({"per_layer_config": {"4": {"intermediate_size": 3}}}, "layers 0 to 3"),
    "a negative layer": ({"per_layer_config": {"-1": {"intermediate_size": 3}}}, "layers 0 to 3"),
    "a layer that is a word": ({"per_layer_config": {"first": {"intermediate_size": 3}}}, "'first'"),
    "a very long number": ({"per_layer_config": {"9" * 5000: {}}}, "layers 0 to 3"),
    "a layer twice": ({"per_layer_config": {"1": {}, "01": {}}}, ("layer 1", "twice")),
    "a list of layers": ({"per_layer_config": [{"intermediate_size": 3}]}, "per_layer_config"),
    "widths as a list": ({"per_layer_config": {"1": [1, 1, 7]}}, "layer 1"),
    "no width": ({"per_layer_config": {"1": {"intermediate_size": None}}}, ("layer 1", "intermediate_size", "None")),
    "a width as text": (
        {"per_layer_config": {"1": {"intermediate_size": "7"}}}, ("layer 1", "intermediate_size", "'7'")
    ),
    "a fraction": ({"per_layer_config": {"1": {"num_attention_heads": 2.0}}}, ("layer 1", "num_attention_heads", 2.0)),
    "true": ({"per_layer_config": {"1": {"num_attention_heads": True}}}, ("layer 1", "num_attention_heads", "True")),
    "a negative width": (
        {"per_layer_config": {"1": {"num_key_value_heads": -1}}}, ("layer 1", "num_key_value_heads", -1)
    ),
    "no heads": ({"per_layer_config": {"1": {"num_attention_heads": 0}}}, ("layer 1", "num_attention_heads", 0)),
    "heads that KV heads do not divide": (
        {"per_layer_config": {"2": {"num_attention_heads": 6}}},
        ("layer 2", "num_attention_heads 6", "num_key_value_heads 4"),
    ),
    "another attribute": ({"per_layer_config": {"1": {"hidden_size": 32}}}, ("layer 1", "'hidden_size'")),
    "skipped parts": ({"per_layer_config": {"1": {"skip": ["mlp"]}}}, ("layer 1", "'skip'")),
    "layers of no number": ({"num_hidden_layers": "4"}, "num_hidden_layers"),
    "more layers than a loop can visit": ({"num_hidden_layers": 10**12}, ("num_hidden_layers", 10**12)),
    "no layers": ({"num_hidden_layers": 0}, ("num_hidden_layers", 0)),
    "global heads as text": ({"num_attention_heads": "8"}, "num_attention_heads"),
    "global heads as a fraction": ({"num_attention_heads": 8.5}, "num_attention_heads"),
    "no global heads, no head_dim": ({"num_attention_heads": 0, "head_dim": None}, ("head_dim", "hidden_size 64")),
    "head_dim that cannot be known": ({"num_attention_heads": 12, "head_dim": None}, ("head_dim", "hidden_size 64")),
    "a negative head_dim": ({"head_dim": -8}, ("head_dim", -8)),
    "an odd head_dim": ({"head_dim": 7}, ("head_dim 7", "odd")),
    "a negative hidden size": ({"hidden_size": -64}, ("hidden_size", -64)),
    "a history that is none": ({"pruning": ["layers"]}, "pruning"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_config(case: str, tmp_path: Path) -> None:
    changes, names = HOSTILE[case]
    fields = {**pruned_config().to_dict(), **changes}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError) as caught:
        AutoConfig.from_pretrained(tmp_path)
    message = str(caught.value)
    assert re.search(naming(names), message) and "\n" not in message and len(message) < 300


def test_absurd_sizes_are_no_concern_of_the_configuration() -> None:
    fields = {**pruned_config().to_dict(), "hidden_size": 10**15, "num_hidden_layers": 5000}
    fields["per_layer_config"] = {"4999": {"intermediate_size": 10**18}}
    assert PrunedLlamaConfig.from_dict(fields).widths[-1] == (8, 4, 10**18)


def test_wrong_widths_from_a_writer() -> None:
    counts = {"num_attention_heads": [2] * 4, "num_key_value_heads": [2] * 4, "intermediate_size": [8] * 4}
    for name, values, named in (
        ("num_attention_heads", [2] * 3, ("3 values", "4 layers")),
        ("num_key_value_heads", [2, 3, 2, 2], "layer 1"),
        ("intermediate_size", [8, 8, 0, 8], "layer 2"),
    ):
        with pytest.raises(ValueError, match=naming(name, named)):
            PrunedLlamaConfig.with_widths(dense_config(), **{**counts, name: values})
    config = pruned_config()
    config.per_layer_config = {1: {"num_attention_heads": 3}}
    with pytest.raises(Exception, match=naming("layer 1", "num_attention_heads 3")):
        config.validate()
