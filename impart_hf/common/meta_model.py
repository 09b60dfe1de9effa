"""Models without weights, for inspecting their architecture."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from ..modeling.checkpoints import config_for
from ..modeling.configuration_delta_compressed import DeltaCompressedConfig
from ..modeling.modeling_delta_compressed import inner_class


def meta_model(config: PreTrainedConfig, *, real_buffers: bool = False, **options: Any) -> PreTrainedModel:
    """Make a model on the meta device, of the class that loads its checkpoint.

    Args:
        config: the model's configuration, or that of a delta repository.
        real_buffers: compute buffers, such as the frequencies of RoPE, on the CPU.
        options: further arguments of the class's `_from_config`, such as dtype.

    Raises:
        ValueError: if transformers has no model that generates text for this configuration.
    """
    inner: Any = config.text_config if config.model_type == DeltaCompressedConfig.model_type else config
    model_class = inner_class(inner)
    own = config_for(model_class, inner)
    if real_buffers:
        from accelerate import init_empty_weights  # takes a second

        with init_empty_weights(include_buffers=False):
            return model_class._from_config(own, **options)
    with torch.device("meta"):
        return model_class._from_config(own, **options)


def takes_images(model_class: Any) -> bool:
    """Return whether a model class is one of transformers' for images and text."""
    known = AutoModelForImageTextToText._model_mapping.get(model_class.config_class, None)
    return model_class in (known if isinstance(known, (list, tuple)) else [known])


def text_decoder(model: PreTrainedModel) -> Any:
    """Return a model's decoder: embeddings and layers, without an output projection."""
    decoder: Any = model
    while True:
        found = decoder.get_decoder() if isinstance(decoder, PreTrainedModel) else decoder
        if found is decoder and getattr(decoder, "get_output_embeddings", lambda: None)() is not None:
            # Llama 4's language model does not know which of its parts is the decoder.
            found = next((part for part in decoder.children() if isinstance(part, PreTrainedModel)), decoder)
        if found is decoder:
            return decoder
        decoder = found


def reads_text(model: PreTrainedModel) -> Callable[[str], bool]:
    """Return a function that tells, by a parameter's name, whether the model needs it for text alone.

    That is all but what a model for images or sound has beside its decoder, such as the image encoder.
    """
    decoder, base = model.get_decoder(), model.base_model
    inside = next(f"{name}." if name else "" for name, module in model.named_modules() if module is decoder)
    beside = f"{model.base_model_prefix}." if base is not model else None
    return lambda name: name.startswith(inside) or (beside is not None and not name.startswith(beside))
