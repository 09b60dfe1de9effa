"""Merging models whose files are not in the base's layout, or lack rows or tensors of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.disguises import DISGUISES, SAVED
from support.merge_family import TOKENS, config
from support.messages import naming
from support.tiny_models import edit_tensors, fine_tune, load_tensors, make_model, save_model, tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from impart_hf import LowRankConfig, compress, merge
from impart_hf.compression.compatibility import IncompatibleModelsError

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = TOKENS - 20


def cut(tunes: Path, folder: Path, seed: int) -> Path:
    """A fine-tune with fewer tokens than the base."""
    model = fine_tune(AutoModelForCausalLM.from_pretrained(tunes / "base"), seed)
    model.resize_token_embeddings(ROWS)
    return save_model(model, folder)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear"])
def test_rows_that_a_model_lacks(tunes: Path, tmp_path: Path, method: str, delta: bool) -> None:
    """The base's rows stay; the model contributes nothing to them."""
    one = cut(tunes, tmp_path / "one", 1)
    if delta:
        compress(str(tunes / "base"), str(one), tmp_path / "delta", LowRankConfig(compression_ratio=1.5))
    chosen = str(tmp_path / "delta" if delta else one)
    merge(config(tunes, method, {chosen: {"weight": 0.5}, "a": {"weight": 0.25}}), tmp_path / "out")
    found, base, first, other = (load_tensors(f) for f in (tmp_path / "out", tunes / "base", one, tunes / "a"))
    for name in (EMBEDDINGS, HEAD):
        assert found[name].shape == base[name].shape
        if method == "task_arithmetic":
            beyond = base[name][ROWS:] + 0.25 * (other[name] - base[name])[ROWS:]
            torch.testing.assert_close(found[name][ROWS:], beyond, rtol=0, atol=2e-6)
            shared = base[name] + 0.25 * (other[name] - base[name])
            expected = shared[:ROWS] + 0.5 * (first[name] - base[name][:ROWS])
            error = (found[name][:ROWS] - expected).norm() / (expected - shared[:ROWS]).norm()
            assert error < (0.1 if delta else 1e-4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == TOKENS


@pytest.mark.parametrize("alone", [str, lambda name: "base"])
def test_only_models_with_fewer_rows(tunes: Path, tmp_path: Path, alone: object) -> None:
    one = cut(tunes, tmp_path / "one", 1)
    source = str(one) if alone is str else "base"
    merge(config(tunes, "task_arithmetic", {str(one): {}}, tokenizer_source=source), tmp_path / "out")
    found, base = load_tensors(tmp_path / "out"), load_tensors(tunes / "base")
    assert torch.equal(found[HEAD][ROWS:], base[HEAD][ROWS:]) and found[HEAD].shape == base[HEAD].shape


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
@pytest.mark.parametrize("disguise", ["without prefix", "as in memory", "compiled", "buffers"])
def test_a_model_in_another_layout(tmp_path: Path, kind: str, disguise: str) -> None:
    base = make_model(tiny_config(kind), dtype=torch.float32)
    tuned = fine_tune(base)
    save_model(base, tmp_path / "base")
    save_model(tuned, tmp_path / "plain")
    save_model(tuned, tmp_path / "tuned", **SAVED.get(disguise, {}))
    DISGUISES[disguise](tmp_path / "tuned")
    for name in ("plain", "tuned"):
        merge(config(tmp_path, "task_arithmetic", {name: {"weight": 0.5}}), tmp_path / f"merged-{name}")
    found, expected = (load_tensors(tmp_path / f"merged-{name}") for name in ("tuned", "plain"))
    assert found.keys() == expected.keys() == load_tensors(tmp_path / "base").keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_what_the_base_stores_twice(tmp_path: Path) -> None:
    """A second tied matrix, and buffers: the result is one model to transformers."""
    base = make_model(tiny_config("biogpt"), dtype=torch.float32)
    tuned = fine_tune(base)
    save_model(base, tmp_path / "base")
    save_model(tuned, tmp_path / "tuned")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["output_projection.weight"] = tensors["biogpt.embed_tokens.weight"].clone()
        tensors["buffer"] = torch.arange(4)

    edit_tensors(tmp_path / "base", add)
    merge(config(tmp_path, "task_arithmetic", {"tuned": {}}), tmp_path / "out")
    assert torch.equal(load_tensors(tmp_path / "out")["buffer"], torch.arange(4))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.output_projection.weight is loaded.biogpt.embed_tokens.weight
    assert all(torch.allclose(p, tuned.state_dict()[n], atol=1e-6) for n, p in loaded.named_parameters())


def own_head(base: PreTrainedModel, folder: Path) -> Path:
    save_model(fine_tune(base), folder)
    edit_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDINGS] * 1.5}))
    return folder


def test_an_own_head_on_a_base_that_ties(tmp_path: Path) -> None:
    base = make_model(tiny_config("llama-tied"))
    save_model(base, tmp_path / "base")
    own_head(base, tmp_path / "own")
    compress(str(tmp_path / "base"), str(tmp_path / "own"), tmp_path / "delta", LowRankConfig(compression_ratio=3))
    for name in ("own", "delta"):
        with pytest.raises(IncompatibleModelsError, match=naming(HEAD, tmp_path / name, tmp_path / "base")):
            merge(config(tmp_path, "task_arithmetic", {name: {}}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
