"""Pruning LLaMA: importance from early gradients, layers and widths removed, recovery training (GradPruner)."""

from typing import TYPE_CHECKING, Any

from .importance_report import Importance
from .layers import prune_layers
from .pruned_writer import PruningReport
from .width import prune_width

if TYPE_CHECKING:
    from .importance import compute_importance
    from .recovery import RecoveryReport, recover


def __getattr__(name: str) -> Any:
    # These need transformers' Trainer, which takes seconds to import; the command line need not wait for it.
    if name == "compute_importance":
        from .importance import compute_importance

        return compute_importance
    if name in ("RecoveryReport", "recover"):
        from . import recovery

        return getattr(recovery, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Importance",
    "PruningReport",
    "RecoveryReport",
    "compute_importance",
    "prune_layers",
    "prune_width",
    "recover",
]
