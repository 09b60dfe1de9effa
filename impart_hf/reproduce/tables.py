"""The papers' tables, as the YAML files of `tables/` have them: one file a table, one row an entry.

A file has

    title, paper, place     what it is, and where its numbers are from
    unit                    "percent" or "share": of the published numbers
    columns                 what tells columns apart: [model, task], or [task]
    lines                   by name: `label`, `make` (how its models are made, see `makes.py`), the settings of that,
                            and under `of_model` those of single models
    rows                    one for each entry: `line`, `model`, `task`, `published`, and the `reason` if that is null
    means                   published means: `id`, `of` (a pattern of rows' ids), `published`

A row's id is LINE/MODEL/TASK. `tables/shared/` has the models and the tasks.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_FOLDER = Path(__file__).parent / "tables"
_UNITS = {"percent": 100.0, "share": 1.0}


@dataclass(frozen=True)
class Model:
    """One of the papers' models, or several that are merged.

    Attributes:
        name: its name in the tables.
        base: the base: folder or Hub id, with @REVISION.
        finetuned: the fine-tune, likewise; None if there is none, or none was published.
        merges: the models whose fine-tunes are merged; empty for one model.
        shape: sizes of its layers, as fields of `compression.shapes.Shapes`.
    """

    name: str
    base: str
    finetuned: str | None = None
    merges: tuple[Model, ...] = ()
    shape: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A task on which models are scored.

    Attributes:
        name, label: its name in the tables, and in what is printed.
        lm_eval: a task of lm-eval, or the path of its YAML file; None if it has none.
        metric, filter: the score that is taken; "" for a task that has only one.
        num_fewshot: examples before each question; None for the task's own number.
        code: whether it executes what the model writes.
        judge: whether another model judges the answers.
        differs: how the papers ask otherwise.
    """

    name: str
    label: str
    lm_eval: str | None = None
    metric: str = ""
    filter: str = ""
    num_fewshot: int | None = None
    code: bool = False
    judge: bool = False
    differs: str = ""


@dataclass(frozen=True, eq=False)  # a line is one of a table's
class Line:
    """A line of a table: a way to make models.

    Attributes:
        name, label: its name, and what is printed.
        make: the kind of making, see `makes.py`.
        settings: its settings.
        of_model: of single models: settings of the method that replace those.
    """

    name: str
    label: str
    make: str
    settings: Mapping[str, Any]
    of_model: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, eq=False)  # likewise
class Row:
    """One entry of a table.

    Attributes:
        line: its line.
        model, task: what is scored on what.
        published: the published number, in the table's unit; None if it could not be sourced.
        reason: why not.
    """

    line: Line
    model: Model
    task: Task
    published: float | None
    reason: str = ""

    @property
    def id(self) -> str:
        return f"{self.line.name}/{self.model.name}/{self.task.name}"


@dataclass(frozen=True)
class Mean:
    """A published mean of rows.

    Attributes:
        id: its name.
        rows: ids of the rows; empty where the paper has the mean of a method that is not here.
        published, reason: as of a row.
    """

    id: str
    rows: tuple[str, ...]
    published: float | None
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """A table of a paper.

    Attributes:
        name: name of its file.
        title, paper, place: what it is, and where its numbers are from.
        factor: a published number over a score of lm-eval: 100 if it is in percent.
        columns: what tells its columns apart: ("model", "task") or ("task",).
        rows, means: its entries.
    """

    name: str
    title: str
    paper: str
    place: str
    factor: float
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    means: tuple[Mean, ...]

    def selected(self, patterns: Sequence[str]) -> list[Row]:
        """Return the rows whose id, or line, matches one of the patterns; all if there is no pattern."""
        return [row for row in self.rows if not patterns or any(_matches(row, pattern) for pattern in patterns)]


def _matches(row: Row, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (row.id, row.line.name))


def table_names() -> list[str]:
    """Return the names of all tables."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_table(name: str) -> Table:
    """Read a table.

    Raises:
        ValueError: if there is no such table, or its file is wrong; the message names file and entry.
    """
    if name not in table_names():
        raise ValueError(f"there is no table '{name}'; choose one of {', '.join(table_names())}, or all")
    return read_table(_FOLDER / f"{name}.yaml")


def read_table(path: Path) -> Table:
    """Read a table from a file.

    Raises:
        ValueError: as for `load_table`.
    """
    try:
        return _table(path.stem, yaml.safe_load(path.read_text("utf-8")))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name}: a field is missing or of the wrong kind: {error!r}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name}: {error}") from error


def _table(name: str, content: Mapping[str, Any]) -> Table:
    known_models, known_tasks = models(), tasks()
    lines = {line: _line(line, dict(fields)) for line, fields in content["lines"].items()}
    rows = []
    for entry in content["rows"]:
        for kind, found in (("line", lines), ("model", known_models), ("task", known_tasks)):
            if entry[kind] not in found:
                raise ValueError(f"unknown {kind} '{entry[kind]}' in the row {entry}")
        row = Row(
            lines[entry["line"]], known_models[entry["model"]], known_tasks[entry["task"]],
            _published(entry), entry.get("reason", ""),
        )  # fmt: skip
        rows.append(row)
    ids = [row.id for row in rows]
    if twice := [row for row in ids if ids.count(row) > 1]:
        raise ValueError(f"the row {twice[0]} is there twice")
    means = [
        Mean(
            entry["id"], tuple(fnmatch.filter(ids, entry["of"])) if "of" in entry else (), _published(entry),
            entry.get("reason", ""),
        )
        for entry in content.get("means", ())
    ]  # fmt: skip
    return Table(
        name, content["title"], content["paper"], content["place"], _UNITS[content["unit"]],
        tuple(content.get("columns", ("model", "task"))), tuple(rows), tuple(means),
    )  # fmt: skip


def _line(name: str, fields: dict[str, Any]) -> Line:
    of_model = fields.pop("of_model", {})
    return Line(name, fields.pop("label"), fields.pop("make"), fields, of_model)


def _published(entry: Mapping[str, Any]) -> float | None:
    if entry["published"] is None and not entry.get("reason"):
        raise ValueError(f"an entry without a published number needs a reason: {entry}")
    return entry["published"]


@functools.cache
def models() -> dict[str, Model]:
    """Return the papers' models by name."""
    content = _shared("models")
    found: dict[str, Model] = {}
    for name, fields in content["models"].items():
        merges = tuple(found[other] for other in fields.get("merges", ()))
        shape = content["shapes"][fields["shape"]]
        found[name] = Model(name, fields["base"], fields.get("finetuned"), merges, shape)
    return found


@functools.cache
def tasks() -> dict[str, Task]:
    """Return the papers' tasks by name."""
    return {name: Task(name, **fields) for name, fields in _shared("tasks").items()}


def _shared(name: str) -> Any:
    return yaml.safe_load((_FOLDER / "shared" / f"{name}.yaml").read_text("utf-8"))
