"""Tasks of lm-eval found by name, group, tag or YAML file, and loaded with their data."""

import difflib
import functools
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import alpaca
from .code_tasks import CodeNotAllowedError, confine, sandboxed_code_eval
from .local_data import local_data
from .sandbox import Sandbox, SandboxError
from .task_results import configuration
from .task_scores import TaskScore, TaskSettings, metrics_of, scores_of

_YAML = (".yaml", ".yml")


@dataclass
class RequestedTask:
    """What a name stands for.

    Attributes:
        name: a task's, group's or tag's name, or the path of a YAML file.
        tasks: its tasks of lm-eval by name; one if it is a task.
        groups: the groups in it, by name.
    """

    name: str
    tasks: dict[str, Any]
    groups: dict[str, Any]

    def group_scores(self, scores: Mapping[str, list[TaskScore]]) -> list[TaskScore]:
        """Return the scores of its groups, as lm-eval makes them of their tasks'.

        Args:
            scores: the scores of all of its tasks, by name.
        """
        metrics = {task: metrics_of(found) for task, found in scores.items()}
        found = []
        for group in self.groups.values():
            inside = [score for task in group.get_all_tasks() for score in scores[task.task_name]]
            shots = {score.num_fewshot for score in inside}
            better: dict[str, bool | None] = {}
            for score in inside:
                same = better.setdefault(score.metric, score.higher_is_better) == score.higher_is_better
                better[score.metric] = score.higher_is_better if same else None
            found += scores_of(
                group.aggregate(metrics),
                task=group.name,
                higher_is_better=better,
                num_fewshot=shots.pop() if len(shots) == 1 else None,
                version=group.version,
            )
        return found


def load_tasks(names: Sequence[str], settings: TaskSettings, results: Path | None = None) -> list[RequestedTask]:
    """Find tasks, load their data, and set what `settings` say of them.

    Args:
        names: tasks, groups and tags of lm-eval, YAML files of tasks, and alpaca_eval.
        settings: `num_fewshot`, `gen_kwargs`, `data_dir`, `allow_code`, `apply_chat_template` and `alpaca` are used.
        results: folder that keeps the verdicts of a judge; None for none.

    Raises:
        ModuleNotFoundError: if lm-eval, or what a task imports, is not installed.
        ValueError: if there is no such task, its data cannot be loaded, it executes code and that is not allowed, or
            cannot be confined.
        SandboxError: if code cannot be confined on this machine as it is to be.
        OSError: if a file of alpaca_eval cannot be read.
    """
    if not names:
        raise ValueError("there is no task: give at least one")
    try:
        import lm_eval.tasks  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("running tasks needs lm-eval: pip install 'impart-hf[eval]'") from error
    manager = _task_manager(not all(name == alpaca.TASK or name.endswith(_YAML) for name in names))
    sandbox = None if settings.allow_code is None else Sandbox(settings.allow_code)
    requested = []
    for name in dict.fromkeys(names):
        if name == alpaca.TASK:
            requested.append(RequestedTask(name, {name: _alpaca_task(settings, results)}, {}))
            continue
        _check_name(manager, name)
        if sandbox is None and (code := executing_code(manager, name)):
            raise CodeNotAllowedError(code[0])
        requested.append(_load(manager, name, settings, sandbox))
    tasks = [task for found in requested for task in found.tasks.values()]
    _refuse_without_effect(tasks, settings)
    for task in tasks:
        _configure(task, settings)
    _refuse_one_name(requested)
    return requested


def _refuse_one_name(requested: Sequence[RequestedTask]) -> None:
    """Refuse two tasks of one name that ask otherwise, as a group has a task with examples of its own."""
    known: dict[str, tuple[RequestedTask, Any]] = {}
    for request in requested:
        for name, task in request.tasks.items():
            config = configuration(task)
            other, before = known.setdefault(name, (request, config))
            if config != before:
                raise ValueError(
                    f"'{other.name}' and '{request.name}' have two different tasks '{name}': run one after the other"
                )


