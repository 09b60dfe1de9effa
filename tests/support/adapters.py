"""Adapters by PEFT on tiny models, and what PEFT's own merge of the whole model gives."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM


def lora(**changes: Any) -> peft.LoraConfig:
    """A LoRA configuration of rank 4."""
    return peft.LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"} | changes))


def save_adapter(base: Path, config: peft.PeftConfig, folder: Path, tokens: int | None = None, seed: int = 5) -> Path:
    """Save an adapter with random weights on a model.

    Args:
        base: the model's folder.
        tokens: rows of the vocabulary that the model is resized to before.
    """
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # PEFT's advice about tied embeddings
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base)
        if tokens is not None:
            model.resize_token_embeddings(tokens, mean_resizing=False)
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        adapted.save_pretrained(folder)
    return folder


def with_adapter(base: Path, adapter: Path, tokens: int | None = None) -> Any:
    """The model with an adapter on it, as PEFT loads it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if tokens is not None:
        with torch.random.fork_rng():
            model.resize_token_embeddings(tokens, mean_resizing=False)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def merged(base: Path, adapter: Path, folder: Path, tokens: int | None = None) -> Path:
    """Save what PEFT's merge of the whole model gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_adapter(base, adapter, tokens).merge_and_unload().save_pretrained(folder)
    return folder
