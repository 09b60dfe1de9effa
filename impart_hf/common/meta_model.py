"""Models without weights: what their architecture alone tells."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def meta_model(config: PreTrainedConfig, *, real_buffers: bool = False, **options: Any) -> PreTrainedModel:
    """A causal language model on the meta device.

    Args:
        config: of the model.
        real_buffers: compute what is no parameter, such as the frequencies of RoPE, on the CPU; needs accelerate.
        options: more of `AutoModelForCausalLM.from_config`'s.

    Raises:
        ValueError: if transformers knows no causal language model of this configuration.
        ModuleNotFoundError: if accelerate is needed and missing.
    """
    if real_buffers:
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, **options)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options)
