"""Check that a delta repository or its base has every tensor of the model, because vLLM does not."""

from transformers import PreTrainedConfig

from ..common.completeness import missing_parameters
from ..modeling.delta_record import DeltaFormatError
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
    try:
        missing = missing_parameters(weights, config)
    except ValueError as error:
        raise DeltaFormatError(f"'{weights.source}' does not fit its model's configuration: {error}") from error
    if missing:
        raise DeltaFormatError(
            f"'{weights.source}' lacks {len(missing)} tensors of the model that its configuration describes, such as "
            f"{missing[0]}"
        )
