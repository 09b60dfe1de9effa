"""Pruning LLaMA: importance from early gradients, layers and widths removed, recovery training (GradPruner)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .importance import compute_importance
    from .importance_report import Importance
    from .layers import prune_layers
    from .pruned_writer import PruningReport
    from .recovery import RecoveryReport, recover
    from .width import prune_width

# The modules are imported when they are first used: they need torch, and some of them transformers' Trainer, which
# takes seconds to import.
_HOMES = {
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
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
