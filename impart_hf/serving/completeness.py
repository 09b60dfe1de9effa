"""Whether a delta repository and its base have every tensor of the model, which vLLM does not ask."""

from typing import Any

import torch
from transformers.utils import logging

from ..modeling.delta_record import DeltaFormatError
from ..modeling.delta_repository import DeltaRepository, LazyTensor
from ..modeling.modeling_delta_compressed import inner_class


class _ShapeOnly(LazyTensor):
    """A tensor that is never decoded."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.empty(self.get_shape(), dtype=self.dtype, device="meta")[index]


def check_complete(repository: DeltaRepository) -> None:
    """See that transformers would find a tensor of the right shape for every parameter of the model.

    vLLM goes on with whatever was in memory where a linear layer's tensor is missing.

    Raises:
        DeltaFormatError: naming the first tensor that is missing or has another shape.
    """
    config = repository.config.text_config
    tensors = {name: _ShapeOnly(repository, name, "meta") for name in repository.names()}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # nothing is loaded
    try:
        _, info = inner_class(config).from_pretrained(
            None, config=config, state_dict=tensors, device_map="meta", output_loading_info=True
        )
    except RuntimeError as error:  # of a shape
        raise DeltaFormatError(f"'{repository.source}' does not fit its text_config: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if info["missing_keys"]:
        raise DeltaFormatError(
            f"'{repository.source}' and its base lack {len(info['missing_keys'])} tensors of the model that "
            f"text_config describes, such as {min(info['missing_keys'])}"
        )
