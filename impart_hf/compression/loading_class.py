"""The class that loads a fine-tune, and whether it can: a causal language model's, or a sequence classifier's."""

from typing import Any

from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from ..common.completeness import missing_parameters
from ..modeling.checkpoints import config_fields
from ..modeling.modeling_delta_compressed import inner_class
from ..modeling.tensors import Model
from .compatibility import IncompatibleModelsError


def model_config(model: Model) -> PreTrainedConfig:
    """Return the configuration of a model whose type transformers knows."""
    return CONFIG_MAPPING[model.config["model_type"]].from_dict(config_fields(model.config))


def loading_class(model: Model) -> Any:
    """Return transformers' class for a model that `check_loads` has accepted."""
    return inner_class(model_config(model))


def check_loads(model: Model) -> None:
    """Check that transformers finds every parameter of the model's class in its tensors; no weights are read.

    Raises:
        IncompatibleModelsError: if it knows no class for the model, or if a parameter is missing or of another shape.
    """
    model_type = str(model.config.get("model_type"))
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in AutoModelForCausalLM._model_mapping:
        raise IncompatibleModelsError(
            f"'{model.source}' has model_type '{model_type}', but transformers knows no causal language model of that "
            "type: upgrade transformers"
        )
    config = model_config(model)
    try:
        missing = missing_parameters(model, config)
    except ValueError as error:
        raise IncompatibleModelsError(f"'{model.source}' does not fit its config.json: {error}") from error
    if missing:
        stated = ", ".join(model.config.get("architectures") or []) or "no class"
        raise IncompatibleModelsError(
            f"'{model.source}' has no {missing[0]}, which {inner_class(config).__name__} needs (config.json names "
            f"{stated}): only causal language models and sequence classifiers can be compressed"
        )
