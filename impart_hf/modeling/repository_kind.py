"""What kind of model a folder or Hub repository holds."""

import enum
from collections.abc import Mapping
from typing import Any

from .configuration_delta_compressed import DeltaCompressedConfig
from .configuration_pruned_llama import PrunedLlamaConfig


class RepositoryKind(enum.Enum):
    """Kinds of models, by what is needed to read and publish them."""

    DELTA = enum.auto()  # a delta repository
    PRUNED = enum.auto()  # a dense checkpoint from which layers, heads or channels were removed
    DENSE = enum.auto()  # any other checkpoint


def kind_of(config: Mapping[str, Any]) -> RepositoryKind:
    """The kind of a model.

    Args:
        config: the content of its config.json.
    """
    if config.get("model_type") == DeltaCompressedConfig.model_type:
        return RepositoryKind.DELTA
    if config.get("model_type") == PrunedLlamaConfig.model_type or config.get("pruning") is not None:
        return RepositoryKind.PRUNED
    return RepositoryKind.DENSE