@functools.cache
def _task_manager(with_own_tasks: bool) -> Any:
    """Return lm-eval's index of tasks; that of its own ones takes it ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_own_tasks)


def _check_name(manager: Any, name: str) -> None:
    if name in manager.task_index:
        return
    if name.endswith(_YAML):
        if os.path.isfile(name) and re.search("^group:", Path(name).read_text("utf-8"), re.MULTILINE):
            raise ValueError(f"'{name}' is the file of a group, which lm-eval does not load: give its tasks' files")
        return
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise ValueError(f"lm-eval has no task, group or tag '{name}', and it is no YAML file{hint}")


def executing_code(manager: Any, name: str) -> list[str]:
    """Return the tasks of lm-eval in a task, group or tag that say that they execute code, before they are loaded."""
    entry = manager.task_index.get(name)
    if entry is None:
        return []
    config = entry.cfg or {}
    members = _members(config.get("task")) if config else sorted(entry.tags)
    found = [name] if config.get("unsafe_code") else []
    return found + [task for member in members if member != name for task in executing_code(manager, member)]


def _members(entries: Any) -> list[str]:
    """Return the names in a group's list, whose entries may be groups with lists of their own."""
    if isinstance(entries, Mapping):
        entries = entries.get("task")
    if isinstance(entries, list):
        return [name for entry in entries for name in _members(entry)]
    return [entries] if isinstance(entries, str) else []


def _alpaca_task(settings: TaskSettings, results: Path | None) -> Any:
    if settings.alpaca is None:
        raise ValueError(
            f"task '{alpaca.TASK}' needs a judge and instructions: --judge URL --judge-model NAME --instructions FILE"
        )
    if not settings.apply_chat_template:
        raise ValueError(f"task '{alpaca.TASK}' asks for the answers of a chat: add --apply-chat-template")
    with lm_eval_says_less():
        verdicts = None if results is None else results / f"{alpaca.TASK}-verdicts.jsonl"
        return alpaca.alpaca_task(settings.alpaca, verdicts)


def _load(manager: Any, name: str, settings: TaskSettings, sandbox: Sandbox | None) -> RequestedTask:
    data = nullcontext() if settings.data_dir is None else local_data(settings.data_dir)
    try:
        with data, sandboxed_code_eval(name, sandbox), lm_eval_says_less():
            loaded = manager.load([name])
    except (CodeNotAllowedError, SandboxError):
        raise
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"task '{name}' needs a package that is not installed, many of which come with "
            f"pip install 'lm-eval[ifeval,math]': {error}"
        ) from error
    except Exception as error:  # tasks run code and load data of third parties, which can raise anything
        raise ValueError(f"task '{name}' cannot be loaded, check its name and its data: {error}") from error
    for task_name, task in loaded["tasks"].items():
        confine(task_name, task, sandbox)
    return RequestedTask(name, loaded["tasks"], loaded.get("groups", {}))


def _refuse_without_effect(tasks: Sequence[Any], settings: TaskSettings) -> None:
    """Refuse settings that none of the tasks follows."""
    if settings.num_fewshot and all(_has_no_examples(task) for task in tasks):
        raise ValueError(
            "num_fewshot has no effect: these tasks have no examples, or have them in their text; leave it out"
        )
    if settings.gen_kwargs and not any(map(_generates, tasks)):
        raise ValueError("gen_kwargs has no effect: none of these tasks lets the model generate; leave it out")


def _has_no_examples(task: Any) -> bool:
    return task.get_config("num_fewshot") == 0


def _generates(task: Any) -> bool:
    return task.get_config("output_type") == "generate_until"


def _configure(task: Any, settings: TaskSettings) -> None:
    """Set the number of examples and the arguments of generation, as lm-eval's own command does."""
    if settings.num_fewshot is not None and not _has_no_examples(task):
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    if not _generates(task):
        return
    if settings.gen_kwargs:
        task.set_config(key="generation_kwargs", value=dict(settings.gen_kwargs), update=True)
    arguments = task.get_config("generation_kwargs") or {}
    if arguments.get("temperature"):
        # Otherwise models sample all the same, but kept answers would be taken for those of further samples.
        arguments.setdefault("do_sample", True)
        if not arguments["do_sample"] and "temperature" in (settings.gen_kwargs or {}):
            raise ValueError(
                f"temperature={arguments['temperature']} has no effect on task '{task.config.task}', which does not "
                "sample: add do_sample=true"
            )


@contextmanager
def lm_eval_says_less() -> Iterator[None]:
    """Within this context, lm-eval logs errors alone: its warnings are about settings that are meant."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
