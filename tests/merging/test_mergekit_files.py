"""mergekit's files as they stand on model cards: what they say in other words, and what a merge cannot do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.merge_family import config
from support.messages import naming
from support.tiny_models import edit_json, load_tensors
from transformers import AutoTokenizer

from impart_hf import MergeConfig, MergeModel, merge

TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"

FILES = {
    "one slice over all layers": """
        base_model: BASE
        dtype: float32
        merge_method: task_arithmetic
        name: merged
        parameters: {normalize: false, weight: 0.9, lambda: [{filter: q_proj, value: 2}]}
        slices:
        - sources:
          - {layer_range: [0, 3], model: BASE}
          - {layer_range: [0, 3], model: A, parameters: {weight: 0.5}}
          - {layer_range: [0, 3], model: B, parameters: {weight: [{filter: mlp, value: [0.2, 0.9]}]}}
          parameters:
            weight: [{filter: self_attn, value: 0.3}]
            lambda: {filter: k_proj, value: 0.5}
    """,
    "a slice with a base and settings of its own": """
        merge_method: ties
        slices:
        - base_model: BASE
          parameters: {weight: 0.4, normalize: true}
          sources:
          - {model: BASE, layer_range: [0, 3]}
          - {model: A, layer_range: [0, 3], parameters: {density: [1, 0.2]}}
          - {model: B, layer_range: [0, 3], parameters: {density: 0.5, weight: [0, 0.3, 1]}}
        parameters: {weight: 0.7, normalize: false}
        base_model: BASE
        out_dtype: torch.float32
    """,
    "models as mergekit itself writes them": """
        merge_method: task_arithmetic
        base_model: {model: {path: BASE, revision: null}, lora: null, override_architecture: null}
        models:
        - model: {model: {path: BASE}}
        - model: {model: A}
          parameters: {weight: 0.6}
        - {model: B, parameters: {weight: 0.25}}
        tokenizer: {source: base}
    """,
}


def in_family(text: str, family: Path) -> Any:
    content = yaml.safe_load(text)
    for key, model in (("BASE", "base"), ("A", "a"), ("B", "b")):
        content = json.loads(json.dumps(content).replace(f'"{key}"', json.dumps(str(family / model))))
    return content


def by_mergekit(content: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    run_merge(MergeConfiguration.model_validate(content), str(folder), MergeOptions(quiet=True))
    return load_tensors(folder)


@pytest.mark.parametrize("name", FILES)
def test_the_same_as_mergekit(tunes, tmp_path, name):
    content = in_family(FILES[name], tunes)
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(content))
    merge(tmp_path / "merge.yaml", tmp_path / "ours")
    ours, theirs = load_tensors(tmp_path / "ours"), by_mergekit(content, tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for tensor, wanted in theirs.items():
        torch.testing.assert_close(ours[tensor], wanted, rtol=0, atol=2e-6)


def test_names_of_models_in_all_spellings(tunes):
    spellings = (
        "owner/name@v1",
        {"path": "owner/name", "revision": "v1"},
        {"model": {"path": "owner/name", "revision": "v1"}, "lora": None},
        {"model": "owner/name@v1"},
    )
    for spelling in spellings:
        content = {**config(tunes, "ties", {}), "models": [{"model": spelling, "parameters": None}]}
        assert MergeConfig.from_dict(content).models == (MergeModel("owner/name@v1"),)


def test_the_base_named_as_the_source_of_the_tokenizer(tunes):
    content = config(tunes, "ties", {"a": {}})
    for named in ({"tokenizer_source": str(tunes / "base")}, {"tokenizer": {"source": {"path": str(tunes / "base")}}}):
        assert MergeConfig.from_dict({**content, **named}).tokenizer_source == "base"
    assert MergeConfig.from_dict({**content, "tokenizer": {}}).tokenizer_source == "union"
    listed = {"tokenizer_source": f"{tunes / 'a'}/"}
    assert MergeConfig.from_dict({**content, **listed}).tokenizer_source == str(tunes / "a")


@pytest.fixture
def chat_family(tunes: Path, tmp_path: Path) -> Path:
    """`base` without a chat template, `a` and `b` with one, `c` with another in tokenizer_config.json."""
    for name in ("base", "a", "b", "c"):
        shutil.copytree(tunes / name, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").unlink()
    for name in "ab":
        (tmp_path / name / "chat_template.jinja").write_text(TEMPLATE)
    edit_json(tmp_path / "c" / "tokenizer_config.json", chat_template=TEMPLATE.replace("[", "<"))
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("auto", TEMPLATE.strip()), (TEMPLATE.replace("[", "("), TEMPLATE.replace("[", "(")), ("chatml", "<|im_start|>")],
)
def test_chat_templates(chat_family, wanted, found):
    content = config(chat_family, "task_arithmetic", {"c": {}, "a": {}, "b": {}}, chat_template=wanted)
    merge({**content, "tokenizer_source": str(chat_family / "c")}, chat_family / "ours")
    ours = AutoTokenizer.from_pretrained(chat_family / "ours").chat_template
    assert found in ours
    by_mergekit({**content, "parameters": {"weight": 1}}, chat_family / "theirs")  # mergekit has no default
    assert ours == AutoTokenizer.from_pretrained(chat_family / "theirs").chat_template


def test_no_chat_template_to_choose(tunes, tmp_path):
    for name in ("base", "a"):
        shutil.copytree(tunes / name, tmp_path / name, ignore=shutil.ignore_patterns("chat_template*"))
    content = config(tmp_path, "ties", {"a": {}}, chat_template="auto", tokenizer_source="base")
    merge(content, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None
    for path in (tmp_path / "base").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=naming("chat_template", tmp_path / "base")):
        merge(content, tmp_path / "without")


PART = [{"model": "A", "layer_range": [0, 2]}, {"model": "B", "layer_range": [0, 2]}]
BEYOND: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "layers of several slices": ({"models": None, "slices": [{"sources": PART}] * 2}, ("slices", 2, "mergekit")),
    "a part of the layers": ({"models": None, "slices": [{"sources": PART}]}, ("layer_range", "[0, 2]", "[0, 3]")),
    "the last layers": ({"models": [{"model": "A", "layer_range": [1, 3]}]}, ("layer_range", "[1, 3]")),
    "other layers of each": (
        {"models": [PART[0], {"model": "B", "layer_range": [0, 3]}]},
        ("layer_range", "[0, 3]", "parts"),
    ),
    "layers that are no numbers": ({"models": [{"model": "A", "layer_range": "all"}]}, ("layer_range", "'all'")),
    "no range": ({"models": None, "slices": [{"sources": [{"model": "A"}]}]}, ("slices", "layer_range")),
    "no sources": ({"models": None, "slices": [{"model": "A"}]}, ("slices", "sources", "{'model'")),
    "slices and models": ({"slices": [{"sources": PART}]}, ("slices", "models")),
    "another base in the slice": (
        {"models": None, "slices": [{"sources": PART, "base_model": "C"}]},
        ("slices", "base_model", "'C'"),
    ),
    "several at once": (
        {"modules": {"text_decoder": {}}, "tokenizer": {"source": "union", "tokens": {"<s>": {}}}},
        ("`modules`", "`tokens`", "`tokenizer`"),
    ),
    "an adapter on the base": ({"base_model": "A+B"}, ("base_model", "adapter")),
    "padding": ({"tokenizer": {"pad_to_multiple_of": 64}}, ("`pad_to_multiple_of`", "`tokenizer`")),
    "two tokenizers": (
        {"tokenizer": {"source": "base"}, "tokenizer_source": "base"},
        ("tokenizer_source", "tokenizer"),
    ),
    "a tokenizer's name": ({"tokenizer": "base"}, ("tokenizer", "source", "'base'")),
    "a template of no name": ({"chat_template": "no-such"}, ("chat_template", "'no-such'", "auto")),
    "a template that is none": ({"chat_template": ["auto"]}, ("chat_template", "['auto']")),
    "another architecture": (
        {"models": [{"model": {"model": "A", "override_architecture": "X"}}]},
        ("models", "override_architecture"),
    ),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_is_refused(tunes, tmp_path, name):
    changes, names = BEYOND[name]
    content = json.dumps({**config(tunes, "ties", {"a": {}}), **changes})
    for key, model in (("A", "a"), ("B", "b")):
        content = content.replace(f'"{key}"', json.dumps(str(tunes / model)))
    with pytest.raises(ValueError, match=naming(names)):
        merge(json.loads(content), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_several_merges_in_one_file(tunes, tmp_path):
    text = yaml.safe_dump(config(tunes, "ties", {"a": {}}, name="first"))
    (tmp_path / "multi.yaml").write_text(f"{text}---\n{text}")
    with pytest.raises(ValueError, match=naming("multi.yaml", 2, "mergekit-multi")):
        merge(tmp_path / "multi.yaml", tmp_path / "out")
