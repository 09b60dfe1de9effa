"""The class that loads a fine-tune, and whether it can: one that generates text, or a sequence classifier's."""

from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from ..common.checkpoint_layout import CheckpointLayout, class_layout
from ..common.completeness import missing_parameters
from ..common.configs import model_config
from ..common.meta_model import takes_images
from ..modeling.checkpoints import config_for
from ..modeling.modeling_delta_compressed import inner_class, is_classifier
from ..modeling.tensors import Model, StoredModel
from .base_layout import ReadModel
from .compatibility import IncompatibleModelsError

_SUPPORTED = "only causal language models, and sequence classifiers of the same types, can be compressed"


def loading_class(model: Model) -> Any:
    """Return transformers' class for a model that `check_loads` has accepted."""
    return inner_class(model_config(model.config))


def auto_classes(model: Model) -> list[str]:
    """Return the names of transformers' Auto classes that load a delta of the model, the most specific one last."""
    loading = loading_class(model)
    if is_classifier(loading):
        return ["AutoModelForSequenceClassification"]
    return ["AutoModelForCausalLM", *(["AutoModelForImageTextToText"] if takes_images(loading) else [])]


def check_class(read: ReadModel) -> None:
    """Check that transformers has a class that loads the model, and that it reads all of the model's parameters.

    Raises:
        IncompatibleModelsError: if it knows no class for the model, or one that loads only a part of the model that
            config.json names.
    """
    model = read.checkpoint
    model_type = str(model.config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise IncompatibleModelsError(
            f"'{model.source}' has model_type '{model_type}', but transformers knows no causal language model of that "
            "type: upgrade transformers"
        )
    if read.layout is None:
        raise IncompatibleModelsError(
            f"'{model.source}' is a '{model_type}' model, for which transformers has no class that generates text: "
            f"{_SUPPORTED}"
        )
    stated, loading = _stated_class(model), type(read.layout.model)
    if stated is None or stated is loading:
        return
    if lost := _lost_parameters(model, stated, read.layout):
        advice = _SUPPORTED
        config_class: Any = loading.config_class
        if read.layout.is_complete and config_class in AutoModelForCausalLM._model_mapping:
            advice = (
                f"if the rest is all that you need, load base and fine-tune with {loading.__name__}, save them, and "
                "compress these"
            )
        raise IncompatibleModelsError(
            f"'{model.source}' is a {stated.__name__}, but would be loaded as {loading.__name__}, which does not read "
            f"{len(lost)} of its tensors, such as {lost[0]}: {advice}"
        )


def check_loads(model: Model) -> None:
    """Check that transformers finds every parameter of the model's class in its tensors; no weights are read.

    Raises:
        IncompatibleModelsError: if a parameter is missing or of another shape.
    """
    config = model_config(model.config)
    try:
        missing = missing_parameters(model, config)
    except ValueError as error:
        raise IncompatibleModelsError(f"'{model.source}' does not fit its config.json: {error}") from error
    if missing:
        stated = ", ".join(model.config.get("architectures") or []) or "no class"
        raise IncompatibleModelsError(
            f"'{model.source}' has no {missing[0]}, which {inner_class(config).__name__} needs (config.json names "
            f"{stated}): {_SUPPORTED}"
        )


def _stated_class(model: StoredModel) -> Any:
    """Return the class of transformers that config.json names; None if it names none, or one for another type."""
    config_class = CONFIG_MAPPING[model.config["model_type"]]
    fitting = config_class, config_class.sub_configs.get("text_config")
    for name in model.config.get("architectures") or []:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class in fitting:
            return found
    return None


def _lost_parameters(model: StoredModel, stated: Any, loaded: CheckpointLayout) -> list[str]:
    """Return the tensors that are parameters of the class that config.json names, and that no other class reads.

    Buffers, and copies of a parameter that is read, are not lost.
    """
    config = model_config(model.config)
    try:
        layout = class_layout(model, stated, config_for(stated, config), model.stored_names())
    except Exception:  # a class that is not installed completely, or that takes other settings: nothing is known
        return []
    parameters = {name for name, _ in layout.model.named_parameters(remove_duplicate=False)} - layout.tied.keys()
    unread = (name for name in model.stored_names() if loaded.group(name) is None)
    return [name for name in unread if parameters.intersection(layout.parameters(name))]
