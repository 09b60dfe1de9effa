"""The history of a pruned model, recorded in its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..common.names import public_name
from ..modeling.checkpoints import Checkpoint
from .decoder_shape import DecoderShape


def with_step(
    checkpoint: Checkpoint, shape: DecoderShape, step: Mapping[str, Any], base_name: str | None = None
) -> dict[str, Any]:
    """Return the field `pruning` of config.json after one more step.

    Args:
        checkpoint: the model that the step is applied to.
        shape: the model's shape.
        step: the step, with its `kind`: "layers", "width" or "recovery".
        base_name: Hub id of the model, if this is its first step and it was given as a folder.
    """
    before = checkpoint.config.get("pruning")
    if not isinstance(before, dict) or not isinstance(before.get("steps"), list):
        name = base_name or public_name(checkpoint.source)
        before = {"base_model": name, "base_parameters": shape.parameters, "steps": []}
    return {**before, "steps": [*before["steps"], dict(step)]}
