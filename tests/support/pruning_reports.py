"""Importance reports made by hand, so that pruning can be tested without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from impart_hf.pruning.checks import open_decoder, weights_fingerprint
from impart_hf.pruning.decoder_shape import DecoderShape, layer_prefix
from impart_hf.pruning.importance_report import Importance, masked_entries


def made_up_importance(model: Path, *, seed: int = 0, top_percent: float = 20.0, **changes: Any) -> Importance:
    """A report on a model with random scores, and random masks of the right size.

    Args:
        changes: fields of `Importance` to be given in place of these; `layers` may be a list, for both scores.
    """
    checkpoint, shape = open_decoder(str(model))
    generator = torch.Generator().manual_seed(seed)

    def units(counts: list[int]) -> dict[str, list[torch.Tensor]]:
        return {s: [torch.rand(n, generator=generator) for n in counts] for s in ("igia", "gradient_norm")}

    scores = {s: torch.rand(len(shape.layers), generator=generator).double() for s in ("igia", "gradient_norm")}
    fields: dict[str, Any] = {
        "model": model.name,
        "fingerprint": weights_fingerprint(checkpoint),
        "shape": shape,
        "settings": {},
        "top_percent": top_percent,
        "losses": [1.0],
        "layers": scores,
        "heads": units([w.num_attention_heads for w in shape.layers]),
        "groups": units([w.num_key_value_heads for w in shape.layers]),
        "channels": units([w.intermediate_size for w in shape.layers]),
        "masks": _random_masks(shape, top_percent, generator),
    } | changes
    if isinstance(fields["layers"], list):
        fields["layers"] = dict.fromkeys(scores, torch.tensor(fields["layers"], dtype=torch.float64))
    return Importance(**fields)


def _random_masks(shape: DecoderShape, top_percent: float, generator: torch.Generator) -> Any:
    packed = {}
    for layer in range(len(shape.layers)):
        sizes = shape.layer_tensors(layer)
        for linear in shape.linear_names:
            entries = torch.Size(sizes[f"{linear}.weight"]).numel()
            bits = np.zeros(entries, np.uint8)
            bits[torch.randperm(entries, generator=generator)[: masked_entries(top_percent, entries)].numpy()] = 1
            packed[layer_prefix(layer) + linear] = np.packbits(bits)
    return packed.__getitem__
