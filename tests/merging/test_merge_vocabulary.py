"""Merging models whose tokens differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.merge_family import LINEAR, TOKENS, config
from support.messages import naming
from support.tiny_models import (
    edit_tensors,
    fine_tune,
    load_tensors,
    make_model,
    save_model,
    tiny_config,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from impart_hf import merge


def with_tokens(tunes: Path, folder: Path, tokens: list[str], seed: int) -> Path:
    """A fine-tune with tokens added to the vocabulary."""
    model = fine_tune(AutoModelForCausalLM.from_pretrained(tunes / "base"), seed)
    tokenizer = AutoTokenizer.from_pretrained(tunes / "base")
    tokenizer.add_tokens(tokens)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = len(tokenizer) - 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_added_tokens_come_from_the_models_that_have_them(tunes, tmp_path):
    one = with_tokens(tunes, tmp_path / "one", ["[PAD]"], 1)
    two = with_tokens(tunes, tmp_path / "two", ["[PAD]", "<extra>"], 2)
    models = {str(one): {"weight": 0.5}, "a": {"weight": 0.5}, str(two): {"weight": 0.5}}
    merge(config(tunes, "task_arithmetic", models), tmp_path / "out")
    found, first, second = (load_tensors(folder) for folder in (tmp_path / "out", one, two))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert found[name].shape[0] == TOKENS + 2
        torch.testing.assert_close(found[name][TOKENS], (first[name][TOKENS] + second[name][TOKENS]) / 2)
        assert torch.equal(found[name][TOKENS + 1], second[name][TOKENS + 1])
    a, b, c = (m[LINEAR].double() for m in (first, load_tensors(tunes / "a"), second))
    base = load_tensors(tunes / "base")[LINEAR].double()
    torch.testing.assert_close(found[LINEAR].double(), base + (a + b + c - 3 * base) / 2, rtol=0, atol=2e-6)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["vocab_size"] == TOKENS + 2 and content["pad_token_id"] == TOKENS + 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<extra>") == TOKENS + 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_another_vocabulary_is_chosen(tunes, tmp_path):
    one = with_tokens(tunes, tmp_path / "one", ["[PAD]"], 1)
    two = with_tokens(tunes, tmp_path / "two", ["<x>", "<y>"], 2)
    models = {str(one): {"weight": 0.5}, str(two): {"weight": 0.5}}
    with pytest.raises(ValueError, match=naming("'[PAD]'", one, "'<x>'", two, "tokenizer_source")):
        merge(config(tunes, "task_arithmetic", models), tmp_path / "out")
    merge(config(tunes, "task_arithmetic", models, tokenizer_source=str(two)), tmp_path / "two-tokens")
    found, second = (load_tensors(folder)["lm_head.weight"] for folder in (tmp_path / "two-tokens", two))
    assert torch.equal(found[TOKENS:], second[TOKENS:])
    merge(config(tunes, "task_arithmetic", models, tokenizer_source="base"), tmp_path / "out")
    assert load_tensors(tmp_path / "out")["lm_head.weight"].shape[0] == TOKENS
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tiny_tokenizer())
    models = {str(one): {}, "a": {}}
    merge(config(tunes, "task_arithmetic", models, tokenizer_source=str(tunes / "a")), tmp_path / "a")
    assert load_tensors(tmp_path / "a")["lm_head.weight"].shape[0] == TOKENS


def test_added_entries_of_a_bias(tmp_path):
    base = make_model(tiny_config("phi", vocab_size=TOKENS), dtype=torch.float32)
    tuned = fine_tune(base)
    tuned.resize_token_embeddings(TOKENS + 2)
    tuned.lm_head.bias.data[TOKENS:] = 3.0
    save_model(base, tmp_path / "base")
    save_model(tuned, tmp_path / "tuned")
    merge(config(tmp_path, "task_arithmetic", {"tuned": {"weight": 0.5}}), tmp_path / "out")
    found, expected = load_tensors(tmp_path / "out")["lm_head.bias"], load_tensors(tmp_path / "tuned")["lm_head.bias"]
    assert found.shape == expected.shape and torch.equal(found[TOKENS:], expected[TOKENS:])


def test_a_base_without_a_tokenizer(tunes, tmp_path):
    base = shutil.copytree(tunes / "base", tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    merge(config(tunes, "ties", {"a": {}}, base_model=str(base)), tmp_path / "out")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == TOKENS


def padded(tunes: Path, folder: Path, rows: int, seed: int) -> Path:
    """A fine-tune with rows beyond its tokens."""
    with_tokens(tunes, folder, [], seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


def renamed(tunes: Path, folder: Path, number: int, token: str) -> Path:
    """A fine-tune whose tokenizer has another name for a token."""
    shutil.copytree(tunes / "a", folder)
    text = (folder / "tokenizer.json").read_text()
    old = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(number)
    content = json.loads(text)
    content["model"]["vocab"] = {
        token if name == old else name: place for name, place in content["model"]["vocab"].items()
    }
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != old]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(number) == token
    return folder


def test_tokens_come_from_one_model_and_padding_from_another(tunes, tmp_path):
    """The tokenizer of most tokens, the rows of the longest; a token's row is not mixed with another's padding."""
    one = with_tokens(tunes, tmp_path / "one", ["<extra>"], 1)
    two = padded(tunes, tmp_path / "two", TOKENS + 64, 2)
    merge(config(tunes, "ties", {str(two): {}, str(one): {}}), tmp_path / "out")
    found, first, second = (load_tensors(folder)["lm_head.weight"] for folder in (tmp_path / "out", one, two))
    assert found.shape[0] == TOKENS + 64
    assert torch.equal(found[TOKENS], first[TOKENS]) and torch.equal(found[TOKENS + 1 :], second[TOKENS + 1 :])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<extra>") == TOKENS
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["vocab_size"] == TOKENS + 64 and content["pad_token_id"] == TOKENS


def test_tokens_that_no_tokenizer_has_together(tunes, tmp_path):
    one = with_tokens(tunes, tmp_path / "one", ["<x>", "<y>"], 1)
    two = renamed(tunes, tmp_path / "two", TOKENS - 1, "<tool>")
    with pytest.raises(ValueError, match=naming(f"token {TOKENS - 1}", "'<tool>'", two, one, "tokenizer_source")):
        merge(config(tunes, "ties", {str(one): {}, str(two): {}}), tmp_path / "out")
    merge(config(tunes, "ties", {str(one): {}, str(two): {}}, tokenizer_source=str(two)), tmp_path / "out")
    assert load_tensors(tmp_path / "out")["lm_head.weight"].shape[0] == TOKENS


def test_tokens_that_were_renamed(tunes, tmp_path):
    one = renamed(tunes, tmp_path / "one", TOKENS - 1, "<tool>")
    two = renamed(tunes, tmp_path / "two", TOKENS - 1, "<call>")
    with pytest.raises(ValueError, match=naming(f"token {TOKENS - 1}", "'<tool>'", one, "'<call>'", two)):
        merge(config(tunes, "ties", {str(one): {}, str(two): {}}), tmp_path / "out")
    merge(config(tunes, "ties", {"b": {}, str(one): {}}), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_ids_to_tokens(TOKENS - 1) == "<tool>"


def test_added_rows_that_are_no_numbers(tunes, tmp_path):
    one = with_tokens(tunes, tmp_path / "one", ["<x>"], 1)
    edit_tensors(one, lambda tensors: tensors["lm_head.weight"][-1].fill_(float("nan")))
    with pytest.raises(ValueError, match=naming("lm_head.weight", one, "NaN")):
        merge(config(tunes, "ties", {"a": {}, str(one): {}}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
