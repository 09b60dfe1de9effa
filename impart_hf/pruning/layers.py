"""Layer pruning: drop whole decoder layers and add their most important weights to kept layers (GradPruner)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..common.progress import Progress
from ..common.validation import shard_bytes
from ..modeling.checkpoints import Checkpoint
from ..storage.checkpoint_writer import DenseTensor
from ..storage.output import check_output
from .checks import open_decoder
from .decoder_shape import DecoderShape, layer_prefix
from .importance_report import Importance, check_score
from .pruned_writer import PruningReport, write_pruned


def prune_layers(
    model: str,
    output_dir: str | Path,
    importance: Importance | str | Path | None = None,
    *,
    drop: int | None = None,
    ratio: float | None = None,
    layers: Sequence[int] | None = None,
    score: str = "igia",
    merge: bool = True,
    protect: bool = True,
    revision: str | None = None,
    base_name: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> PruningReport:
    """Drop decoder layers, and merge their most important weights into the layers before them.

    A plain model stays a plain model of its family. Layers of sliding and of full attention are merged like any others:
    the windows are no weights. Exactly one of `drop`, `ratio` and `layers` chooses the layers.

    Args:
        model: local folder or Hub id.
        output_dir: folder to make; must not exist, or be empty.
        importance: report on this model, or its folder; needed unless `layers` are given and nothing is merged.
        drop: how many layers to drop, those with the lowest scores.
        ratio: share of the decoder layers' parameters to drop, in (0, 1). Layers with the lowest scores are dropped
            until the share is met as nearly as whole layers allow.
        layers: numbers of the layers to drop, counted from 0.
        score: "igia" or "gradient_norm".
        merge: add the top entries by IGIA of each dropped matrix to the same matrix of the nearest kept layer before
            it, where the signs agree. Norms and biases are not merged.
        protect: keep the first and the last layer.
        revision: branch, tag or commit of the model.
        base_name: Hub id to record for a model that is given as a local folder.
        max_shard_size: a weight file larger than this is split.
        progress: show progress bars.

    Raises:
        ValueError: if the model is of a family that cannot be pruned, the report is missing or of another model, no
            layer or every layer would be dropped, layers to be merged have different widths, or config.json has a list
            by layer that is not known.
        CheckpointError: if the model cannot be read.
        OutputError: if the output folder is not free or the disk is too small.
    """
    check_layers(drop=drop, ratio=ratio, layers=layers, score=score, max_shard_size=max_shard_size)
    check_output(output_dir)
    checkpoint, shape = open_decoder(model, revision)
    if importance is not None:
        importance = importance if isinstance(importance, Importance) else Importance.load(importance)
        importance.check_model(checkpoint, shape)
    elif needs_report(layers, merge):
        raise ValueError(
            "an importance report is needed to choose layers or to merge them: run `impart-hf prune importance` first, "
            "or name the layers and do not merge"
        )
    scores = importance.layers[score].tolist() if importance is not None else []
    dropped = layers_to_drop(shape, scores, drop=drop, ratio=ratio, layers=layers, protect=protect)
    kept = [number for number in range(len(shape.layers)) if number not in dropped]
    merged = merge_targets(dropped, kept) if merge else {}
    for source, target in merged.items():
        if shape.layers[source] != shape.layers[target]:
            raise ValueError(
                f"layer {source} cannot be merged into layer {target}, which has other widths: drop layers before "
                "widths are pruned, or do not merge"
            )
    after = dataclasses.replace(shape, layers=tuple(shape.layers[number] for number in kept))
    step: dict[str, Any] = {
        "kind": "layers",
        "removed": dropped,
        "merged_into": {str(source): target for source, target in merged.items()},
    }
    if layers is None:
        step["score"] = score
    if merged:
        assert importance is not None
        importance.mask(dropped[0], shape.linear_names[0])  # raises a clear error if the report has no masks
        step["top_percent"] = importance.top_percent
    notes = [f"layer {n} has no kept layer before it and was not merged" for n in dropped if merge and n not in merged]
    return write_pruned(
        output_dir, checkpoint, shape, after, kept, step, _tensors(checkpoint, kept, merged, importance, after),
        base_name=base_name, max_shard_size=max_shard_size, progress=Progress(progress), notes=notes,
    )  # fmt: skip


def check_layers(
    *, drop: int | None, ratio: float | None, layers: Sequence[int] | None, score: str, max_shard_size: int | str
) -> None:
    """Check those settings of `prune_layers` that can be checked without a model.

    Raises:
        ValueError: if one is invalid, or not exactly one of `drop`, `ratio` and `layers` is given.
    """
    if sum(choice is not None for choice in (drop, ratio, layers)) != 1:
        raise ValueError("give exactly one of drop (how many layers), ratio and layers (their numbers)")
    check_score(score)
    shard_bytes(max_shard_size)


def needs_report(layers: Sequence[int] | None, merge: bool) -> bool:
    """Return whether `prune_layers` needs an importance report: to choose layers, or to merge them."""
    return merge or layers is None


def layers_to_drop(
    shape: DecoderShape,
    scores: Sequence[float],
    *,
    drop: int | None,
    ratio: float | None,
    layers: Sequence[int] | None,
    protect: bool,
) -> list[int]:
    """Return the sorted numbers of the layers to drop.

    Args:
        shape: the model's shape.
        scores: one per layer; not used if `layers` names them.
        drop, ratio, layers, protect: as for `prune_layers`.

    Raises:
        ValueError: if no layer or every layer would be dropped, or a layer does not exist or is protected.
    """
    if layers is not None:
        return _named(layers, len(shape.layers), protect)
    candidates = range(1, len(shape.layers) - 1) if protect else range(len(shape.layers))
    return _lowest(sorted(candidates, key=lambda n: (scores[n], n)), drop, ratio, shape, protect)


def _named(layers: Sequence[int], count: int, protect: bool) -> list[int]:
    if not layers:
        raise ValueError("layers is empty: name at least one layer")
    if unknown := [n for n in layers if not 0 <= n < count]:
        raise ValueError(f"the model has no layer {unknown[0]}: its layers are 0 to {count - 1}")
    dropped = sorted(set(layers))
    if protect and (ends := [n for n in dropped if n in (0, count - 1)]):
        raise ValueError(
            f"layer {ends[0]} is the first or the last, which are protected: leave it out, or give --no-protect"
        )
    if len(dropped) == count:
        raise ValueError("layers names all layers, so none would be left: leave some out")
    return dropped


def _lowest(
    ranked: Sequence[int], drop: int | None, ratio: float | None, shape: DecoderShape, protect: bool
) -> list[int]:
    """Return the first of the ranked layers: `drop` of them, or as many as come nearest to the ratio, sorted."""
    most = min(len(ranked), len(shape.layers) - 1)
    if drop is not None:
        if not 1 <= drop <= most:
            raise ValueError(
                f"drop: {drop} layers cannot be dropped from {len(shape.layers)}; give 1 to {most}"
                + (", as the first and the last are protected" if protect else "")
            )
        return sorted(ranked[:drop])
    assert ratio is not None
    if not 0 < ratio < 1:
        raise ValueError(f"ratio is {ratio:g}; it must lie between 0 and 1, a share of the decoder layers' parameters")
    target, removed, count = ratio * shape.decoder_parameters, 0, 0
    for number in ranked[:most]:
        size = shape.layer_parameters(number)
        if abs(removed + size - target) >= abs(removed - target):
            break
        removed, count = removed + size, count + 1
    if count == 0:
        raise ValueError(
            f"ratio {ratio:g} is less than half of one of {len(shape.layers)} layers, or none can be dropped"
        )
    if count == most and target - removed > shape.layer_parameters(ranked[count - 1]) / 2:
        raise ValueError(f"ratio {ratio:g} is more than the {most} layers that can be dropped hold: ask for less")
    return sorted(ranked[:count])


def merge_targets(dropped: Collection[int], kept: Sequence[int]) -> dict[int, int]:
    """Return the nearest kept layer before each dropped one; a dropped layer without one is left out."""
    return {n: max(k for k in kept if k < n) for n in sorted(dropped) if kept and n > kept[0]}


def _tensors(
    checkpoint: Checkpoint,
    kept: Sequence[int],
    merged: dict[int, int],
    importance: Importance | None,
    after: DecoderShape,
) -> list[DenseTensor]:
    tensors = []
    for name, size in after.tensors().items():
        if not name.startswith("model.layers."):
            tensors.append(DenseTensor(name, size, checkpoint.dtype(name), partial(checkpoint.tensor, name)))
    for number, old in enumerate(kept):
        sources = [source for source, target in merged.items() if target == old]
        for local, size in after.layer_tensors(number).items():
            stored = layer_prefix(old) + local
            make = partial(checkpoint.tensor, stored)
            linear = local.removesuffix(".weight")
            if sources and linear in after.linear_names:
                assert importance is not None
                make = partial(_merged, checkpoint, importance, old, sources, linear)
            tensors.append(DenseTensor(layer_prefix(number) + local, size, checkpoint.dtype(stored), make))
    return tensors


def _merged(
    checkpoint: Checkpoint, importance: Importance, target: int, sources: Sequence[int], linear: str
) -> torch.Tensor:
    """Return a kept matrix plus the masked entries of dropped ones where signs agree; computed in float32."""
    kept = checkpoint.tensor(f"{layer_prefix(target)}{linear}.weight")
    result = kept.float()
    for source in sources:
        dropped = checkpoint.tensor(f"{layer_prefix(source)}{linear}.weight").float()
        added = importance.mask(source, linear) & (dropped.sign() == kept.sign())
        result += torch.where(added, dropped, 0.0)
    return result.to(kept.dtype)
