"""Running a recipe, from the first stage that is not finished."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.utils import logging

from ..common.progress import Progress
from .folder import RunFolder, folder_bytes
from .plan import PlannedStage, RecipePlan, plan_recipe, recorded_name
from .recipe import PRUNING, Recipe, errors_of
from .report import MODEL, RESULTS, RecipeReport, StageResult

logger = logging.get_logger(__name__)

_SECTION = "## How it was made, stage by stage"


def run_recipe(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    output: str | Path,
    *,
    device: str | None = None,
    progress: bool = True,
) -> RecipeReport:
    """Do what a recipe says to a model, stage by stage, and measure every model along the way.

    A run that was stopped goes on with its first unfinished stage. If the recipe, its texts or its model have changed
    since, the stages that do not depend on the change stay, and the others are done again.

    Args:
        recipe: a `Recipe`, a mapping with its keys, or the path of its YAML file.
        output: the folder for the stages, report.json, report.md and report.png: missing, empty, or that of an earlier
            run.
        device: where every stage computes and models are measured; None for each function's default.
        progress: show progress bars and what is done.

    Returns:
        The report, which is also in the folder.

    Raises:
        RecipeError: if the recipe is wrong, which is found before any work, or a stage fails; the message names the
            stage.
        FileNotFoundError: if the YAML file does not exist.
        OutputError: if the output folder is not free, holds the stages of another model, or another process runs a
            recipe in it.
    """
    recipe = Recipe.of(recipe)
    folder = RunFolder(output, recipe.model)
    plan = plan_recipe(recipe, device=device)
    with folder:
        return _Run(plan, folder, progress).report_after_all()


def unfinished(plan: RecipePlan, folder: RunFolder) -> list[str]:
    """Return the names of the stages that a run would do, in order."""
    return [planned.name for planned in plan.stages if planned.stage.number in _to_do(plan, folder)]


def _to_do(plan: RecipePlan, folder: RunFolder) -> set[int]:
    """Return the numbers of the stages to do: what is unfinished, and what that needs and is no longer there.

    What was made from a stage that is done again is among them: by rounding, that stage can prune other heads now.
    """
    to_do: set[int] = set()
    needed, known = set(plan.results), -1
    while len(to_do) > known:
        known = len(to_do)
        for planned in reversed(plan.stages):
            stage, entry = planned.stage, folder.entries.get(planned.name)
            made = entry is not None and entry.get("fingerprint") == planned.fingerprint
            if made and stage.makes_model and not _is_measured(plan, planned.fingerprint, entry):
                needed.add(stage.number)
            gone = stage.number in needed and not folder.stage(planned.name).is_dir()
            if not made or gone or not to_do.isdisjoint(stage.inputs):
                to_do.add(stage.number)
                needed.update(stage.inputs)
    return to_do


def _is_measured(plan: RecipePlan, fingerprint: str, entry: Mapping[str, Any] | None) -> bool:
    """Return whether a model was measured under the recipe's conditions."""
    return entry is not None and entry.get("measured") == [fingerprint, plan.conditions]


