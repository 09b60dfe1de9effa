"""From a table's rows to what is to be done: each row with the making of its model, and the key of its result."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.files import file_states
from ..common.version import __version__, package_version
from ..evaluation.task_scores import task_files
from ..methods import method_class
from .makes import SEED, Compressed, Making, Merged, Pruned, Stored, Unavailable, identified
from .tables import Model, Row, Table, Task, models

if TYPE_CHECKING:
    from ..evaluation.alpaca import AlpacaSettings
    from ..evaluation.sandbox import Isolation
    from ..evaluation.task_scores import TaskSettings

_TEXT_TYPES = (".jsonl", ".json", ".parquet", ".txt")


@dataclass(frozen=True)
class Conditions:
    """Under which conditions rows are run.

    Attributes:
        output: folder of results and models.
        device: where models are made and evaluated.
        backend: what models are evaluated with, as for `evaluate_tasks`.
        limit: the most questions of a task, or a share of them; None for all.
        batch_size: requests at a time, or "auto".
        data_dir: folder with the tasks' data sets, as for `evaluate_tasks`.
        allow_code: how tasks run that execute what a model writes, "isolated" or "unisolated"; None to refuse them.
        alpaca: judge and instructions of AlpacaEval, an `AlpacaSettings`; None for none.
        texts: folder with texts of tasks for training and validation; None for none.
        one_text: a text for all tasks instead, by purpose: "train", "validation".
        replaced: folders or Hub ids of fine-tunes that replace the tables', by name.
    """

    output: Path
    device: str = "cpu"
    backend: str = "hf"
    limit: int | float | None = None
    batch_size: int | str = 8
    data_dir: Path | None = None
    allow_code: Isolation | None = None
    alpaca: AlpacaSettings | None = None
    texts: Path | None = None
    one_text: Mapping[str, str] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what can be checked without the models.

        Raises:
            ValueError, FileNotFoundError: naming the option.
        """
        if unknown := sorted(set(self.replaced) - set(models())):
            raise ValueError(f"--model {unknown[0]}: no table has such a model; they have {', '.join(models())}")
        if self.texts is not None and not self.texts.is_dir():
            raise FileNotFoundError(f"--texts: '{self.texts}' is not a folder")

    @cached_property
    def data_state(self) -> str | None:
        """A checksum over the paths, sizes and times of change of the files in `data_dir`; None without one."""
        if self.data_dir is None:
            return None
        return _digest({"files": file_states(self.data_dir.rglob("*"))})

    def settings_for(self, task: Task) -> TaskSettings:
        """Return the settings with which a task is run.

        Raises:
            ValueError: if a number is out of range.
        """
        from ..evaluation.task_scores import TaskSettings

        return TaskSettings(
            num_fewshot=task.num_fewshot, limit=self.limit, batch_size=self.batch_size,
            apply_chat_template=task.judge, data_dir=self.data_dir, allow_code=self.allow_code,
            alpaca=self.alpaca if task.judge else None,
        )  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A row that is to be run.

    Attributes:
        row: the row.
        making: how its model is made.
        task: what it is scored on.
        conditions: how.
    """

    row: Row
    making: Making
    task: Task
    conditions: Conditions

    @cached_property
    def needs(self) -> str:
        """What is missing to run it, for the user; empty if nothing is."""
        if self.task.judge and self.conditions.alpaca is None:
            return "--judge, --judge-model and --instructions"
        if self.task.lm_eval is None:
            return "a task that lm-eval does not have"
        if lacking := self.making.needs():
            return lacking
        if self.conditions.backend == "runtime" and self.making.base is None:
            return "--backend hf or vllm, as it is no delta"
        if self.task.code and self.conditions.allow_code is None:
            return "--allow-code isolated, as the task executes what the model writes"
        return ""

    @cached_property
    def making_key(self) -> str:
        """The key of its model."""
        return _digest({**self.making.identity(), "impart_hf": __version__})

    @cached_property
    def key(self) -> str:
        """The key of its result: a digest of all on which it depends. Rows with one key are run once."""
        return _digest(self.identity())

    def identity(self) -> dict[str, Any]:
        """Return all that the result depends on, as JSON values."""
        task, conditions = self.task, self.conditions
        return {
            **self.making.identity(),
            "task": {
                "lm_eval": identified(task.lm_eval),
                "files": identified(task_files(str(task.lm_eval))),
                "metric": task.metric,
                "filter": task.filter,
                "num_fewshot": task.num_fewshot,
            },
            **({"judge": identified(asdict(conditions.alpaca))} if task.judge and conditions.alpaca else {}),
            "limit": conditions.limit,
            "data": conditions.data_state,
            "backend": conditions.backend,
            "lm_eval": package_version("lm_eval"),
            "impart_hf": __version__,
        }


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def entries_of(table: Table, patterns: Sequence[str], conditions: Conditions) -> list[Entry]:
    """Return the rows of a table that are to be run.

    Args:
        patterns: of rows' ids; empty for all rows.

    Raises:
        ValueError: if a line has a setting that its making does not.
    """
    found = []
    for row in table.selected(patterns):
        try:
            found.append(Entry(row, making_of(row, table, conditions), row.task, conditions))
        except (TypeError, ValueError) as error:
            raise ValueError(f"table '{table.name}', row {row.id}: {error}") from error
    return found


def making_of(row: Row, table: Table, conditions: Conditions) -> Making:
    """Return how the model of one of a table's rows is made.

    Raises:
        TypeError, ValueError: if a setting is unknown or wrong.
    """
    if row.line.make not in _MAKERS:
        raise ValueError(f"unknown make '{row.line.make}'; choose one of {', '.join(_MAKERS)}")
    settings = dict(row.line.settings)
    if row.line.make == "merge":  # one model for all of its tasks
        settings["tasks"] = [
            other.task.name for other in table.rows if (other.line, other.model) == (row.line, row.model)
        ]
    return _MAKERS[row.line.make](row, conditions, settings)


def _finetuned(model: Model, conditions: Conditions) -> str | None:
    return conditions.replaced.get(model.name, model.finetuned)


def _stored_base(row: Row, conditions: Conditions, settings: dict[str, Any]) -> Making:
    return Stored(row.model.base, row.model.name, **settings)


def _stored_finetune(row: Row, conditions: Conditions, settings: dict[str, Any]) -> Making:
    return Stored(_finetuned(row.model, conditions), row.model.name, **settings)


def _compressed(row: Row, conditions: Conditions, settings: dict[str, Any]) -> Making:
    finetuned = _finetuned(row.model, conditions)
    if finetuned is None:
        return _stored_finetune(row, conditions, {})  # which says what it needs
    fields = {**settings.pop("method"), "seed": SEED, **row.line.of_model.get(row.model.name, {})}
    method = method_class(fields.pop("name"))(**fields)
    return Compressed((row.model.base, finetuned), method, **settings)


def _merged(row: Row, conditions: Conditions, settings: dict[str, Any]) -> Making:
    if not row.model.merges:
        raise ValueError(f"model '{row.model.name}' merges nothing")
    searched: dict[str, Any] = {name: tuple(settings.pop(name, ())) for name in ("lambdas", "trims", "densities")}
    return Merged(
        row.model.base, {model.name: _finetuned(model, conditions) for model in row.model.merges},
        settings.pop("merge_method"), settings.pop("parameters", {}), **searched,
        validation={task: _text(conditions, "validation", task) for task in settings.pop("tasks")}, **settings,
    )  # fmt: skip


def _pruned(row: Row, conditions: Conditions, settings: dict[str, Any]) -> Making:
    name = row.task.name
    return Pruned(row.model.base, name, _text(conditions, "train", name), **settings)


def _unavailable(row: Row, conditions: Conditions, settings: dict[str, Any]) -> Making:
    return Unavailable()


_MAKERS: dict[str, Callable[[Row, Conditions, dict[str, Any]], Making]] = {
    "base": _stored_base,
    "fine-tuned": _stored_finetune,
    "compress": _compressed,
    "merge": _merged,
    "prune": _pruned,
    "none": _unavailable,
}


def _text(conditions: Conditions, purpose: str, task: str) -> str | None:
    """Return the path of a task's text; None if it is not there."""
    if purpose in conditions.one_text:
        return conditions.one_text[purpose]
    if conditions.texts is None:
        return None
    paths = [os.path.join(conditions.texts, purpose, task + ending) for ending in _TEXT_TYPES]
    return next((path for path in paths if os.path.isfile(path)), None)
