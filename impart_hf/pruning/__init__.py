"""Pruning (GradPruner): importance scores from early gradients, layer and width pruning, recovery training."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .importance import compute_importance
    from .importance_report import Importance
    from .layers import prune_layers
    from .pruned_writer import PruningReport
    from .recovery import RecoveryReport, recover
    from .width import prune_width

# The modules are imported on first use, because torch and transformers' Trainer take seconds to import.
_MODULES = {
    "Importance": "importance_report",
    "PruningReport": "pruned_writer",
    "RecoveryReport": "recovery",
    "compute_importance": "importance",
    "prune_layers": "layers",
    "prune_width": "width",
    "recover": "recovery",
}

__all__ = [
    "Importance",
    "PruningReport",
    "RecoveryReport",
    "compute_importance",
    "prune_layers",
    "prune_width",
    "recover",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
