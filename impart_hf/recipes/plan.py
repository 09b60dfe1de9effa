"""What a recipe will do to its model: every stage's call, checked, with the size of the model that it leaves."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibration.text import CalibrationSource, TextField, calibration_tokens, load_tokenizer
from ..common.devices import usable_device
from ..common.files import file_states
from ..common.version import __version__
from ..common.weight_bytes import weight_bytes
from ..evaluation.task_results import model_identity
from ..evaluation.task_scores import task_files
from ..modeling.checkpoints import Checkpoint
from ..pruning.checks import open_decoder
from ..pruning.decoder_shape import DecoderShape
from ..pruning.forecast import narrowed, without_layers
from .calls import Call, call_of, eval_call
from .recipe import PRUNING, Recipe, Stage, errors_of, json_form, linked


@dataclass(frozen=True)
class PlannedStage:
    """A stage that was checked.

    Attributes:
        stage: what the recipe says of it.
        call: what it calls.
        fingerprint: hash of everything that its result depends on.
        parameters: of the model after it, forecast as if all layers were equally important.
    """

    stage: Stage
    call: Call
    fingerprint: str
    parameters: int

    @property
    def name(self) -> str:
        return self.stage.name


@dataclass(frozen=True)
class RecipePlan:
    """A recipe whose settings, texts and model were checked.

    Attributes:
        recipe: the recipe.
        revision: commit of its model on the Hub; None for a folder.
        parameters: of its model.
        bytes_per_parameter: of its weights; pruning changes no dtype.
        fingerprint: hash of what tells its model from others, and of impart-hf's version.
        stages: in order.
        evaluation: how models are measured.
        conditions: hash of the settings and texts by which they are measured.
    """

    recipe: Recipe
    revision: str | None
    parameters: int
    bytes_per_parameter: float
    fingerprint: str
    stages: Sequence[PlannedStage]
    evaluation: Call
    conditions: str

    @property
    def last_model(self) -> PlannedStage:
        """The stage that makes the recipe's result."""
        return [planned for planned in self.stages if planned.stage.makes_model][-1]

    @property
    def results(self) -> set[int]:
        """The numbers of the stages whose folders are kept in any case: the last model, and the base of a delta."""
        return {number for number in (self.last_model.stage.number, self.last_model.stage.base) if number}

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        stages = [
            {
                "stage": planned.name,
                "settings": dict(planned.stage.settings),
                "parameters": planned.parameters,
                "weight_bytes": round(planned.parameters * self.bytes_per_parameter),
            }
            for planned in self.stages
        ]
        return {"model": self.recipe.model, "parameters": self.parameters, "stages": stages}


def plan_recipe(recipe: Recipe | Mapping[str, Any] | str | Path, *, device: str | None = None) -> RecipePlan:
    """Check a recipe's settings, texts and model, and forecast the sizes of its models; nothing is computed.

    Args:
        recipe: a `Recipe`, a mapping with its keys, or the path of its YAML file.
        device: where every stage computes; None for each function's default.

    Raises:
        RecipeError: naming the stage and the setting, for anything that is wrong.
        FileNotFoundError: if the YAML file does not exist.
    """
    recipe = Recipe.of(recipe)
    if device is not None:
        with errors_of("device"):
            usable_device(device)
    stages = linked(recipe)
    calls = [call_of(stage, recipe, device) for stage in stages]
    evaluation = eval_call(recipe, device)
    with errors_of("model"):
        checkpoint, shape = open_decoder(recipe.model, recipe.revision)
    _check_texts(checkpoint, [(stage.name, call) for stage, call in zip(stages, calls, strict=True)], evaluation)
    revision = None if os.path.isdir(recipe.model) else checkpoint.options.revision
    source = _hash(recipe.model, model_identity(recipe.model, revision), __version__)
    conditions = _hash(dict(recipe.eval), [_text_state(text) for text in _read_by(evaluation)])
    shapes, fingerprints, planned = {0: shape}, {0: source}, []
    for stage, call in zip(stages, calls, strict=True):
        with errors_of(stage.name):
            shapes[stage.number] = _after(stage, call, shapes[stage.model])
        inputs = [fingerprints[number] for number in sorted({stage.model, *stage.inputs})]
        about: list[Any] = [dict(stage.settings), [_text_state(text) for text in call.texts.values()]]
        if stage.kind in (*PRUNING, "compress"):
            about.append(recorded_name(recipe, stages, stage))
        if stage.kind == "push":  # the card of what is pushed has the recipe and the measurements
            about += [{**recipe.to_dict(), "keep": None}, conditions]
        fingerprints[stage.number] = _hash(stage.name, inputs, about)
        planned.append(PlannedStage(stage, call, fingerprints[stage.number], shapes[stage.number].parameters))
    return RecipePlan(
        recipe, revision, shape.parameters, weight_bytes(checkpoint) / shape.parameters, source, planned, evaluation,
        conditions,
    )  # fmt: skip


def recorded_name(recipe: Recipe, stages: Sequence[Stage], stage: Stage) -> str | None:
    """Return the Hub id that a stage is to record for a folder that it reads; None to record the folder.

    A pruning stage records the recipe's model, a compression the model that its delta rests on.
    """
    if (stage.model if stage.kind in PRUNING else stage.base) == 0:
        return recipe.base_name
    return stages[-1].settings.get("base_repo") if stage.kind == "compress" else None


def _after(stage: Stage, call: Call, shape: DecoderShape) -> DecoderShape:
    """Return the shape of the model after a stage."""
    forecasts: dict[str, Callable] = {"layers": without_layers, "width": narrowed}
    forecast = forecasts.get(stage.kind)
    return shape if forecast is None else forecast(shape, **call.taken_by(forecast))


def _check_texts(checkpoint: Checkpoint, calls: Sequence[tuple[str, Call]], evaluation: Call) -> None:
    """Check that every text exists and can be read, by its first tokens."""
    found: dict[str, None] = {}
    for name, call in [*calls, ("eval", evaluation)]:
        for argument, text in call.texts.items():
            with errors_of(f"{name}: {argument}"):
                if repr(text) not in found:
                    tokenizer = load_tokenizer(checkpoint.source, checkpoint.options)
                    calibration_tokens(text, tokenizer, samples=1, length=2)
                found[repr(text)] = None


def _read_by(evaluation: Call) -> list[CalibrationSource]:
    """Return the texts that measuring reads, the files of tasks, and the folder of their data."""
    settings = evaluation.arguments.get("task_settings")
    data = [] if settings is None or settings.data_dir is None else [str(settings.data_dir)]
    files = [str(file) for task in evaluation.arguments.get("tasks", ()) for file in task_files(task)]
    return [*evaluation.texts.values(), *files, *data]


def _text_state(source: CalibrationSource) -> Any:
    """Return what tells whether a text has changed: its files, the name of a data set, or the text itself."""
    if isinstance(source, TextField):
        return [_text_state(source.source), source.field]
    if isinstance(source, str) and os.path.exists(source):
        return file_states(Path(source).rglob("*") if os.path.isdir(source) else [Path(source)])
    return source


def _hash(*values: Any) -> str:
    return hashlib.sha256(json_form(values, "the recipe").encode()).hexdigest()