class _Run:
    """One run of a recipe in its folder."""

    def __init__(self, plan: RecipePlan, folder: RunFolder, progress: bool):
        self._plan, self._folder, self._progress = plan, folder, progress
        self._notes = Progress(progress)
        self._to_do = _to_do(plan, folder)

    def report_after_all(self) -> RecipeReport:
        """Do what is unfinished, and return the report."""
        self._forget()
        fingerprint, source = self._plan.fingerprint, self._plan.recipe.model
        if not _is_measured(self._plan, fingerprint, self._folder.entries.get(MODEL)):
            self._notes.note(f"measuring {source}")
            with errors_of("eval", RuntimeError):
                found = self._measured(source, fingerprint, revision=self._plan.revision)
            self._folder.put(MODEL, found)
        for planned in self._plan.stages:
            if planned.stage.number in self._to_do:
                self._do(planned)
            self._measure(planned)
            if planned == self._plan.last_model:  # whose card goes with it, if the next stage pushes it
                self._add_to_card(planned)
        report = self._report()
        report.save(self._folder.path)
        if not report.draw(self._folder.path):
            logger.warning("report.png was not drawn, because matplotlib is missing: pip install 'impart-hf[plot]'")
        return report

    def _forget(self) -> None:
        """Forget the stages of earlier runs that no longer hold, and say so."""
        names = {planned.name for planned in self._plan.stages}
        finished = {planned.name for planned in self._plan.stages if planned.stage.number not in self._to_do} | {MODEL}
        if forgotten := self._folder.keep(finished, names):
            self._notes.note(
                f"removed, because the recipe, its inputs or the folder have changed: {', '.join(forgotten)}"
            )
        if kept := [planned.name for planned in self._plan.stages if planned.name in finished]:
            self._notes.note(f"finished before: {', '.join(kept)}")

    def _do(self, planned: PlannedStage) -> None:
        """Do a stage, and store that it is finished."""
        self._notes.note(f"stage {planned.stage.number} of {len(self._plan.stages)}: {planned.name}")
        started = time.perf_counter()
        with errors_of(planned.name, RuntimeError):
            report = self._called(planned)
        seconds = time.perf_counter() - started
        self._folder.put(planned.name, {"fingerprint": planned.fingerprint, "seconds": seconds, "report": report})

    def _called(self, planned: PlannedStage) -> dict[str, Any]:
        """Call the function of a stage, and return its report, shortened."""
        stage, call, recipe = planned.stage, planned.call, self._plan.recipe
        output = self._folder.stage(planned.name)
        arguments = dict(call.arguments)
        if stage.kind == "push":
            return self._pushed(planned)
        if stage.kind == "compress":
            assert stage.base is not None
            stages = [other.stage for other in self._plan.stages]
            report = call.function(
                self._source(stage.base), self._source(stage.model), output,
                base_revision=self._plan.revision if stage.base == 0 else None,
                base_name=recorded_name(recipe, stages, stage), progress=self._progress, **arguments,
            )  # fmt: skip
            return {name: getattr(report, name) for name in ("ratio", "repository_bytes", "shortfall", "method")}
        if stage.model == 0:
            arguments["revision"] = self._plan.revision
        if stage.kind in PRUNING:
            if stage.model == 0:
                arguments["base_name"] = recipe.base_name
            if stage.importance is not None:
                arguments["importance"] = self._source(stage.importance)
        report = call.function(self._source(stage.model), output, progress=self._progress, **arguments)
        if stage.kind == "importance":
            return {"steps": report.steps, "losses": report.losses}
        return report.to_dict()

    def _pushed(self, planned: PlannedStage) -> dict[str, Any]:
        """Push the last model, after the pruned model that a delta rests on; return the commits' URLs."""
        stage, push = planned.stage, planned.call.function
        urls = []
        if stage.base is not None:
            private = {name: planned.call.arguments[name] for name in ("private",) if name in planned.call.arguments}
            urls.append(push(self._source(stage.base), stage.settings["base_repo"], **private))
        urls.append(push(self._source(stage.model), stage.settings["repo"], **planned.call.arguments))
        return {"urls": urls}

    def _source(self, number: int) -> str:
        """Return the folder of a stage's result, or the recipe's model for 0."""
        return self._plan.recipe.model if number == 0 else str(self._folder.stage(self._plan.stages[number - 1].name))

    def _measure(self, planned: PlannedStage) -> None:
        """Measure what a stage made, unless that is done."""
        stage, name = planned.stage, planned.name
        entry = self._folder.entries[name]
        if stage.makes_model and not _is_measured(self._plan, planned.fingerprint, entry):
            with errors_of(name, RuntimeError):
                found = self._measured(self._source(stage.number), planned.fingerprint, base=stage.base)
            self._folder.put(name, {**entry, **found})
            self._report().save(self._folder.path)
        if self._plan.recipe.keep == "last":
            self._remove_what_is_over(stage.number)

    def _measured(
        self, source: str, fingerprint: str, *, revision: str | None = None, base: int | None = None
    ) -> dict[str, Any]:
        """Measure a model, and return what its entry in the folder's state holds of that.

        Args:
            source: folder or Hub id.
            fingerprint: of the model.
            revision: its commit on the Hub.
            base: for a delta, the number of the stage that made its base.
        """
        call = self._plan.evaluation
        # Of a base that is a folder, the delta may have recorded the name that it has, or will have, on the Hub
        is_local = base is not None and os.path.isdir(self._source(base))
        local_base = {"base_model": self._source(base)} if base is not None and is_local else {}
        comparison = call.function(
            [source], revision=revision, results=self._folder.path / RESULTS, progress=self._progress, **local_base,
            **call.arguments,
        )  # fmt: skip
        (evaluation,) = comparison.evaluations
        cells = {column: cell for column, cell in evaluation.cells().items() if column != "model"}
        return {
            "measured": [fingerprint, self._plan.conditions],
            "evaluation": evaluation.to_dict(),
            "cells": cells,
            "disk_bytes": folder_bytes(Path(source)) if revision is None else None,
        }

    def _add_to_card(self, planned: PlannedStage) -> None:
        """Add recipe and measurements to a model's card, in place of earlier ones; a model without a card gets one.

        Titles that are a stage's name become the name of the recipe's folder.
        """
        path, title = self._folder.stage(planned.name) / "README.md", self._folder.path.name
        card = ModelCard.load(path) if path.is_file() else ModelCard(f"# {title}")
        text = card.text.partition(_SECTION)[0].strip()
        for other in self._plan.stages:
            text = text.replace(f"# {other.name}", f"# {title}", 1)
        card.text = f"{text}\n\n{_SECTION}\n\n{self._report().card_section()}\n"
        card.save(path)

    def _remove_what_is_over(self, done: int) -> None:
        """Remove the folders of stages that neither a later stage needs nor the user."""
        needed = self._plan.results.union(
            *(other.stage.inputs for other in self._plan.stages if other.stage.number > done)
        )
        for other in self._plan.stages[:done]:
            if other.stage.number not in needed:
                self._folder.remove(other.name)

    def _report(self) -> RecipeReport:
        """Return the report on what is finished."""
        entries, results = self._folder.entries, []
        folder: Path | None = None
        urls: list[str] = []
        for name, settings, fingerprint in [
            (MODEL, {}, self._plan.fingerprint),
            *((planned.name, planned.stage.settings, planned.fingerprint) for planned in self._plan.stages),
        ]:
            entry = entries.get(name)
            if entry is None:
                continue
            measured = _is_measured(self._plan, fingerprint, entry)
            results.append(
                StageResult(
                    name=name,
                    settings=settings,
                    seconds=entry.get("seconds"),
                    report=entry.get("report", {}),
                    evaluation=entry["evaluation"] if measured else None,
                    cells=entry["cells"] if measured else {},
                    disk_bytes=entry.get("disk_bytes"),
                )
            )
            if measured and name != MODEL:
                folder = self._folder.stage(name)
            urls += entry.get("report", {}).get("urls", [])
        return RecipeReport(self._plan.recipe, results, folder, urls)
