"""Deltas of sequence classifiers, which reward models are."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from support.loaded_models import IDS, captured_log, decode_all, load
from support.messages import naming
from support.refusals import refuses, run
from support.tiny_models import Pair, edit_json, fine_tune, load_tensors, make_model, save_model, tiny_config
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from impart_hf import DeltaCompressedForSequenceClassification, LowRankConfig
from impart_hf.compression.compatibility import IncompatibleModelsError
from impart_hf.lora.export import export_lora
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.open import open_repository
from impart_hf.repository.reconstruct import reconstruct
from impart_hf.repository.verify import verify

KINDS = ["llama", "llama-tied", "gpt2", "gpt-neox", "bloom", "mixtral"]


def classifier(kind: str, labels: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config(kind, num_labels=labels, pad_token_id=3)
        model = AutoModelForSequenceClassification.from_config(config).to(torch.bfloat16).eval()
    model.config.dtype = torch.bfloat16
    return model


def load_classifier(folder: Path, **kwargs: object) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder, **kwargs)


def scores(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.fixture
def reward(tmp_path: Path) -> Pair:
    """A reward model on the language model that it was trained from."""
    base = make_model(tiny_config("llama"))
    tuned = classifier("llama", 1)
    tuned.model.load_state_dict(fine_tune(base).model.state_dict())
    return Pair(save_model(base, tmp_path / "base"), save_model(tuned, tmp_path / "tuned"))


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("of", ["language model", "classifier"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_loads_is_the_classifier(tmp_path: Path, kind: str, of: str, labels: int) -> None:
    before = classifier(kind, labels)
    base = before
    if of == "language model":
        base = make_model(tiny_config(kind))
        base.base_model.load_state_dict(before.base_model.state_dict())
    tuned = fine_tune(before)
    pair = Pair(save_model(base, tmp_path / "base"), save_model(tuned, tmp_path / "tuned"))
    run(pair, tmp_path / "delta", LowRankConfig(compression_ratio=3))
    verify(open_repository(str(tmp_path / "delta"), HubOptions()))
    loaded, info = load_classifier(tmp_path / "delta", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert isinstance(loaded, type(tuned)) and isinstance(loaded, DeltaCompressedForSequenceClassification)
    assert loaded.config.num_labels == labels
    if of == "language model":
        assert torch.equal(loaded.score.weight, tuned.score.weight), "the head is stored as it is"
        assert "lm_head.weight" not in decode_all(tmp_path / "delta")
    if kind != "mixtral":  # a router near a tie may send a token elsewhere
        assert (scores(loaded) - scores(tuned)).norm() < 0.3 * (scores(before) - scores(tuned)).norm()
    reconstruct(open_repository(str(tmp_path / "delta"), HubOptions()), tmp_path / "dense")
    states = load_classifier(tmp_path / "dense").state_dict(), loaded.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_it_is_saved_copied_and_merged_as_any_delta(reward: Pair, tmp_path: Path) -> None:
    run(reward, tmp_path / "delta")
    loaded = load_classifier(tmp_path / "delta")
    loaded.save_pretrained(tmp_path / "again")
    again = load_classifier(tmp_path / "again")
    for other in (again, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(scores(other), scores(loaded))
    assert type(loaded.merge_and_unload()) is LlamaForSequenceClassification


def test_config_and_card(reward: Pair, tmp_path: Path) -> None:
    run(reward, tmp_path / "delta")
    config = json.loads((tmp_path / "delta" / "config.json").read_text())
    assert config["architectures"] == ["DeltaCompressedForSequenceClassification"]
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModelForSequenceClassification"}
    assert config["absent_tensors"] == ["lm_head.weight"]
    assert config["row_counts"] == {"score.weight": 0}
    assert AutoConfig.from_pretrained(tmp_path / "delta").text_config.architectures == [
        "LlamaForSequenceClassification"
    ]
    card = ModelCard.load(tmp_path / "delta" / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained" in card.text and "AutoModelForCausalLM" not in card.text


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_labels_are_the_classifiers(reward: Pair, tmp_path: Path, labels: int) -> None:
    names = {i: f"kind {i}" for i in range(labels)}
    tuned = classifier("llama", labels)
    tuned.config.id2label, tuned.config.label2id = names, {name: i for i, name in names.items()}
    save_model(tuned, tmp_path / "labelled")
    run(Pair(reward.base, tmp_path / "labelled"), tmp_path / "delta")
    config = AutoConfig.from_pretrained(tmp_path / "delta")
    assert (config.num_labels, config.id2label, config.label2id) == (labels, names, tuned.config.label2id)
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin.id2label == names
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert not written.keys() & {"id2label", "label2id", "num_labels"}
    assert AutoConfig.from_pretrained(tmp_path / "again").id2label == names
    config.num_labels = 5
    assert config.num_labels == config.text_config.num_labels == 5


def test_by_the_wrong_class(reward: Pair, tiny_repository: Path, tmp_path: Path) -> None:
    run(reward, tmp_path / "delta")
    with captured_log() as lines:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    assert torch.equal(scores(loaded), scores(load_classifier(tmp_path / "delta")))
    names = naming(tmp_path / "delta", "LlamaForSequenceClassification", "AutoModelForSequenceClassification")
    assert any(re.search(names, line) for line in lines)
    with pytest.raises(ValueError, match=naming(tiny_repository, "LlamaForCausalLM", "AutoModelForCausalLM")):
        load_classifier(tiny_repository)


def test_a_language_model_is_no_fine_tune_of_a_classifier(reward: Pair) -> None:
    refuses(Pair(reward.finetuned, reward.base), IncompatibleModelsError, naming("lm_head.weight", reward.base))


def test_a_class_that_has_neither_head(reward: Pair) -> None:
    edit_json(reward.finetuned / "config.json", architectures=["LlamaForTokenClassification"])
    refuses(reward, IncompatibleModelsError, naming("LlamaForTokenClassification", "score.weight"))


def test_what_is_for_language_models(reward: Pair, tmp_path: Path) -> None:
    refuses(reward, ValueError, naming(reward.finetuned, "classifier"), distill=["a text " * 900])
    run(reward, tmp_path / "delta")
    repository = open_repository(str(tmp_path / "delta"), HubOptions())
    with pytest.raises(ValueError, match=naming(tmp_path / "delta", "classifier")):
        export_lora(repository, tmp_path / "adapter", 4)


def test_the_language_model_of_the_same_base_is_not_touched(tiny_repository: Path, tiny_pair: Pair) -> None:
    assert load(tiny_repository).state_dict().keys() == load_tensors(tiny_pair.finetuned).keys()
