"""The vocabulary that an adapter was trained with: its base's, or one with tokens added."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling.model_files import CheckpointError
from .adapted_layers import plain_name


def added_vocabulary(weights: Mapping[str, torch.Tensor], model: PreTrainedModel, source: str) -> int | None:
    """Return the rows of the embeddings that an adapter was trained with, if it holds anything of that size.

    Args:
        weights: the adapter's.
        model: its base's model, on the meta device.
        source: the adapter's name, for the error.

    Raises:
        CheckpointError: if its embeddings and its output projection have different numbers of rows.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    paths = [path for path, module in model.named_modules() if any(module is end for end in ends)]
    axes = {f"{path}.{part}": axis for path in paths for part, axis in _ROWS.items()}
    found = {plain_name(key): tensor for key, tensor in weights.items()}
    rows = {found[name].shape[axis]: name for name, axis in axes.items() if name in found}
    if len(rows) > 1:
        (one, first), (two, second) = list(rows.items())[:2]
        raise CheckpointError(f"the adapter '{source}' has {one} rows in {first} and {two} in {second}")
    return next(iter(rows), None)


# The tensors that have a row for every token, with the axis of the rows.
_ROWS = {"weight": 0, "lora_embedding_A": 1, "lora_B.weight": 0}


def with_vocabulary(config: Mapping[str, Any], rows: int | None) -> dict[str, Any]:
    """Return a copy of a config.json with another number of rows, or with the same if that is None."""
    changed = copy.deepcopy(dict(config))
    if rows is None:
        return changed
    nested = [part for part in (changed, changed.get("text_config")) if isinstance(part, dict) and "vocab_size" in part]
    for part in nested or [changed]:
        part["vocab_size"] = rows
    return changed
