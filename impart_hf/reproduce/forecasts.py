"""What the missing rows will take: from the models' headers if they are here, otherwise from their shapes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from ..common.model_names import split_revision
from ..compression.forecast import forecast
from ..compression.plan import UnreachableRatioError
from ..compression.resources import Forecast, RunTimes, duration
from ..compression.shapes import Shapes, forecast_shapes, machine_times
from ..evaluation.tables import markdown_table
from ..repository.report import human_bytes
from ..storage.output import existing_parent
from .makes import Compressed, Making, Merged, Pruned
from .planning import Conditions, Entry

_SECONDS = 2.0  # for the matrices of a model that is not here
_HEADINGS = ("model", "made by", "time", "memory", "disk", "result", "from")
_UNKNOWN = "–"
_TRAINED = 16  # bytes of memory for a parameter in full training: weights, gradients, Adam's moments in float32
_FLOAT = 4


def forecast_table(entries: Sequence[Entry], conditions: Conditions, say: Callable[[str], None]) -> str:
    """Return a table of what the models of these entries take to make, a line for each, in Markdown."""
    makings: dict[str, Entry] = {}
    for entry in entries:
        makings.setdefault(entry.making_key, entry)
    if not makings:
        return "Nothing can be run: all rows are done or need something; --list says what."
    rows, from_shapes = [], _ShapeForecasts(conditions)
    for number, entry in enumerate(makings.values(), start=1):
        say(f"forecast {number} of {len(makings)}: {entry.row.line.label} on {entry.row.model.name}")
        making, source = entry.making, "shapes"
        cells = [_UNKNOWN] * 4
        if isinstance(making, Compressed):
            try:
                if all(map(_is_here, making.pair)):
                    source = "headers"
                    cells = _cells(forecast(device=conditions.device, **making.arguments()))
                else:
                    cells = _cells(from_shapes.of(making, entry.row.model.shape))
            except UnreachableRatioError as error:
                source = str(error)
        elif entry.row.model.shape:
            cells = _by_rule(making, _bytes(entry))
        named = (entry.row.model.name, entry.row.line.label, *cells, source)
        rows.append(dict(zip(_HEADINGS, named, strict=True)))
    return "\n\n".join([markdown_table(rows, left=2), _downloads(list(makings.values()), conditions)])


def _is_here(model: str) -> bool:
    """Return whether a model is a local folder, or was downloaded before."""
    source, revision = split_revision(model)
    return os.path.isdir(source) or isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str)


class _ShapeForecasts:
    """Forecasts from shapes, one for all models of one shape."""

    def __init__(self, conditions: Conditions):
        self._device = conditions.device
        self._found: dict[str, Forecast] = {}

    @cached_property
    def _times(self) -> RunTimes:
        return machine_times(self._device, trains=True)

    def of(self, making: Compressed, shape: Mapping[str, Any]) -> Forecast:
        """Return the forecast of a compression of a model of this shape."""
        text = torch.zeros(making.calibration_samples, making.calibration_length, dtype=torch.int64)
        texts = [text if source else None for source in (making.calibration, making.distill)]
        key = json.dumps([shape, making.method.to_dict(), [text is not None for text in texts]])
        if key not in self._found:
            self._found[key] = forecast_shapes(
                Shapes(**shape), making.method, self._times, seconds=_SECONDS, device=self._device,
                calibration=texts[0], distillation=texts[1],
            )  # fmt: skip
        return self._found[key]


def _cells(found: Forecast) -> list[str]:
    memory = _UNKNOWN if found.memory_bytes is None else human_bytes(found.memory_bytes)
    return [duration(found.seconds), memory, human_bytes(found.disk_bytes), human_bytes(found.repository_bytes)]


def _by_rule(making: Making, dense: int) -> list[str]:
    """Return time, memory, disk and result of what there is no forecast for, as far as arithmetic gives them.

    Args:
        dense: bytes of the dense model in 16 bits.
    """
    if isinstance(making, Merged):  # a candidate is judged in float32; its deltas, it and the best are on disk
        return [_UNKNOWN, human_bytes(2 * dense), human_bytes(2 * dense + 2 * dense), human_bytes(dense)]
    if isinstance(making, Pruned):
        memory = dense // 2 * (_TRAINED if making.tuning == "full" else _FLOAT)
        return [_UNKNOWN, human_bytes(memory), human_bytes(3 * dense), human_bytes(dense)]
    return [_UNKNOWN, human_bytes(dense), _UNKNOWN, _UNKNOWN]


def _bytes(entry: Entry) -> int:
    return sum(tensor.dense_bytes for tensor in Shapes(**entry.row.model.shape).tensors())


def _downloads(entries: Sequence[Entry], conditions: Conditions) -> str:
    """Return what has to be downloaded first, and what room there is."""
    missing: dict[str, int] = {}
    for entry in entries:
        for model in _models(entry.making):
            if not _is_here(model):
                missing[model] = _bytes(entry)
    free = shutil.disk_usage(existing_parent(conditions.output)).free
    text = f"{human_bytes(free)} are free at {conditions.output}. "
    if missing:
        named = ", ".join(missing)
        text = f"To be downloaded first, {human_bytes(sum(missing.values()))} in 16 bits: {named}. " + text
    return (
        text + "Models are made one after the other, and removed when they are scored. Memory is that of making a "
        "model; scoring one takes the memory of its weights. The time of scoring, merging and training is not forecast."
    )


def _models(making: Making) -> list[str]:
    """Return the models that a making reads."""
    found: list[Any] = [making.stored]
    if isinstance(making, Compressed):
        found = list(making.pair)
    elif isinstance(making, Merged):
        found = [making.base_model, *making.models.values()]
    elif isinstance(making, Pruned):
        found = [making.model]
    return [model for model in found if model]
