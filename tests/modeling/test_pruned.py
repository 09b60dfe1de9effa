"""A pruned model computes what the masked dense one computes, wherever transformers takes a model of its family."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pruned_models import (
    HEAD_DIM,
    IDS,
    KEPT,
    KEPT_MHA,
    assert_same,
    greedy,
    left_padded,
    load_pruned,
    logits,
    pruned_and_dense,
)
from support.tiny_models import load_tensors
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

pytestmark = pytest.mark.usefixtures("seeded")
WIDTHS = [(6, 3, 32), (1, 1, 7), (4, 4, 53), (8, 4, 64)]
ROPE = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"factor": 4.0},
    "longrope": {"short_factor": [2.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("kept", [KEPT, KEPT_MHA], ids=["grouped", "multi-head"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}]
    + [{"rope_parameters": {"rope_type": name, "rope_theta": 10000.0, **fields}} for name, fields in ROPE.items()],
    ids=["plain", "tied", "biases", *ROPE],
)
def test_logits(kept: tuple, changes: dict[str, Any], tmp_path: Path) -> None:
    pruned, dense = pruned_and_dense(kept, **changes)
    assert_same(logits(pruned), logits(dense))
    pruned.save_pretrained(tmp_path)
    loaded = load_pruned(tmp_path)
    assert torch.equal(logits(loaded), logits(pruned))
    assert ("lm_head.weight" in load_tensors(tmp_path)) != ("tie_word_embeddings" in changes)


def test_every_family(family_models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path) -> None:
    pruned, dense = family_models
    assert isinstance(pruned, type(dense)) and type(pruned.model).__name__ == f"Pruned{type(dense.model).__name__}"
    assert pruned.state_dict().keys() == dense.state_dict().keys() and pruned.config.widths == WIDTHS
    assert_same(logits(pruned), logits(dense))
    assert (logits(pruned) - logits(pruned)[:, :1]).abs().max() > 1
    ids, mask = left_padded()
    with torch.no_grad():
        one, other = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (pruned, dense))
    assert_same(one, other)
    pruned.save_pretrained(tmp_path)
    loaded = load_pruned(tmp_path, attn_implementation="eager")
    assert type(loaded) is type(pruned) and loaded.config.to_diff_dict() == pruned.config.to_diff_dict()
    dense.set_attn_implementation("eager")
    assert_same(logits(loaded), logits(dense))
    assert_same(AutoModel.from_pretrained(tmp_path)(IDS).last_hidden_state, pruned.model(IDS).last_hidden_state)


def test_what_makes_a_family_is_seen(models_by_family: dict) -> None:
    """Windows, RoPE by layer, capped scores: what is left out changes the logits, so the oracle would notice."""
    for family, changes in (
        ("qwen2", {"use_sliding_window": False}),
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"attn_logit_softcapping": 0.5}),
        ("gemma2", {"query_pre_attn_scalar": 4}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 4}),
        ("phi3", {"sliding_window": None}),
    ):
        pruned = models_by_family[family][0]
        other, _ = pruned_and_dense(family=family, **changes)
        for model in (copy.deepcopy(pruned), other):
            model.set_attn_implementation("eager")
            model.load_state_dict(pruned.state_dict())
        assert (logits(other) - logits(pruned)).abs().max() > 0.05, (family, changes)


def test_a_copy_is_on_its_own(models_by_family: dict) -> None:
    pruned, _ = models_by_family["phi3"]
    for twin in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        assert torch.equal(logits(twin), logits(pruned))
        twin.set_attn_implementation("eager")
        assert {layer.self_attn.config._attn_implementation for layer in twin.model.layers} == {"eager"}
        assert {layer.self_attn.config._attn_implementation for layer in pruned.model.layers} == {"sdpa"}


def test_the_oracle_notices_one_wrong_head(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    pruned, dense = models
    weight = pruned.model.layers[0].self_attn.o_proj.weight
    with torch.no_grad():
        weight.copy_(weight.roll(HEAD_DIM, 1))
    assert (logits(pruned) - logits(dense)).abs().max() > 0.1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementations(implementation: str, saved: Path, models: tuple) -> None:
    _, dense = models
    loaded = load_pruned(saved, attn_implementation=implementation)
    assert loaded.config._attn_implementation == implementation
    assert_same(logits(loaded), logits(dense))
    pruned = load_pruned(saved, attn_implementation={"sdpa": "eager", "eager": "sdpa"}[implementation])
    pruned.set_attn_implementation(implementation)
    assert {layer.self_attn.config._attn_implementation for layer in pruned.model.layers} == {implementation}
    assert_same(logits(pruned), logits(dense))


@pytest.mark.slow
def test_flex_attention() -> None:
    """Compiled once for each pair of head counts, so only one of them, and another than the configuration's."""
    torch._dynamo.reset()
    pruned, dense = pruned_and_dense(KEPT[:1])
    pruned.set_attn_implementation("flex_attention")
    ids, mask = left_padded()
    with torch.no_grad():
        one, other = (model(ids, attention_mask=mask).logits for model in (pruned, dense))
    assert_same(one[mask.bool()], other[mask.bool()])


