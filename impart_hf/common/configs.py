"""Contents of config.json: as a configuration of transformers, and changed."""

import copy
import json
from collections.abc import Mapping, Set
from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..modeling.checkpoints import config_fields

# Fields of a configuration that say nothing about what is computed with the weights, as those of dropout do not.
_IGNORED_FIELDS = {
    "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "initializer_range", "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states", "pad_token_id",
    "pretraining_tp", "problem_type", "pruning", "return_dict", "transformers_version", "use_cache",
}  # fmt: skip

# Fields by which a fine-tune may differ from its base in a way that its weights show.
VOCABULARY_FIELDS = frozenset({"vocab_size", "tie_word_embeddings"})


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


def fields_of_weights(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields that decide what a model computes with its weights, as JSON values; none that trainers add."""
    known = {field.name for field in fields(config)} | {"model_type", "per_layer_config"}
    values = json.loads(config.to_json_string(use_diff=False))
    return _of_weights({name: value for name, value in values.items() if name in known})


def differing_fields(
    base: PreTrainedConfig, tuned: PreTrainedConfig, but: Set[str] = frozenset()
) -> dict[str, tuple[Any, Any]]:
    """Return the fields by which a fine-tune computes something else with its weights than its base, sorted.

    Args:
        but: fields that do not count.

    Returns:
        The base's and the fine-tune's value, as JSON values, by the field's name.
    """
    own, wanted = fields_of_weights(base), fields_of_weights(tuned)
    pairs = {name: (own.get(name), wanted.get(name)) for name in sorted((own.keys() | wanted.keys()) - but)}
    return {name: (before, after) for name, (before, after) in pairs.items() if before != after}


def _of_weights(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what says nothing, in nested configurations, which have a model type, as well."""
    return {
        name: _of_weights(value) if isinstance(value, dict) and "model_type" in value else value
        for name, value in values.items()
        if name not in _IGNORED_FIELDS and "drop" not in name and not name.startswith("_")
    }
