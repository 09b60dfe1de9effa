"""The kinds of models that a folder or Hub repository can hold."""

import enum
from collections.abc import Mapping
from typing import Any

from .configuration_delta_compressed import DeltaCompressedConfig
from .configuration_pruned import is_pruned_type


class RepositoryKind(enum.Enum):
    """Kinds of models, which are read and published differently."""

    DELTA = enum.auto()  # a delta repository
    PRUNED = enum.auto()  # a dense checkpoint from which layers, heads or channels were removed
    DENSE = enum.auto()  # any other checkpoint


def kind_of(config: Mapping[str, Any]) -> RepositoryKind:
    """Return the kind of a model.

    Args:
        config: the content of its config.json.
    """
    if config.get("model_type") == DeltaCompressedConfig.model_type:
        return RepositoryKind.DELTA
    if is_pruned_type(config.get("model_type")) or config.get("pruning") is not None:
        return RepositoryKind.PRUNED
    return RepositoryKind.DENSE
