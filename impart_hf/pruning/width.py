"""Width pruning: remove attention heads and MLP channels, more of them in less important layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..calibration.text import CalibrationSource
from ..common.devices import usable_device
from ..common.progress import Progress
from ..common.validation import shard_bytes
from ..modeling.checkpoints import Checkpoint
from ..storage.checkpoint_writer import DenseTensor
from ..storage.locked_folder import LockedFolder
from ..storage.output import check_output
from .checks import open_decoder
from .choices import PARTS
from .correction import corrected_weights
from .decoder_shape import UNITS, DecoderShape, LayerWidth, layer_prefix
from .importance_report import Importance, check_score
from .pruned_writer import PruningReport, write_pruned
from .width_budget import WidthBudget, width_budget

# At 10, doubling a layer's score divides its share by a thousand; beyond, shares become too small for floats.
_LARGEST_EXPONENT = 10


@dataclass(frozen=True)
class KeptUnits:
    """The units that a layer keeps, as sorted int64 indices.

    Attributes:
        heads: query heads.
        groups: KV heads.
        channels: channels of the MLP.
        before: the layer's widths before.
    """

    heads: Tensor
    groups: Tensor
    channels: Tensor
    before: LayerWidth

    @property
    def width(self) -> LayerWidth:
        return LayerWidth(*(len(getattr(self, unit)) for unit in UNITS))

    def entries(self, units: Sequence[str], shape: DecoderShape) -> Tensor | None:
        """Return the kept rows or columns of a weight.

        Args:
            units: what they consist of, part after part.
            shape: the model's shape.

        Returns:
            int64 indices; None for all, if they consist of no units.
        """
        parts, start = [], 0
        for unit in units:
            size = shape.unit_size(unit)
            kept = getattr(self, unit)[:, None] * size + torch.arange(size)
            parts.append(start + kept.flatten())
            start += self.before.count(unit) * size
        return torch.cat(parts) if parts else None


def prune_width(
    model: str,
    output_dir: str | Path,
    importance: Importance | str | Path,
    *,
    ratio: float,
    score: str = "igia",
    exponent: float = 0.5,
    parts: Sequence[str] = PARTS,
    multiple_of: int = 1,
    query_heads: bool = False,
    calibration: CalibrationSource | None = None,
    calibration_samples: int = 128,
    calibration_length: int = 2048,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    base_name: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> PruningReport:
    """Remove the least important attention heads and MLP channels of every layer.

    The result is of the family's pruned class, such as `PrunedLlamaForCausalLM`. head_dim does not change; biases lose
    the entries of removed rows.

    Args:
        model: local folder or Hub id.
        output_dir: folder to make; must not exist, or be empty.
        importance: report on this model, or its folder.
        ratio: share of the decoder layers' parameters to remove, in (0, 1); met to within half a unit.
        score: "igia" or "gradient_norm", for layers and for their heads and channels.
        exponent: a layer of score s loses a share proportional to s^-exponent. At 0 all layers lose the same share; at
            most 10.
        parts: "attention", "mlp" or both.
        multiple_of: in layers that lose channels, the number of kept channels is a multiple of this.
        query_heads: with GQA, remove the same number of query heads from every KV group, instead of whole groups.
        calibration: calibration text for a least-squares correction: the kept columns of o_proj and down_proj are
            changed to compensate for the removed ones. None for no correction.
        calibration_samples, calibration_length: the largest number of sequences of that text, and tokens per sequence.
        device: where the correction is computed.
        revision: branch, tag or commit of the model.
        base_name: Hub id to record for a model that is given as a local folder.
        max_shard_size: a weight file larger than this is split.
        progress: show progress bars.

    Raises:
        ValueError: if the model is of a family that cannot be pruned, the report is of another model, a setting is out
            of range, the ratio would leave a layer without heads or channels, or the calibration text is empty.
        CheckpointError: if the model cannot be read.
        OutputError: if the output folder is not free or the disk is too small.
    """
    check_width(score=score, exponent=exponent, parts=parts, multiple_of=multiple_of, max_shard_size=max_shard_size)
    device = usable_device(device)
    output = check_output(output_dir)
    checkpoint, shape = open_decoder(model, revision)
    single = all(width.num_attention_heads == width.num_key_value_heads for width in shape.layers)
    if query_heads and "attention" in parts and single:
        raise ValueError("query_heads: every KV group has a single query head, so only whole groups can be removed")
    importance = importance if isinstance(importance, Importance) else Importance.load(importance)
    importance.check_model(checkpoint, shape)
    budget = width_budget(
        shape, importance.layers[score], ratio,
        exponent=exponent, parts=parts, multiple_of=multiple_of, query_heads=query_heads,
    )  # fmt: skip
    if budget.parameters == 0:
        raise ValueError(
            f"ratio {ratio:g} is less than half of the smallest unit, so nothing would be removed: ask for more"
        )
    kept = [kept_units(shape, budget, importance, score, query_heads, n) for n in range(len(shape.layers))]
    after = dataclasses.replace(shape, layers=tuple(units.width for units in kept))
    lost = list(zip(shape.layers, after.layers, strict=True))
    step = {
        "kind": "width",
        "ratio": ratio,
        "score": score,
        "removed_parameters": budget.parameters,
        "heads_removed": [old.num_attention_heads - new.num_attention_heads for old, new in lost],
        "key_value_heads_removed": [old.num_key_value_heads - new.num_key_value_heads for old, new in lost],
        "channels_removed": [old.intermediate_size - new.intermediate_size for old, new in lost],
        "corrected": calibration is not None,
    }
    bars = Progress(progress)
    output.parent.mkdir(parents=True, exist_ok=True)
    with LockedFolder(output.parent, f".{output.name}.work-") as scratch:
        corrected: dict[str, Path] = {}
        if calibration is not None:
            bars.plan(["Calibrating", "Writing"])
            columns = _columns(kept, shape)
            corrected = corrected_weights(
                checkpoint, columns, calibration, calibration_samples, calibration_length, device, scratch, bars
            )
        return write_pruned(
            output, checkpoint, shape, after, range(len(kept)), step, _tensors(checkpoint, kept, after, corrected),
            base_name=base_name, max_shard_size=max_shard_size, progress=bars, notes=[],
        )  # fmt: skip


def check_width(
    *, score: str, exponent: float, parts: Sequence[str], multiple_of: int, max_shard_size: int | str
) -> None:
    """Check those settings of `prune_width` that can be checked without a model.

    Raises:
        ValueError: if one is invalid.
    """
    check_score(score)
    if not parts or (unknown := [part for part in parts if part not in PARTS]):
        raise ValueError(f"parts must be {' or '.join(PARTS)} or both, not {unknown[0] if parts else 'none'!r}")
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, not {multiple_of}")
    if not 0 <= exponent <= _LARGEST_EXPONENT:
        raise ValueError(f"exponent must lie between 0 and {_LARGEST_EXPONENT}, not {exponent:g}")
    shard_bytes(max_shard_size)


def kept_units(
    shape: DecoderShape, budget: WidthBudget, importance: Importance, score: str, query_heads: bool, layer: int
) -> KeptUnits:
    """Return the heads, KV groups and channels with the highest scores, as many as the budget leaves in a layer."""
    width = shape.layers[layer]
    groups = width.num_key_value_heads
    heads = torch.arange(width.num_attention_heads).view(groups, -1)
    if query_heads:
        by_group = importance.heads[score][layer].view(groups, -1)
        stay = _highest(by_group, heads.shape[1] - budget.heads[layer])
        kept_groups, kept_heads = torch.arange(groups), heads.gather(1, stay)
    else:
        kept_groups = _highest(importance.groups[score][layer], groups - budget.heads[layer])
        kept_heads = heads[kept_groups]
    channels = _highest(importance.channels[score][layer], width.intermediate_size - budget.channels[layer])
    return KeptUnits(kept_heads.flatten(), kept_groups, channels, width)


def _highest(scores: Tensor, count: int) -> Tensor:
    """Return the sorted indices of the highest scores along the last dimension; of equal scores, the first."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values


