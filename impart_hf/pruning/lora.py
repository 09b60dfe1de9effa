"""What importance and recovery share: a model with LoRA, and text as its sequences."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, set_seed

from ..calibration.text import CalibrationSource, check_vocabulary, model_tokens
from ..modeling.checkpoints import Checkpoint
from .llama_shape import LINEAR, LlamaShape


def require_training() -> None:
    """See that the libraries are there that training needs.

    Raises:
        ModuleNotFoundError: if one is not, saying how to get it.
    """
    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "training is done with the libraries peft and accelerate: pip install 'impart-hf[pruning]'"
        ) from error


def training_tokens(
    source: CalibrationSource, checkpoint: Checkpoint, shape: LlamaShape, *, samples: int, length: int, seed: int
) -> torch.Tensor:
    """Token sequences for a model to be trained or judged on.

    Args:
        source: as for `calibration_text.calibration_tokens`.
        checkpoint, shape: the model, which must have a tokenizer.
        samples: sequences at most.
        length: of each, in tokens; at most as many as the model has positions.
        seed: of the draw.

    Returns:
        int64, (sequences, length).

    Raises:
        ValueError: if there is no tokenizer that can be read, not enough text, or tokens that the model has not.
        FileNotFoundError, ModuleNotFoundError: as `calibration_tokens`.
    """
    tokens = model_tokens(checkpoint, source, samples, length, seed)
    check_vocabulary(tokens, shape.vocab_size, checkpoint.source)
    return tokens


def load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """A checkpoint as a model, on the CPU."""
    return AutoModelForCausalLM.from_pretrained(
        checkpoint.source, revision=checkpoint.options.revision, dtype=dtype, trust_remote_code=False
    )


def add_lora(model: Any, rank: int, alpha: int, seed: int) -> Any:
    """PEFT's model with LoRA on the seven linear layers of every decoder layer, its weights in float32.

    The model itself is changed, as PEFT does.
    """
    from peft import LoraConfig, get_peft_model

    set_seed(seed)
    settings = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(LINEAR), lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, settings)
