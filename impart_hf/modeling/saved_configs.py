"""The configuration files of a loaded model, where the user has changed them."""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from .checkpoints import config_fields, config_for
from .configuration_delta_compressed import DeltaCompressedConfig
from .model_files import read_json

# Fields that loading sets, or that describe the dense model in memory.
_OF_LOADING = (
    *("_name_or_path", "architectures", "auto_map", "dtype", "quantization_config", "transformers_version"),
    "tie_word_embeddings",  # the tensors of a delta are those with which it was made: see docs/FORMAT.md
    *("_from_model_config", "_attn_implementation", "_experts_implementation"),
)
_BASE, _BASE_REVISION = "base_model_name_or_path", "base_model_revision"
_OLD_ROPE_FIELDS = ("rope_theta", "rope_scaling")  # what `rope_parameters` was before transformers 5


def changed_configs(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Return the new content of config.json and generation_config.json, each only if it has changed.

    Of config.json, these are the model's configuration and the base's name and commit in `delta_config`.

    Args:
        model: loaded from a delta repository.
        folder: that repository's files.

    Raises:
        ValueError: if a configuration is not valid, as when any model is saved.
    """
    content = read_json(folder / CONFIG_NAME)
    stored = _text_config(content, model)
    delta_config: Any = model.delta_config
    texts = {}
    with tempfile.TemporaryDirectory() as scratch:
        if _values(model.config) != _values(stored):
            model.config.save_pretrained(scratch)  # checks it
            written = read_json(Path(scratch, CONFIG_NAME))
            content["text_config"] = _updated(content, stored, model, written)
            texts[CONFIG_NAME] = json.dumps(content, indent=2) + "\n"
        if base := _changed_base(delta_config, content):
            texts[CONFIG_NAME] = json.dumps(content | base, indent=2) + "\n"
        generation = getattr(model, "generation_config", None)
        if generation is not None and _values(generation) != _values(_generation_config(folder, stored)):
            generation.save_pretrained(scratch)
            texts[GENERATION_CONFIG_NAME] = Path(scratch, GENERATION_CONFIG_NAME).read_text("utf-8")
    return texts


def _changed_base(config: DeltaCompressedConfig, content: dict[str, Any]) -> dict[str, Any]:
    """Return the base's name and commit if the user has changed them, for instance once the base is published."""
    now = {name: getattr(config, name) for name in (_BASE, _BASE_REVISION)}
    before = {name: content.get(name) for name in now}
    if now[_BASE] != before[_BASE] and now[_BASE_REVISION] == before[_BASE_REVISION]:
        now[_BASE_REVISION] = None  # a commit of another repository
    return now if now != before else {}


def _updated(
    content: dict[str, Any], stored: PreTrainedConfig, model: PreTrainedModel, written: dict[str, Any]
) -> dict[str, Any]:
    """Return `text_config` with what has changed; other fields stay as they stand in the file, whatever their notation.

    Args:
        content: of config.json.
        stored: its configuration.
        model: the model.
        written: the file that transformers writes for its configuration.
    """
    config = model.config
    before, now = _values(stored), _values(config)
    changed = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    aliases = {alias for alias, name in config.attribute_map.items() if name in changed}
    aliases |= set(_OLD_ROPE_FIELDS) if "rope_parameters" in changed else set()
    fields = {name: value for name, value in content["text_config"].items() if name not in aliases}
    values = json.loads(config.to_json_string(use_diff=False))
    for name in changed:
        fields.pop(name, None)
        if name in now:
            fields[name] = values[name]
    if _values(_text_config({**content, "text_config": fields}, model)) == now:
        return fields
    # A field has several names or depends on others: the whole configuration, in transformers' notation.
    fields = {name: value for name, value in written.items() if name not in _OF_LOADING}
    kept = ("architectures", "auto_map", "dtype", "tie_word_embeddings", "torch_dtype")
    return {**fields, **{name: value for name, value in content["text_config"].items() if name in kept}}


def _text_config(content: dict[str, Any], model: PreTrainedModel) -> PreTrainedConfig:
    config: Any = DeltaCompressedConfig.from_dict(config_fields(content))
    return config_for(model, config.text_config)


def _generation_config(folder: Path, text_config: PreTrainedConfig) -> GenerationConfig:
    """Return what a model of the repository is loaded with."""
    if (folder / GENERATION_CONFIG_NAME).is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(copy.deepcopy(text_config))


def _values(config: Any) -> Any:
    """Return a configuration's fields that a user sets."""
    return _without_loading(config.to_dict())


def _without_loading(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_loading(each) for name, each in value.items() if name not in _OF_LOADING}
    return value
