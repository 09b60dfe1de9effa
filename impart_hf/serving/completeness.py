"""Check that a delta repository or its base has every tensor of the model, because vLLM does not."""

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..modeling.delta_record import DeltaFormatError
from ..modeling.modeling_delta_compressed import inner_class
from ..modeling.tensors import Tensors


def check_complete(weights: Tensors, config: PreTrainedConfig) -> None:
    """Check that transformers would find a tensor of the right shape for every parameter of the model.

    If a linear layer's tensor is missing, vLLM continues with whatever was in memory.

    Args:
        weights: the tensors; only names, shapes and dtypes are checked, no weights are read.
        config: the model's configuration.

    Raises:
        DeltaFormatError: if a tensor is missing or has another shape; the message names the first.
    """
    empty = {
        name: torch.empty(weights.shape(name), dtype=weights.dtype(name), device="meta") for name in weights.names()
    }
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar would suggest that weights are loaded
    try:
        _, info = inner_class(config).from_pretrained(
            None, config=config, state_dict=empty, device_map="meta", output_loading_info=True
        )
    except Exception as error:  # a wrong shape, or an invalid configuration, for which any type can be raised
        raise DeltaFormatError(f"'{weights.source}' does not fit its model's configuration: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if info["missing_keys"]:
        raise DeltaFormatError(
            f"'{weights.source}' lacks {len(info['missing_keys'])} tensors of the model that its configuration "
            f"describes, such as {min(info['missing_keys'])}"
        )
