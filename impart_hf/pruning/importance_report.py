"""The importance report: scores of layers, heads and channels from `compute_importance`, which pruning reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.files import write_json
from ..modeling.checkpoints import Checkpoint, all_finite
from ..modeling.checksums import tensor_bytes
from ..storage.safetensors_writer import Entry, write_safetensors
from .checks import weights_fingerprint
from .choices import SCORES
from .decoder_shape import FAMILIES, UNITS, DecoderShape, LayerWidth, layer_prefix
from .report_fields import (
    DamagedError,
    checked_flag,
    checked_names,
    checked_number,
    checked_text,
    checked_whole,
    open_vectors,
    read_report,
)

FORMAT_VERSION = 2
REPORT, UNIT_SCORES, MASKS = "importance.json", "importance.safetensors", "masks.safetensors"
_WIDTHS = tuple(field.name for field in dataclasses.fields(LayerWidth))  # the fields that count a layer's units
_SHAPE = tuple(field.name for field in dataclasses.fields(DecoderShape) if field.name != "layers")
_AGAIN = "run `impart-hf prune importance` again"

UnitScores = Mapping[str, Sequence[torch.Tensor]]
# Returns the packed bits of a matrix's mask, given the matrix's name in the checkpoint.
PackedMasks = Callable[[str], np.ndarray]


class Importance:
    """Scores of every decoder layer, attention head, KV group and MLP channel, and masks of the top entries.

    Attributes:
        model: the scored model: a Hub id or the name of a folder.
        fingerprint: hash of its weights, from `weights_fingerprint`.
        shape: its shape.
        steps: how many gradients the scores were computed from.
        settings: the settings of `compute_importance`.
        top_percent: percentage of every matrix's entries that its mask marks.
        losses: one per step, in nats per token.
        layers: for each score, "igia" and "gradient_norm": float64, (layers,).
        heads, groups, channels: for each score, one float32 vector per layer, (heads,), (KV groups,) or (channels,).
        has_masks: whether the report has masks.
    """

    def __init__(
        self,
        *,
        model: str,
        fingerprint: str,
        shape: DecoderShape,
        settings: Mapping[str, Any],
        top_percent: float,
        losses: Sequence[float],
        layers: Mapping[str, torch.Tensor],
        heads: UnitScores,
        groups: UnitScores,
        channels: UnitScores,
        masks: PackedMasks | None = None,
    ):
        """Create a report from its parts.

        Args:
            masks: returns the packed mask of model.layers.I.NAME: uint8, numpy.packbits of the matrix's entries row by
                row. The other arguments are described under Attributes.

        Raises:
            ValueError: if scores are missing, do not fit the shape, or are negative or not finite.
        """
        self.model, self.fingerprint, self.shape = model, fingerprint, shape
        self.settings, self.top_percent, self.losses = dict(settings), top_percent, list(losses)
        self.layers, self.heads, self.groups, self.channels = layers, heads, groups, channels
        self._masks = masks
        self._check_scores()

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def has_masks(self) -> bool:
        return self._masks is not None

    def mask(self, layer: int, linear_name: str) -> torch.Tensor:
        """Return the mask of a matrix's top entries by IGIA: bool, (out, in).

        Args:
            layer: number of the decoder layer.
            linear_name: one of the shape's `linear_names`.

        Raises:
            ValueError: if the report has no masks, the matrix does not exist, or the file is damaged.
        """
        if self._masks is None:
            raise ValueError(f"the importance report holds no masks: {_AGAIN}, without --no-masks")
        if linear_name not in self.shape.linear_names or not 0 <= layer < len(self.shape.layers):
            raise ValueError(f"the model has no matrix {linear_name} in layer {layer}")
        out_features, in_features = _matrix_shape(self.shape, layer, linear_name)
        size = out_features * in_features
        bits = np.unpackbits(self._masks(_matrix_name(layer, linear_name)), count=size)
        if int(bits.sum(dtype=np.int64)) != masked_entries(self.top_percent, size):
            raise ValueError(f"the mask of {_matrix_name(layer, linear_name)} is damaged: {_AGAIN}")
        return torch.from_numpy(bits.view(np.bool_)).view(out_features, in_features)

    def check_model(self, checkpoint: Checkpoint, shape: DecoderShape) -> None:
        """Check that the report was made for this model.

        Args:
            checkpoint, shape: from `checks.open_decoder`.

        Raises:
            ValueError: if it was made for another model, or its scores are no longer valid.
        """
        self._check_scores()
        fingerprint = weights_fingerprint(checkpoint)
        if self.shape != shape or self.fingerprint != fingerprint:
            raise ValueError(
                f"the importance report was made for another model, '{self.model}' with fingerprint "
                f"{self.fingerprint[:8]}, not for '{checkpoint.source}' with {fingerprint[:8]}: {_AGAIN} for this model"
            )

    def _check_scores(self) -> None:
        counts = [dataclasses.astuple(width) for width in self.shape.layers]
        for score in SCORES:
            found = [self.layers.get(score), *(getattr(self, units).get(score) for units in UNITS)]
            if any(values is None for values in found):
                raise ValueError(f"the importance report lacks the score '{score}': {_AGAIN}")
            sizes = [tuple(len(values) for values in per_layer) for per_layer in zip(*found[1:], strict=False)]
            if len(found[0]) != len(counts) or any(len(part) != len(counts) for part in found[1:]) or sizes != counts:
                raise ValueError(f"the importance report's scores do not fit its model: {_AGAIN}")
            for values in [found[0], *(tensor for part in found[1:] for tensor in part)]:
                if not all_finite(values) or bool((values < 0).any()):
                    raise ValueError(f"the importance report holds a score that is negative or not finite: {_AGAIN}")
            if not (found[0] > 0).any():
                raise ValueError(f"the importance report's score '{score}' is zero for every layer: {_AGAIN}")

    def save(self, folder: str | Path) -> None:
        """Write importance.json, importance.safetensors and, if there are masks, masks.safetensors.

        Args:
            folder: folder to write to, made if it does not exist.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        report = {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "shape": {name: getattr(self.shape, name) for name in _SHAPE},
            "settings": self.settings,
            "masks": self.has_masks,
            "top_percent": self.top_percent,
            "layers": [
                {"layer": number}
                | {name: getattr(width, name) for name in _WIDTHS}
                | {score: float(self.layers[score][number]) for score in SCORES}
                for number, width in enumerate(self.shape.layers)
            ],
            "losses": self.losses,
        }
        write_json(target / REPORT, report)
        entries = []
        for units in UNITS:
            for score in SCORES:
                values = torch.cat([tensor.to(torch.float32) for tensor in getattr(self, units)[score]])
                data = tensor_bytes(values).tobytes()
                entries.append(Entry(f"{units}.{score}", "F32", tuple(values.shape), len(data), partial(bytes, data)))
        write_safetensors(target / UNIT_SCORES, entries, {"format": "pt"})
        if self._masks is not None:
            masks = self._masks
            write_safetensors(
                target / MASKS,
                [
                    Entry(name, "U8", (size,), size, lambda name=name: masks(name).tobytes())  # type: ignore[misc]
                    for name, size in _packed_sizes(self.shape).items()
                ],
                {"format": "pt"},
            )

    @classmethod
    def load(cls, folder: str | Path) -> Importance:
        """Read a report. Masks are read when `mask` is called.

        Raises:
            FileNotFoundError: if the folder holds no report.
            ValueError: if the report is damaged or has another format version.
        """
        path = Path(folder)
        if not (path / REPORT).is_file():
            raise FileNotFoundError(f"'{path}' holds no {REPORT}: make it with `impart-hf prune importance`")
        try:
            return cls._read(path)
        except DamagedError as error:
            raise ValueError(f"the importance report in '{path}' cannot be used: {error}; {_AGAIN}") from error

    @classmethod
    def _read(cls, path: Path) -> Importance:
        report = read_report(path / REPORT)
        if report.get("format_version") != FORMAT_VERSION:
            raise DamagedError(f"its format is version {report.get('format_version')!r:.20}, not {FORMAT_VERSION}")
        fields, rows, has_masks = report.get("shape"), report.get("layers"), report.get("masks")
        if not isinstance(rows, list) or not rows or not isinstance(fields, dict) or not isinstance(has_masks, bool):
            raise DamagedError(f"{REPORT} has no valid shape, layers or masks")
        if not all(isinstance(row, dict) and row.get("layer") == number for number, row in enumerate(rows)):
            raise DamagedError("its layers are not numbered from 0 upwards")
        family = checked_text(fields, "family")
        if family not in FAMILIES:
            raise DamagedError(f"family is {family!r:.40}, not one of {', '.join(FAMILIES)}")
        shape = DecoderShape(
            family=family,
            hidden_size=checked_whole(fields, "hidden_size"),
            head_dim=checked_whole(fields, "head_dim"),
            vocab_size=checked_whole(fields, "vocab_size"),
            tied=checked_flag(fields, "tied"),
            biased=checked_names(fields, "biased", {linear.name for linear in FAMILIES[family].linears}),
            layers=tuple(LayerWidth(*(checked_whole(row, name) for name in _WIDTHS)) for row in rows),
        )
        for number, width in enumerate(shape.layers):
            if width.num_attention_heads % width.num_key_value_heads:
                raise DamagedError(f"the heads of layer {number} are not a multiple of its KV heads")
        settings, losses = report.get("settings"), report.get("losses")
        if not isinstance(settings, dict) or not isinstance(losses, list) or not losses:
            raise DamagedError(f"{REPORT} has no valid settings or losses")
        top_percent = checked_number(report, "top_percent")
        if not 0 < top_percent <= 100:
            raise DamagedError(f"top_percent is {top_percent}, not above 0 and at most 100")
        units = _read_units(path / UNIT_SCORES, shape)
        return cls(
            model=checked_text(report, "model"),
            fingerprint=checked_text(report, "fingerprint"),
            shape=shape,
            settings=settings,
            top_percent=top_percent,
            losses=[checked_number({"loss": loss}, "loss") for loss in losses],
            layers={s: torch.tensor([checked_number(row, s) for row in rows], dtype=torch.float64) for s in SCORES},
            heads=units["heads"],
            groups=units["groups"],
            channels=units["channels"],
            masks=open_vectors(path / MASKS, "U8", _packed_sizes(shape)).get_tensor if has_masks else None,
        )