def _columns(kept: Sequence[KeptUnits], shape: DecoderShape) -> dict[str, Tensor]:
    """Return the kept columns of the weights that lose columns, by the weight's name."""
    return {
        f"{layer_prefix(number)}{linear.name}.weight": columns
        for number, units in enumerate(kept)
        for linear in shape.linears
        if (columns := units.entries(linear.columns, shape)) is not None
    }


def _tensors(
    checkpoint: Checkpoint, kept: Sequence[KeptUnits], after: DecoderShape, corrected: dict[str, Path]
) -> list[DenseTensor]:
    makers: dict[str, Callable[[], Tensor]] = {name: partial(_stored, path) for name, path in corrected.items()}
    for number, units in enumerate(kept):
        for linear in after.linears:
            rows, columns = units.entries(linear.rows, after), units.entries(linear.columns, after)
            for name in (f"{layer_prefix(number)}{linear.name}.{part}" for part in ("weight", "bias")):
                makers.setdefault(name, partial(_cut, checkpoint, name, rows, columns))
    return [
        DenseTensor(name, size, checkpoint.dtype(name), makers.get(name, partial(checkpoint.tensor, name)))
        for name, size in after.tensors().items()
    ]


def _stored(path: Path) -> Tensor:
    return load_file(path)["weight"]


def _cut(checkpoint: Checkpoint, name: str, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    tensor = checkpoint.tensor(name)
    if rows is not None:
        tensor = tensor[rows]
    if columns is not None and tensor.dim() == 2:
        tensor = tensor[:, columns]
    return tensor
