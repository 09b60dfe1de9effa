"""A pruned model generates what the masked dense one generates, with every cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.pruned_models import IDS, assert_same, dense_config, greedy, left_padded, load_pruned
from support.tiny_models import make_model, tiny_tokenizer
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache, pipeline
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

pytestmark = pytest.mark.usefixtures("seeded")
WIDTHS = [(6, 3, 32), (1, 1, 7), (4, 4, 53), (8, 4, 64)]


@pytest.mark.parametrize("implementation", [None, *ALL_CACHE_IMPLEMENTATIONS])
def test_caches(implementation: str | None, models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    pruned, dense = models
    if implementation is not None and implementation.startswith("offloaded") and not torch.accelerator.is_available():
        pytest.skip("transformers offloads caches from an accelerator; there is none")
    if implementation == "quantized":
        pytest.importorskip("optimum.quanto", reason="transformers quantizes caches by optimum-quanto or hqq")
    ids, mask = left_padded()
    expected = greedy(dense, ids, attention_mask=mask, use_cache=False)
    assert greedy(pruned, ids, attention_mask=mask, cache_implementation=implementation) == expected
    assert expected[0][:2] != expected[1][:2], "the two prompts have different answers"


def test_caches_of_every_family(family_models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Beyond the windows of 6 tokens; keys by layer, and of a layer's own heads."""
    pruned, dense = family_models
    ids, mask = left_padded()
    expected = greedy(dense, ids, attention_mask=mask, use_cache=False)
    for implementation in ("dynamic", "static"):
        settings = {"cache_implementation": implementation, "disable_compile": True}
        assert greedy(pruned, ids, attention_mask=mask, **settings) == expected, implementation
    cache, theirs = DynamicCache(config=pruned.config), DynamicCache(config=dense.config)
    with torch.no_grad():
        one, other = pruned(IDS, past_key_values=cache).logits, dense(IDS, past_key_values=theirs).logits
    assert_same(one, other)
    assert [layer.keys.shape[1] for layer in cache.layers] == [kv_heads for _, kv_heads, _ in WIDTHS]
    assert [layer.keys.shape[2] for layer in cache.layers] == [layer.keys.shape[2] for layer in theirs.layers]
    assert [type(layer) for layer in cache.layers] == [type(layer) for layer in theirs.layers]


def test_cache_objects_and_none(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    pruned, dense = models
    expected = greedy(dense)
    assert greedy(pruned, use_cache=False) == expected
    dynamic = DynamicCache(config=pruned.config)
    assert greedy(pruned, past_key_values=dynamic) == expected
    assert [layer.keys.shape[1] for layer in dynamic.layers] == [kv_heads for _, kv_heads, _ in WIDTHS]
    static = StaticCache(config=pruned.config, max_cache_len=40)
    assert greedy(pruned, past_key_values=static) == expected
    early = StaticCache(config=pruned.config, max_cache_len=40)
    early.early_initialization(2, *pruned._get_static_cache_init_shape(), torch.float32, torch.device("cpu"))
    assert [layer.keys.shape[1] for layer in early.layers] == [kv_heads for _, kv_heads, _ in WIDTHS]
    assert greedy(pruned, past_key_values=early) == expected
    assert greedy(pruned, prefill_chunk_size=6, cache_implementation="static", disable_compile=True) == expected
    beams = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6}
    assert greedy(pruned, **beams) == greedy(dense, **beams)


def test_assisted_generation(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """As the large model and as the small one; speculation changes nothing in the answer."""
    pruned, dense = models
    ids = IDS[:1]
    assert greedy(dense, ids, assistant_model=pruned) == greedy(dense, ids) == greedy(pruned, ids)
    other = make_model(dense_config(num_hidden_layers=1), seed=5, dtype=torch.float32)
    assert greedy(pruned, ids, assistant_model=other) == greedy(dense, ids)
    assert greedy(pruned, ids, prompt_lookup_num_tokens=3) == greedy(dense, ids)


def test_pipeline(saved: Path, models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=3, eos_token_id=2)
    texts = [
        pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())("A fine", generation_config=settings)
        for model in (load_pruned(saved), models[1])
    ]
    assert texts[0] == texts[1] != [{"generated_text": "A fine"}]
