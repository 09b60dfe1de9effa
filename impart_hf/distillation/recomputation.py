"""Gradient checkpointing of a student: a layer's activations and deltas are made again in the backward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers that can be recomputed: those for which transformers has gradient checkpointing."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_layers(model: nn.Module) -> None:
    """Make every layer of a model keep only its inputs for the backward pass.

    transformers' own gradient checkpointing needs the training mode, which switches dropout on.
    """
    for layer in layers_of(model):
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    def run(*positional: Any, **others: Any) -> Any:
        # Some layers read a stack once for each of its matrices. The cache ends with the layer: so do dense weights.
        with parametrize.cached():
            return forward(*positional, **others)

    if not torch.is_grad_enabled():
        return run(*arguments, **named)
    # There is no dropout whose random numbers would have to be drawn again.
    return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False, **named)
