"""The tables on a small pair of models: the same lines and ratios, but toys for the models, texts and tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .tables import Line, Model, Row, Table, Task, tasks

LIMIT = 16  # questions of a task
_TRAIN, _VALIDATION, _OTHER = "finetune_train.txt", "finetune_heldout.txt", "base_heldout.txt"
_FURTHER = (_OTHER, _VALIDATION)  # on which the further fine-tunes are trained
_WHOLE = "answers"  # the task that has the questions of all others
_SAMPLES, _LENGTH = 8, 64  # of every text
_STEPS, _LEARNING_RATE = 10, 5e-4  # of every training
_SEARCHED = {"lambdas": [0.6, 1.0], "trims": [0.6], "densities": [0.5]}


@dataclass(frozen=True)
class SmallPair:
    """A small pair, as `scripts/train_pair.py` makes it.

    Attributes:
        folder: with `base/`, `finetuned/`, texts and `tasks/`.
        work: where further fine-tunes are made.
    """

    folder: Path
    work: Path

    def __post_init__(self) -> None:
        """Check that all is there.

        Raises:
            FileNotFoundError: naming what is not.
        """
        wanted = ["base/config.json", "finetuned/config.json", _TRAIN, _VALIDATION, _OTHER]
        missing = [name for name in wanted if not (self.folder / name).is_file()]
        if missing or not self.task_files():
            raise FileNotFoundError(
                f"--pair: '{self.folder}' has no {missing[0] if missing else 'tasks/*.yaml'}; make a pair with "
                "`python scripts/demo.py` or `python scripts/train_pair.py FOLDER`"
            )

    def task_files(self) -> list[Path]:
        """Return the YAML files of its tasks, without that of all together if there are others."""
        found = sorted((self.folder / "tasks").glob("*.yaml"))
        return [path for path in found if path.stem != _WHOLE] or found

    @property
    def finetunes(self) -> tuple[Path, ...]:
        """Its fine-tune, and two more for merges, which `prepare` makes; of another pair there are others."""
        work = self.work / self._key
        return self.folder / "finetuned", work / "second", work / "third"

    @cached_property
    def _key(self) -> str:
        from ..evaluation.task_results import model_identity

        content = json.dumps(model_identity(str(self.folder / "base"), None)).encode()
        return hashlib.sha256(content + b"".join((self.folder / text).read_bytes() for text in _FURTHER)).hexdigest()[
            :20
        ]

    @property
    def one_text(self) -> dict[str, str]:
        """The text of all tasks, by purpose."""
        return {"train": str(self.folder / _TRAIN), "validation": str(self.folder / _VALIDATION)}

    def prepare(self, device: str) -> None:
        """Train the further fine-tunes, unless they are there."""
        from ..pruning import recover

        for finetune, text in zip(self.finetunes[1:], _FURTHER, strict=True):
            if not finetune.is_dir():
                recover(
                    self.folder / "base", finetune, str(self.folder / text), lora=False, steps=_STEPS,
                    learning_rate=_LEARNING_RATE, length=_LENGTH, device=device, progress=False,
                )  # fmt: skip

    def table(self, table: Table) -> Table:
        """Return a table whose rows are of this pair and its tasks."""
        lines = {row.line.name: _line(row.line, self.folder / _TRAIN) for row in table.rows}
        local = self._tasks()
        rows = [
            Row(lines[row.line.name], self._model(row.model), local[row.task.name], row.published, row.reason)
            for row in table.rows
        ]
        return replace(table, rows=tuple(rows))

    def _model(self, model: Model) -> Model:
        merges = tuple(
            replace(other, base=str(self.folder / "base"), finetuned=str(finetune))
            for other, finetune in zip(model.merges, self.finetunes, strict=False)
        )
        return Model(model.name, str(self.folder / "base"), str(self.finetunes[0]), merges)

    def _tasks(self) -> dict[str, Task]:
        """Return a task of the pair for each of the papers' tasks."""
        files, found = self.task_files(), {}
        for number, (name, task) in enumerate(tasks().items()):
            path = files[number % len(files)]
            found[name] = Task(name, f"{task.label}: {path.stem}", str(path))
        return found


def _line(line: Line, text: Path) -> Line:
    """Return a line with little text, few steps, and few layers dropped."""
    settings: dict[str, Any] = dict(line.settings)
    for name in ("calibration", "distill"):
        if name in settings:
            settings |= {name: str(text), "calibration_samples": _SAMPLES, "calibration_length": _LENGTH}
    if "distill" in settings:
        settings["distill_settings"] = {**settings.get("distill_settings", {}), "steps": _STEPS}
    settings |= {name: values for name, values in _SEARCHED.items() if name in settings}
    if line.make == "merge":
        settings |= {"samples": _SAMPLES, "length": _LENGTH}
    if line.make == "prune":
        settings |= {"steps": _STEPS, "importance_steps": 4, "length": _LENGTH, **_layers(settings)}
        settings |= {"learning_rate": _LEARNING_RATE} if settings.get("tuning") == "full" else {}
    return replace(line, settings=settings)


def _layers(settings: Mapping[str, Any]) -> dict[str, int]:
    """Return how many layers of few are dropped and merged: one of each, or two dropped for a line that only drops."""
    drop, merged = settings.get("drop", 0), settings.get("merged", 0)
    return {"drop": min(drop, 1 if merged else 2), "merged": min(merged, 1)}
