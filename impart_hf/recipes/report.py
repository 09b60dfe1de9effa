"""The report of a recipe: what every stage did, and the models along the way, measured side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..calibration.text import text_name
from ..common.files import atomic_write
from ..common.names import public_name
from ..evaluation.tables import markdown_table, score_table
from ..evaluation.task_scores import TaskScore
from ..repository.report import human_bytes
from .plot import draw
from .recipe import Recipe

REPORT_JSON, REPORT_MD, REPORT_PNG = "report.json", "report.md", "report.png"
RESULTS = "results"  # folder of the tasks' scores, which are kept one by one
MODEL = "model"  # the name of the recipe's model among the stages


@dataclass(frozen=True)
class StageResult:
    """What is known of a finished stage, or of the recipe's model before the first one.

    Attributes:
        name: name of the stage, or `MODEL`.
        settings: as the recipe gives them.
        seconds: time that it took, without measurements; None for the recipe's model.
        report: the report of its function, shortened.
        evaluation: what was measured of the model that it made, as `Evaluation.to_dict`; None if it makes none.
        cells: the same as text, by column.
        disk_bytes: size of the model's folder without its card, of a delta without its base; None for one on the Hub.
    """

    name: str
    settings: Mapping[str, Any]
    seconds: float | None
    report: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None
    cells: Mapping[str, str]
    disk_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "stage": self.name,
            "settings": dict(self.settings),
            "seconds": self.seconds,
            "report": dict(self.report),
            "disk_bytes": self.disk_bytes,
            "evaluation": None if self.evaluation is None else dict(self.evaluation),
        }


@dataclass(frozen=True)
class RecipeReport:
    """What a recipe did.

    Attributes:
        recipe: the recipe.
        results: the recipe's model and the finished stages, in order.
        folder: folder of the last model; while stages are unfinished, of the last one so far, or None.
        urls: commits on the Hub, in the order in which they were made.
    """

    recipe: Recipe
    results: Sequence[StageResult]
    folder: Path | None
    urls: Sequence[str]

    @property
    def measured(self) -> list[StageResult]:
        """The results that are models."""
        return [result for result in self.results if result.evaluation is not None]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "recipe": self.recipe.to_dict(),
            "folder": None if self.folder is None else str(self.folder),
            "urls": list(self.urls),
            "stages": [result.to_dict() for result in self.results],
        }

    def table(self) -> str:
        """Return a Markdown table with a line for each model, and one with a line for each score of a task."""
        tables = [markdown_table([_row(result) for result in self.measured])]
        scores = {
            result.name: [TaskScore(**score) for score in result.evaluation["scores"]]
            for result in self.results
            if result.evaluation is not None
        }
        if any(scores.values()):
            tables.append(score_table(scores))
        return "\n\n".join(tables)

    def card_section(self) -> str:
        """Return Markdown for the model card: the recipe and the table, without paths of this machine."""
        shown = yaml.safe_dump(_public(self.recipe.to_dict()), sort_keys=False, default_flow_style=None, width=100)
        return (
            f"This model was made by `impart-hf prune run` from the recipe below.\n\n{self.table()}\n\n"
            f"```yaml\n{shown}```\n\nLocal files and folders appear in it by name, without their paths."
        )

    def save(self, folder: Path) -> None:
        """Write report.json and report.md."""
        _write(folder / REPORT_JSON, json.dumps(self.to_dict(), indent=2) + "\n")
        _write(folder / REPORT_MD, f"# {public_name(self.recipe.model)}, by stages\n\n{self.table()}\n")

    def draw(self, folder: Path) -> bool:
        """Write report.png, or remove it if no quality was measured.

        Returns:
            False, with nothing written, if matplotlib is not installed.
        """
        return draw([result.to_dict() for result in self.measured], folder / REPORT_PNG)


def _row(result: StageResult) -> dict[str, str]:
    """Return a line of the table, by column."""
    return {
        "stage": result.name,
        **result.cells,
        "on disk": "" if result.disk_bytes is None else human_bytes(result.disk_bytes),
        "made in": "" if result.seconds is None else f"{result.seconds:.0f} s",
    }


def _public(value: Any) -> Any:
    """Return a recipe's content with local files and folders by name."""
    if isinstance(value, Mapping):
        return {key: _public(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_public(part) for part in value]
    return text_name(value) if isinstance(value, str) and Path(value).exists() else value


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as new:
        new.write_text(text, "utf-8")
