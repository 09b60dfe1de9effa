"""Whether a delta repository and its base have every tensor of the model, which vLLM does not ask."""

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..modeling.checkpoints import Checkpoint
from ..modeling.delta_record import DeltaFormatError
from ..modeling.delta_repository import DeltaRepository, LazyTensor
from ..modeling.modeling_delta_compressed import inner_class


class _ShapeOnly(LazyTensor):
    """A tensor that is never read."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.empty(self.get_shape(), dtype=self.dtype, device="meta")[index]


def check_complete(weights: DeltaRepository | Checkpoint, config: PreTrainedConfig) -> None:
    """See that transformers would find a tensor of the right shape for every parameter of the model.

    vLLM goes on with whatever was in memory where a linear layer's tensor is missing.

    Args:
        weights: by whose names and shapes it goes.
        config: of the model.

    Raises:
        DeltaFormatError: naming the first tensor that is missing or has another shape.
    """
    # A checkpoint has names, shapes and dtypes like a repository.
    tensors = {name: _ShapeOnly(weights, name, "meta") for name in weights.names()}  # type: ignore[arg-type]
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # nothing is loaded
    try:
        _, info = inner_class(config).from_pretrained(
            None, config=config, state_dict=tensors, device_map="meta", output_loading_info=True
        )
    except Exception as error:  # a shape; or the configuration describes no model, which shows in any way
        raise DeltaFormatError(f"'{weights.source}' does not fit its model's configuration: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if info["missing_keys"]:
        raise DeltaFormatError(
            f"'{weights.source}' lacks {len(info['missing_keys'])} tensors of the model that its configuration "
            f"describes, such as {min(info['missing_keys'])}"
        )
