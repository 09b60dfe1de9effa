"""Whether a model's tensors are complete, by asking transformers."""

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..modeling.checkpoints import config_for
from ..modeling.modeling_delta_compressed import inner_class
from ..modeling.tensors import Tensors


def missing_parameters(weights: Tensors, config: PreTrainedConfig) -> list[str]:
    """Return the parameters for which transformers finds no tensor, sorted.

    Args:
        weights: the tensors; only names, shapes and dtypes are looked at, no weights are read.
        config: the model's configuration.

    Raises:
        ValueError: if a tensor has another shape than the configuration says, or the configuration describes no model.
    """
    empty = {
        name: torch.empty(weights.shape(name), dtype=weights.dtype(name), device="meta") for name in weights.names()
    }
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # a bar would suggest that weights are loaded
    logging.set_verbosity_error()  # its report of missing and unexpected tensors, too
    try:
        model_class = inner_class(config)
        _, info = model_class.from_pretrained(
            None,
            config=config_for(model_class, config),
            state_dict=empty,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # an invalid configuration, for which any type can be raised
        raise ValueError(str(error)) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    for name, shape, expected in sorted(info["mismatched_keys"])[:1]:
        raise ValueError(f"{name} has shape {list(shape)}, and its configuration says {list(expected)}")
    return sorted(info["missing_keys"])
