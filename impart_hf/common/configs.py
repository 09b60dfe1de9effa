"""Contents of config.json: as a configuration of transformers, and changed."""

import copy
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..modeling.checkpoints import config_fields


def model_config(content: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the configuration that a config.json describes, whose model type transformers must know."""
    return CONFIG_MAPPING[content["model_type"]].from_dict(config_fields(content))


def untied(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a config.json that ties no output projection, nested configurations included."""
    changed = {
        name: untied(value) if isinstance(value, Mapping) and "tie_word_embeddings" in value else copy.deepcopy(value)
        for name, value in content.items()
    }
    return {**changed, "tie_word_embeddings": False}
