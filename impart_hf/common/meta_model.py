"""Models without weights, for inspecting their architecture."""

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
