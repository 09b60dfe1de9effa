"""What is asked of a task of lm-eval, and what it gives: settings and scores."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .alpaca import AlpacaSettings
from .sandbox import Isolation

# Files that a task's YAML file may read
_OF_TASKS = (".yaml", ".yml", ".py", ".json", ".jsonl")


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are run. What is not said here is as in lm-eval.

    Attributes:
        num_fewshot: examples before each question; None for each task's own number. As in lm-eval, a task whose own
            number is 0 keeps it.
        limit: the most questions of a task, or a share of them if less than 1; None for all.
        batch_size: requests at a time, or "auto": as many as memory allows (hf), or the engine's own choice (vllm).
        apply_chat_template: ask each question as a chat, by the tokenizer's template.
        fewshot_as_multiturn: with a chat template, the examples are turns of the chat; else all stand in the user's.
        system_instruction: text that stands before everything; with a chat template, as the system's turn.
        gen_kwargs: arguments of generation that replace a task's own, such as {"max_gen_toks": 512}.
        seed: of the choice of examples, and of sampling. 1234 is lm-eval's own.
        data_dir: folder with the tasks' data sets, for machines without the Hub; see `local_data`.
        allow_code: how tasks run that execute what the model writes, see `sandbox.Sandbox`; None to refuse them.
        alpaca: of the task alpaca_eval; None if it is not run.
        bootstrap_iters: samples by which standard errors are estimated that have no formula; 0 for no standard errors.

    Raises:
        ValueError: if a number is out of range.
    """

    num_fewshot: int | None = None
    limit: int | float | None = None
    batch_size: int | str = 8
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 1234
    data_dir: str | Path | None = None
    allow_code: Isolation | None = None
    alpaca: AlpacaSettings | None = None
    bootstrap_iters: int = 100_000

    def __post_init__(self) -> None:
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot must not be negative, got {self.num_fewshot}")
        if self.batch_size != "auto" and not (isinstance(self.batch_size, int) and self.batch_size >= 1):
            raise ValueError(f"batch_size must be 'auto' or at least 1, got {self.batch_size!r}")
        limit = self.limit
        if limit is not None and not (0 < limit < 1 or (limit >= 1 and float(limit).is_integer())):
            raise ValueError(f"limit must be a whole number from 1 on, or a share between 0 and 1, got {limit}")
        if self.bootstrap_iters < 0:
            raise ValueError(f"bootstrap_iters must not be negative, got {self.bootstrap_iters}")


@dataclass(frozen=True)
class TaskScore:
    """One score of a task, or of a group of tasks.

    Attributes:
        task: the task's name.
        metric, filter: name of the metric, and of the filter that takes the answer from what the model says ("none" if
            it is taken as it is); for alpaca_eval, of the judge.
        value: the metric over all questions.
        stderr: its standard error; None where lm-eval has none.
        higher_is_better: None where the task does not say.
        samples: number of questions.
        num_fewshot: examples before each question; None for a group whose tasks differ.
        version: the task's version in lm-eval.
        dataset: the data set's name on the Hub; empty for files that the task names, and for a group.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    samples: int
    num_fewshot: int | None
    version: str
    dataset: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def scores_of(
    metrics: Mapping[str, Any],
    *,
    task: str,
    higher_is_better: Mapping[str, bool | None],
    num_fewshot: int | None,
    version: Any,
    dataset: str = "",
) -> list[TaskScore]:
    """Return the scores in what lm-eval calls a task's metrics: numbers by "METRIC,FILTER" and "METRIC_stderr,FILTER".

    Args:
        metrics: also has "sample_len", the number of questions, and texts, which are no scores.
        task, higher_is_better, num_fewshot, version, dataset: as for `TaskScore`, by metric.
    """
    found = []
    for key, value in metrics.items():
        metric, comma, name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = metrics.get(f"{metric}_stderr,{name}")
        found.append(
            TaskScore(
                task=task,
                metric=metric,
                filter=name,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
                higher_is_better=higher_is_better.get(metric),
                samples=int(metrics["sample_len"]),
                num_fewshot=num_fewshot,
                version=str(version),
                dataset=dataset,
            )
        )
    return found


def metrics_of(scores: list[TaskScore]) -> dict[str, Any]:
    """Return a task's scores as lm-eval's metrics, the inverse of `scores_of`."""
    metrics: dict[str, Any] = {"sample_len": scores[0].samples} if scores else {}
    for score in scores:
        metrics[f"{score.metric},{score.filter}"] = score.value
        metrics[f"{score.metric}_stderr,{score.filter}"] = "N/A" if score.stderr is None else score.stderr
    return metrics


def task_files(task: str) -> list[Path]:
    """Return a task's YAML file, and the files beside it that it may read; none of a task that has a name."""
    if not os.path.isfile(task):
        return []
    return sorted(path for path in Path(task).parent.iterdir() if path.suffix in _OF_TASKS and path.is_file())
