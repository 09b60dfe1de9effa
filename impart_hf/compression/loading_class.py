"""Check that a fine-tune loads as what a delta repository is loaded as: a causal language model."""

from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ..common.completeness import missing_parameters
from ..modeling.checkpoints import config_fields
from ..modeling.modeling_delta_compressed import inner_class
from ..modeling.tensors import Model
from .compatibility import IncompatibleModelsError


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
    config = CONFIG_MAPPING[model_type].from_dict(config_fields(model.config))
    try:
        missing = missing_parameters(model, config)
    except ValueError as error:
        raise IncompatibleModelsError(f"'{model.source}' does not fit its config.json: {error}") from error
    if missing:
        stated = ", ".join(model.config.get("architectures") or []) or "no class"
        raise IncompatibleModelsError(
            f"'{model.source}' has no {missing[0]}, which {inner_class(config).__name__} needs (config.json names "
            f"{stated}): only models with a language model's head can be compressed"
        )
