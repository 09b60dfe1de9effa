"""Models that their causal language model class reads only in part, or that have no such class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.loaded_models import load
from support.messages import naming
from support.refusals import refuses, run
from support.tiny_models import Pair, edit_json, edit_tensors, fine_tune, load_tensors, save_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from impart_hf import LowRankConfig
from impart_hf.compression.compatibility import IncompatibleModelsError
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.open import open_repository
from impart_hf.repository.reconstruct import reconstruct

TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {name: TEXT[name] for name in list(TEXT)[:5]}
TWO_STACKS = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
IMAGES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
}
MLLAMA = {
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    },
    "text_config": {
        **TEXT,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}
QWEN = {
    "text_config": {**TEXT, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32},
}
# The class, its configuration, the class that would load it, and a tensor that this does not read.
PARTS: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    "sound": ("WhisperForConditionalGeneration", "WhisperConfig", TWO_STACKS, "WhisperForCausalLM", "encoder"),
    "an encoder": ("PegasusForConditionalGeneration", "PegasusConfig", TWO_STACKS, "PegasusForCausalLM", "encoder"),
    "a second objective": ("BertForPreTraining", "BertConfig", BERT, "BertLMHeadModel", "pooler"),
    "a second head": (
        "GPT2DoubleHeadsModel", "GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 100},
        "GPT2LMHeadModel", "multiple_choice_head",
    ),
    "another head": ("LlamaForTokenClassification", "LlamaConfig", TEXT, "LlamaForCausalLM", "score"),
}  # fmt: skip
# That a class reads as a whole which is no causal language model's.
IMAGES_AND_TEXT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mllama": ("MllamaForConditionalGeneration", "MllamaConfig", MLLAMA),
    "qwen3.5": ("Qwen3_5ForConditionalGeneration", "Qwen3_5Config", QWEN),
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig", {"text_config": TEXT, "vision_config": IMAGES}),
}
NO_CLASS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "num_layers": 1, "d_ff": 64, "num_heads": 4, "d_kv": 8, "vocab_size": 100},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGES),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 100, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64},
    ),
}


def make(name: str, config_name: str, fields: dict[str, Any]) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name)(getattr(transformers, config_name)(**fields)).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    return model.eval()


def saved_pair(base: PreTrainedModel, folder: Path) -> Pair:
    return Pair(save_model(base, folder / "base"), save_model(fine_tune(base), folder / "tuned"))


@pytest.mark.parametrize("part", PARTS)
def test_a_class_that_reads_only_a_part(tmp_path: Path, part: str) -> None:
    name, config, fields, loading, lost = PARTS[part]
    pair = saved_pair(make(name, config, fields), tmp_path)
    message = refuses(pair, IncompatibleModelsError, naming(pair.finetuned, name, loading))
    assert lost in message and "upgrade" not in message
    # What the files lack would be random.
    assert ("save them" in message) == (part not in ("another head", "an encoder"))


@pytest.mark.parametrize("kind", IMAGES_AND_TEXT)
def test_models_for_images_are_whole(tmp_path: Path, kind: str) -> None:
    pair = saved_pair(make(*IMAGES_AND_TEXT[kind]), tmp_path)
    run(pair, tmp_path / "delta", LowRankConfig(compression_ratio=2))
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        model, info = auto_class.from_pretrained(tmp_path / "delta", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert type(model).__name__ == IMAGES_AND_TEXT[kind][0]
    card = (tmp_path / "delta" / "README.md").read_text("utf-8")
    assert "AutoModelForImageTextToText.from_pretrained" in card and "pipeline_tag: image-text-to-text" in card
    auto_map = json.loads((tmp_path / "delta" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageTextToText"] == auto_map["AutoModelForCausalLM"]
    base, tuned = (load_tensors(folder) for folder in (pair.base, pair.finetuned))
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert any("vision" in name or "visual" in name for name in changed), "images' part is fine-tuned here too"


@pytest.mark.parametrize("part", ["sound", "a second head"])
def test_the_part_alone(tmp_path: Path, part: str) -> None:
    """Saved by the class that the message names."""
    name, config, fields, loading, _ = PARTS[part]
    pair = saved_pair(make(name, config, fields), tmp_path)
    assert "save them" in refuses(pair, IncompatibleModelsError, naming(loading))
    for folder in (pair.base, pair.finetuned):
        load(folder).save_pretrained(folder)
    run(pair, tmp_path / "delta", LowRankConfig(compression_ratio=2))
    assert type(load(tmp_path / "delta")).__name__ == loading


@pytest.mark.parametrize("kind", NO_CLASS)
def test_a_type_without_a_language_model(tmp_path: Path, kind: str) -> None:
    pair = saved_pair(make(*NO_CLASS[kind]), tmp_path)
    message = refuses(pair, IncompatibleModelsError, naming(pair.finetuned, f"'{kind}'"))
    assert "upgrade" not in message


def test_a_class_with_the_same_parameters(tmp_path: Path) -> None:
    """And buffers and a tied matrix that it stores besides."""
    pair = saved_pair(make("BertForMaskedLM", "BertConfig", BERT), tmp_path)
    for folder in (pair.base, pair.finetuned):
        edit_tensors(folder, lambda t: t.update({
            "bert.embeddings.position_ids": torch.arange(512),
            "cls.predictions.decoder.weight": t["bert.embeddings.word_embeddings.weight"].clone(),
            "bert.encoder.layer.0.attention.self.masked_bias": torch.tensor(-1e4),
        }))  # fmt: skip
    run(pair, tmp_path / "delta", LowRankConfig(compression_ratio=2))
    _, info = load(tmp_path / "delta", output_loading_info=True)
    assert not info["missing_keys"]


def test_a_configuration_of_which_the_class_takes_a_part(tmp_path: Path) -> None:
    """Text models with config.json of the type that also has images, as transformers' Auto classes load them."""
    whole = transformers.Qwen3_5Config(**QWEN)
    base = make("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", whole.text_config.to_dict())
    pair = saved_pair(base, tmp_path)
    for folder in (pair.base, pair.finetuned):
        whole.save_pretrained(folder)
        edit_json(folder / "config.json", architectures=["Qwen3_5ForConditionalGeneration"], dtype="bfloat16")
    run(pair, tmp_path / "delta", LowRankConfig(compression_ratio=2))
    wanted, loaded = load(pair.finetuned), load(tmp_path / "delta")
    assert json.loads((tmp_path / "delta" / "config.json").read_text())["text_config"]["architectures"] == [
        "Qwen3_5ForCausalLM"
    ]
    assert isinstance(loaded, type(wanted)) and type(loaded.config) is type(wanted.config)
    states = wanted.state_dict(), loaded.state_dict()
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    loaded.save_pretrained(tmp_path / "again")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("delta", "again")]
    assert configs[0] == configs[1]
    loaded.config.use_cache = False
    loaded.save_pretrained(tmp_path / "changed")
    assert load(tmp_path / "changed").config.use_cache is False
    reconstruct(open_repository(str(tmp_path / "delta"), HubOptions()), tmp_path / "dense")
    assert load_tensors(tmp_path / "dense").keys() == load_tensors(pair.finetuned).keys()
    assert all(torch.equal(load(tmp_path / "dense").state_dict()[n], states[1][n]) for n in states[1])
