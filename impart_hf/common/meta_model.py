"""Models without weights, for inspecting their architecture."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def meta_model(config: PreTrainedConfig, *, real_buffers: bool = False, **options: Any) -> PreTrainedModel:
    """Make a causal language model on the meta device.

    Args:
        config: the model's configuration.
        real_buffers: compute buffers, such as the frequencies of RoPE, on the CPU; needs accelerate.
        options: further arguments of `AutoModelForCausalLM.from_config`.

    Raises:
        ValueError: if transformers has no causal language model for this configuration.
        ModuleNotFoundError: if accelerate is needed and missing.
    """
    if real_buffers:
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, **options)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options)


def reads_text(model: PreTrainedModel) -> Callable[[str], bool]:
    """Return a function that tells, by a parameter's name, whether the model needs it for text alone.

    That is all but what a model for images or sound has beside its decoder, such as the image encoder.
    """
    decoder, base = model.get_decoder(), model.base_model
    inside = next(f"{name}." if name else "" for name, module in model.named_modules() if module is decoder)
    beside = f"{model.base_model_prefix}." if base is not model else None
    return lambda name: name.startswith(inside) or (beside is not None and not name.startswith(beside))