def test_what_flash_attention_is_handed(saved: Path, models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """The interface of flash attention: ungrouped keys, no mask but the padding's, heads counted by the module."""
    seen: list[tuple[int, int, int]] = []

    def reference(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        heads, kv_heads = WIDTHS[module.layer_idx][:2]
        batch, _, length, _ = query.shape
        total = key.shape[2]
        assert query.shape == (batch, heads, length, HEAD_DIM) and dropout == 0.0
        assert key.shape == value.shape == (batch, kv_heads, total, HEAD_DIM)
        assert module.num_key_value_groups == heads // kv_heads and module.is_causal
        assert module.head_dim == HEAD_DIM and scaling == HEAD_DIM**-0.5
        visible = torch.ones(length, total, dtype=torch.bool).tril(total - length).expand(batch, 1, -1, -1)
        if attention_mask is not None:
            assert attention_mask.shape == (batch, total)
            visible = visible & attention_mask.bool()[:, None, None, :]
        groups = query.view(batch, kv_heads, heads // kv_heads, length, HEAD_DIM)
        scores = torch.einsum("bgqld,bgtd->bgqlt", groups, key) * scaling
        shares = scores.masked_fill(~visible[:, None], -1e30).softmax(-1)
        mixed = torch.einsum("bgqlt,bgtd->bgqld", shares, value).reshape(batch, heads, length, HEAD_DIM)
        seen.append((module.layer_idx, length, total))
        return mixed.transpose(1, 2).contiguous(), None

    AttentionInterface.register("checked", reference)
    AttentionMaskInterface.register("checked", flash_attention_mask)
    _, dense = models
    pruned = load_pruned(saved, attn_implementation="checked")
    assert_same(logits(pruned), logits(dense))
    ids, mask = left_padded()
    assert greedy(pruned, ids, attention_mask=mask) == greedy(dense, ids, attention_mask=mask)
    assert {layer for layer, _, _ in seen} == {0, 1, 2, 3} and {length for _, length, _ in seen} == {20, 1}


def test_hidden_states_attentions_and_loss(saved: Path, models: tuple) -> None:
    pruned, dense = load_pruned(saved, attn_implementation="eager"), models[1]
    dense.set_attn_implementation("eager")
    labels = IDS.masked_fill(IDS % 5 == 0, -100)
    asked = {"labels": labels, "output_hidden_states": True, "output_attentions": True, "logits_to_keep": 0}
    with torch.no_grad():
        one, other = (model(IDS, **asked) for model in (pruned, dense))
    assert_same(one.loss, other.loss)
    assert len(one.hidden_states) == len(other.hidden_states) == 5
    for ours, theirs in zip(one.hidden_states, other.hidden_states, strict=True):
        assert_same(ours, theirs)
    for layer, (ours, theirs, keep) in enumerate(zip(one.attentions, other.attentions, KEPT, strict=True)):
        assert ours.shape[1] == WIDTHS[layer][0]
        assert_same(ours, theirs[:, [group * 2 + query for group in keep.groups for query in keep.queries]])


def test_bfloat16(saved: Path) -> None:
    loaded = load_pruned(saved, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and loaded.config.dtype == torch.bfloat16
    whole = load_pruned(saved)
    assert all(torch.equal(p.bfloat16(), loaded.state_dict()[name]) for name, p in whole.state_dict().items())
    assert_same(logits(loaded).float(), logits(whole), 0.2)
    pruned, dense = pruned_and_dense(dtype=torch.bfloat16)
    assert_same(logits(pruned).float(), logits(dense).float(), 0.2)
