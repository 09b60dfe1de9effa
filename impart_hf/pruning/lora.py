"""Code that importance and recovery share: loading a model, adding LoRA, and tokenising text."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, set_seed

from ..calibration.text import CalibrationSource, check_vocabulary, model_tokens
from ..common.attention import with_capped_attention
from ..modeling.checkpoints import Checkpoint
from .decoder_shape import DecoderShape


def require_training() -> None:
    """Check that the libraries that training needs are installed.

    Raises:
        ModuleNotFoundError: if one is missing; the message says how to install it.
    """
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("training needs PEFT: pip install 'impart-hf[pruning]'") from error


def training_tokens(
    source: CalibrationSource, checkpoint: Checkpoint, shape: DecoderShape, *, samples: int, length: int, seed: int
) -> torch.Tensor:
    """Return token sequences for training or judging a model.

    Args:
        source: as for `calibration.text.calibration_tokens`.
        checkpoint, shape: the model, which must have a tokenizer.
        samples: the largest number of sequences.
        length: tokens per sequence, at most the model's number of positions.
        seed: for the choice of sequences.

    Returns:
        int64, (sequences, length).

    Raises:
        ValueError: if the tokenizer cannot be read, there is too little text, or a token is not in the vocabulary.
        FileNotFoundError, ModuleNotFoundError: as `calibration_tokens`.
    """
    tokens = model_tokens(checkpoint, source, samples, length, seed)
    check_vocabulary(tokens, shape.vocab_size, checkpoint.source)
    return tokens


def load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Load a checkpoint as a model, on the CPU, whose calls return objects whatever its config.json says."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.source,
        revision=checkpoint.options.revision,
        dtype=dtype,
        trust_remote_code=False,
        return_dict=True,  # transformers' own models fail with False
    )
    return with_capped_attention(model)


def add_lora(model: Any, shape: DecoderShape, rank: int, alpha: int, seed: int) -> Any:
    """Return a PEFT model with LoRA on all linear layers of every decoder layer, LoRA's weights in float32.

    PEFT changes the model that is given.
    """
    from peft import LoraConfig, get_peft_model

    set_seed(seed)
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(shape.linear_names),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)
