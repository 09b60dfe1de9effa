"""Pruning LLaMA: importance from early gradients, layers and widths removed, recovery training (GradPruner)."""

from .importance import compute_importance
from .importance_report import Importance
from .layers import prune_layers
from .pruned_writer import PruningReport
from .recover import RecoveryReport, recover
from .width import prune_width

__all__ = [
    "Importance",
    "PruningReport",
    "RecoveryReport",
    "compute_importance",
    "prune_layers",
    "prune_width",
    "recover",
]