def check_score(score: str) -> None:
    """Raise ValueError if no score has this name."""
    if score not in SCORES:
        raise ValueError(f"score is '{score}'; it must be one of {', '.join(SCORES)}")


def masked_entries(top_percent: float, entries: int) -> int:
    """Return how many of a matrix's entries its mask marks."""
    return round(top_percent / 100 * entries)


def _matrix_name(layer: int, linear_name: str) -> str:
    return layer_prefix(layer) + linear_name


def _matrix_shape(shape: DecoderShape, layer: int, linear_name: str) -> tuple[int, int]:
    out_features, in_features = shape.layer_tensors(layer)[f"{linear_name}.weight"]
    return out_features, in_features


def _packed_sizes(shape: DecoderShape) -> dict[str, int]:
    """Return the bytes of every matrix's packed mask, by the matrix's name."""
    return {
        _matrix_name(layer, name): -(-math.prod(_matrix_shape(shape, layer, name)) // 8)
        for layer in range(len(shape.layers))
        for name in shape.linear_names
    }


def _read_units(path: Path, shape: DecoderShape) -> dict[str, dict[str, list[torch.Tensor]]]:
    counts = {units: [getattr(w, name) for w in shape.layers] for units, name in zip(UNITS, _WIDTHS, strict=True)}
    file = open_vectors(path, "F32", {f"{units}.{score}": sum(counts[units]) for units in UNITS for score in SCORES})
    return {
        units: {
            score: list(torch.from_numpy(file.get_tensor(f"{units}.{score}")).split(counts[units])) for score in SCORES
        }
        for units in UNITS
    }
