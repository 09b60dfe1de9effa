"""The shape that pruning will give a model, before its importance is known: as if all layers were equally important."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .decoder_shape import DecoderShape, LayerWidth
from .layers import layers_to_drop
from .width_budget import width_budget


def without_layers(
    shape: DecoderShape, *, drop: int | None, ratio: float | None, layers: Sequence[int] | None, protect: bool
) -> DecoderShape:
    """Return the shape after `prune_layers` with these settings; exact if all layers have one size.

    Raises:
        ValueError: as `prune_layers`, if the settings do not suit the shape.
    """
    dropped = layers_to_drop(shape, [0.0] * len(shape.layers), drop=drop, ratio=ratio, layers=layers, protect=protect)
    kept = [width for number, width in enumerate(shape.layers) if number not in dropped]
    return dataclasses.replace(shape, layers=tuple(kept))


def narrowed(
    shape: DecoderShape, *, ratio: float, parts: Sequence[str], multiple_of: int, query_heads: bool
) -> DecoderShape:
    """Return a shape with as many parameters as after `prune_width` with these settings, to within one unit.

    Raises:
        ValueError: as `prune_width`, if the settings do not suit the shape.
    """
    equal = torch.ones(len(shape.layers))
    budget = width_budget(
        shape, equal, ratio, exponent=0.0, parts=parts, multiple_of=multiple_of, query_heads=query_heads
    )
    widths = []
    for width, heads, channels in zip(shape.layers, budget.heads, budget.channels, strict=True):
        groups = width.num_key_value_heads
        per_group = width.num_attention_heads // groups
        kept_groups, kept_per_group = (groups, per_group - heads) if query_heads else (groups - heads, per_group)
        widths.append(LayerWidth(kept_groups * kept_per_group, kept_groups, width.intermediate_size - channels))
    return dataclasses.replace(shape, layers=tuple(widths))
