"""Finished tasks as files, so that a run which was interrupted continues: one JSON file a model, task and settings."""

import functools
import hashlib
import inspect
import json
import os
import platform
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from ..common import processes
from ..common.files import OutputError, atomic_write, write_json
from ..common.names import public_name
from ..common.version import __version__, package_version
from ..modeling.model_files import CheckpointError, HubOptions, pinned, read_json
from ..storage.folder_lock import FolderLock
from .task_scores import TaskScore, TaskSettings

# Files whose content is part of a model's identity; of weights, which are large, it is size and time of change.
_SMALL = (".json", ".jinja", ".txt", ".model", ".py")
_WEIGHTS = (".safetensors", ".bin")
_ANSWERS = "answers.db"
_PACKAGES = ("torch", "transformers", "datasets", "vllm")


def model_identity(source: str, revision: str | None) -> dict[str, str]:
    """Return what tells a model from others: its commit on the Hub, or a checksum of a local folder.

    The checksum is over the names and contents of configuration and tokenizer files, and over the names, sizes and
    times of change of weight files, which are not read. A delta's base is not in it: the delta knows it by checksums.
    """
    if not os.path.isdir(source):
        return {"repository": source, "commit": str(pinned(source, HubOptions(revision)).revision)}
    digest = hashlib.sha256()
    for path in sorted(Path(source).iterdir()):
        if path.suffix in _SMALL and path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}\n".encode() + content)
        elif path.suffix in _WEIGHTS:
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return {"folder": public_name(source), "sha256": digest.hexdigest()}


def task_identity(task: Any, settings: TaskSettings) -> dict[str, Any]:
    """Return what tells a task with its data and settings from others.

    Args:
        task: a loaded task of lm-eval, with the settings in its configuration.
        settings: of them, those that no part of the task's configuration holds.
    """
    given = asdict(settings)
    for name in (
        "batch_size",
        "data_dir",
        "allow_code",
        "num_fewshot",
        "gen_kwargs",
        "alpaca",
    ):  # no part, or in the task's
        given.pop(name)
    count = None if settings.limit is None or settings.limit < 1 else int(settings.limit)
    digest = hashlib.sha256()
    for document in islice(task.eval_docs, count):
        digest.update(_canonical(document).encode())
    if task.get_config("num_fewshot"):
        for document in task.fewshot_docs():
            digest.update(_canonical(document).encode())
    return {
        "task": task.task_name,
        "version": str(task.VERSION),
        "configuration_sha256": hashlib.sha256(configuration(task).encode()).hexdigest(),
        "documents_sha256": digest.hexdigest(),
        "num_fewshot": task.get_config("num_fewshot"),
        "generation_kwargs": task.get_config("generation_kwargs"),
        **given,
        "lm_eval": package_version("lm_eval"),
        "impart_hf": __version__,
    }


def configuration(task: Any) -> str:
    """Return all that a task of lm-eval is made of but its data, as text that is the same in each run."""
    config = task.config.to_dict(keep_callable=True)
    (config.get("metadata") or {}).pop("config_source", None)  # a path
    task_class: type = type(task)
    return _canonical([config, _class_source(task_class)])


@functools.cache
def _class_source(task_class: type) -> Any:
    """As `_source`, once: to find a class, Python parses the whole of its file."""
    return _source(task_class)


def results_folder(folder: str | Path) -> Path:
    """Return a folder for results, which is made with the first of them.

    Raises:
        OutputError: if it is a file.
    """
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise OutputError(f"'{folder}' is not a folder, and results are to be written there")
    return Path(folder)


class FinishedTask:
    """The file of a model's task with its settings."""

    def __init__(self, folder: Path, source: str, measured: Mapping[str, Any]):
        """Name the file.

        Args:
            folder: that of all results.
            source: the model's folder or Hub id.
            measured: all on which the scores depend: "model", "task" and how the model is loaded.
        """
        key = hashlib.sha256(_canonical(measured).encode()).hexdigest()[:16]
        task, model = measured["task"]["task"], public_name(source).replace("/", "__")
        self._path = folder / _file_name(model) / f"{_file_name(task)}-{key}.json"
        self._measured = measured

    def read(self) -> list[TaskScore] | None:
        """Return the scores; None if the task is not finished.

        Raises:
            CheckpointError: if the file is damaged.
        """
        if not self._path.is_file():
            return None
        try:
            return [TaskScore(**score) for score in read_json(self._path)["scores"]]
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._path} holds no scores of a task: delete it, and the task is run again"
            ) from error

    def write(self, scores: list[TaskScore], run: Mapping[str, Any]) -> None:
        """Write the file, whole or not at all.

        Args:
            scores: the task's scores.
            run: what else there is to know of the run.
        """
        versions = {"python": platform.python_version(), **{name: package_version(name) for name in _PACKAGES}}
        content = {
            "scores": [score.to_dict() for score in scores],
            "measured": self._measured,
            "run": {**run, "versions": {name: found for name, found in versions.items() if found}},
        }
        with atomic_write(self._path) as temporary:
            write_json(temporary, content)

    @contextmanager
    def kept_answers(self, lm: Any) -> Iterator[Any]:
        """Within this context, what a model of lm-eval answers is kept in a file, and not asked for again.

        The file, a cache of lm-eval's, is of this model, task and settings alone. It is removed at the end, unless the
        work is interrupted. Each process of a job has one, in a folder that it locks.

        Raises:
            OutputError: if another job is at this task, or the file is damaged or cannot be written.
        """
        from lm_eval.api.model import CacheHook

        from .kept_answers import KeptAnswers

        folder = self._path.with_suffix(f".answers-{processes.number()}")
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
        if not lock.take():
            raise OutputError(f"another process works on {self._path}: wait for it, or keep results elsewhere")
        try:
            caching = KeptAnswers(lm, str(folder / _ANSWERS))
            try:
                yield caching
            finally:
                caching.dbdict.close()
                lm.set_cache_hook(CacheHook(None))
        except sqlite3.Error as error:
            raise OutputError(f"answers cannot be kept in {folder / _ANSWERS}, delete it: {error}") from error
        finally:
            lock.release()
        for left in folder.parent.glob(f"{self._path.stem}.answers-*"):  # also of an interrupted job of more processes
            lock = FolderLock(left)
            if lock.take():
                lock.remove_folder()


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=_source)


def _source(value: Any) -> Any:
    """Return what tells whether a function has changed: the file that defines it, whose other functions it may call.

    Of what has none it is the name, without the address that differs from run to run.
    """
    if isinstance(value, functools.partial):
        return [_source(value.func), value.args, value.keywords]
    try:
        file = inspect.getsourcefile(value)
        content = Path(file).read_bytes() if file else b""
        return [inspect.getsource(value), hashlib.sha256(content).hexdigest()]
    except (TypeError, OSError):
        return str(getattr(value, "__qualname__", value))
