"""Tiny models of what people fine-tune: language models, language models inside vision models, and experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from support.tiny_models import VOCABULARY, Pair, fine_tune, make_model, save_model

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "out_hidden_size": 64,
}
_ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
_ROPE_16 = {**_ROPE, "mrope_section": [2, 3, 3]}  # for heads of 16
_IMAGE_TOKENS = {"image_token_id": 319, "video_token_id": 318, "vision_start_token_id": 317, "vision_end_token_id": 316}

# By name: the model type, fields of its configuration, and of the language model's if that is nested.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "llama": ("llama", {}, None),
    "qwen2": ("qwen2", {}, None),
    "phi3": ("phi3", {}, None),
    "gpt2": ("gpt2", {"tie_word_embeddings": True}, None),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64, "tie_word_embeddings": True}, None),
    "gemma3-text": ("gemma3_text", {"tie_word_embeddings": True, "sliding_window": 16}, None),
    "gemma3": (
        "gemma3",
        {
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 319,
            "boi_token_index": 317,
            "eoi_token_index": 318,
            "tie_word_embeddings": True,
        },
        {"sliding_window": 16, "tie_word_embeddings": True},
    ),
    "qwen2-vl": (
        "qwen2_vl",
        {"vision_config": {**_VISION, "embed_dim": 64, "mlp_ratio": 1}, **_IMAGE_TOKENS},
        {"head_dim": 16, "rope_parameters": _ROPE_16},
    ),
    "qwen2.5-vl": (
        "qwen2_5_vl",
        {"vision_config": _VISION, **_IMAGE_TOKENS},
        {"head_dim": 16, "rope_parameters": _ROPE_16},
    ),
    "qwen3-vl": (
        "qwen3_vl",
        {"vision_config": {**_VISION, "deepstack_visual_indexes": [0]}, **_IMAGE_TOKENS},
        {"rope_parameters": _ROPE},
    ),
    "mistral3": (
        "mistral3",
        {"vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 32}, "image_token_index": 319},
        {"model_type": "mistral"},
    ),
    "llama4": (
        "llama4",
        {"vision_config": {**_VISION, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}},
        {**_EXPERTS, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2, "attention_chunk_size": 64},
    ),
    "mixtral": ("mixtral", _EXPERTS, None),
    "qwen3-moe": ("qwen3_moe", _EXPERTS, None),
    "gpt-oss": ("gpt_oss", {**_EXPERTS, "sliding_window": 16}, None),
    "deepseek-v3": (
        "deepseek_v3",
        {
            **_EXPERTS,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
        },
        None,
    ),
    "qwen3-vl-moe": (
        "qwen3_vl_moe",
        {"vision_config": {**_VISION, "deepstack_visual_indexes": [0]}, **_IMAGE_TOKENS},
        {**_EXPERTS, "rope_parameters": _ROPE},
    ),
}
EXPERTS = ("llama4", "mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3", "qwen3-vl-moe")
NESTED = tuple(name for name, (_, _, text) in ARCHITECTURES.items() if text is not None)


# The class, where transformers' first choice for text leaves the images out.
_WHOLE = {"llama4": ["Llama4ForConditionalGeneration"]}


def architecture(name: str) -> PreTrainedConfig:
    """Return the configuration of one of `ARCHITECTURES`."""
    model_type, fields, text = ARCHITECTURES[name]
    if text is None:
        return AutoConfig.for_model(model_type, **{**_TEXT, **fields})
    config = AutoConfig.for_model(model_type, text_config={**_TEXT, **text}, **{"tie_word_embeddings": False, **fields})
    config.architectures = _WHOLE.get(name)
    return config


def architecture_pair(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Pair:
    """Save a tiny base of one of `ARCHITECTURES` and its fine-tune below a folder."""
    base = make_model(architecture(name), dtype=dtype)
    return Pair(save_model(base, folder / "base"), save_model(fine_tune(base), folder / "finetuned"))
