"""Finished tasks are not run again, and one that was interrupted continues where it was."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.lm_eval_task import write_reciting_task, write_task
from support.messages import naming
from support.tiny_models import Pair, edit_json

from impart_hf import __version__
from impart_hf.common.files import OutputError
from impart_hf.evaluation import models as evaluated_models
from impart_hf.evaluation.kept_answers import KeptAnswers
from impart_hf.evaluation.task_loading import load_tasks
from impart_hf.evaluation.task_results import FinishedTask, configuration, model_identity
from impart_hf.evaluation.tasks import TaskScore, TaskSettings, evaluate_tasks


@pytest.fixture
def reciting(tmp_path: Path) -> Path:
    (tmp_path / "reciting").mkdir()
    return write_reciting_task(tmp_path / "reciting", {f"Question {i}": "no" for i in range(4)})


class Calls:
    """How often models were loaded and called; the call after `most` is interrupted."""

    def __init__(self) -> None:
        self.loads = self.calls = 0
        self.most: float = float("inf")

    def count(self, *_: Any) -> None:
        if self.calls >= self.most:
            raise KeyboardInterrupt
        self.calls += 1

    def since(self) -> tuple[int, int]:
        """Loads and calls since this was asked last."""
        found = self.loads, self.calls
        self.loads = self.calls = 0
        return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted, load = Calls(), evaluated_models.load

    def counting(*args: Any, **options: Any) -> Any:
        counted.loads += 1
        model = load(*args, **options)
        model.register_forward_pre_hook(counted.count)
        return model

    monkeypatch.setattr(evaluated_models, "load", counting)
    return counted


def files_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_finished_tasks_are_not_run_again(
    task: Path, reciting: Path, tiny_pair: Pair, tmp_path: Path, calls: Calls
) -> None:
    results, model = tmp_path / "results", str(tiny_pair.base)
    first = evaluate_tasks(model, [str(task)], results=results)
    assert calls.since()[0] == 1
    before = files_of(results)
    assert [path.parent.name for path in before] == ["base"] and len(before) == 1
    both = evaluate_tasks(model, [str(task), str(reciting)], results=results)
    assert both[:1] == first and len(both) == 3
    loads, made = calls.since()
    assert loads == 1 and made == 8, "the task that generates, eight tokens of four answers at once"
    after = files_of(results)
    assert len(after) == 2 and before.items() <= after.items()
    assert evaluate_tasks(model, [str(reciting), str(task)], results=results) == both[1:] + first
    assert calls.since() == (0, 0) and files_of(results) == after


def test_what_a_file_says(task: Path, tiny_repository: Path, tmp_path: Path) -> None:
    settings = TaskSettings(limit=6, num_fewshot=1)
    scores = evaluate_tasks(str(tiny_repository), [str(task)], settings, dtype=torch.float32, results=tmp_path)
    (path,) = files_of(tmp_path)
    found = json.loads(path.read_text("utf-8"))
    assert [TaskScore(**score) for score in found["scores"]] == scores
    measured = found["measured"]
    assert measured["model"]["folder"] == tiny_repository.name and len(measured["model"]["sha256"]) == 64
    assert (measured["backend"], measured["dtype"]) == ("hf", "float32")
    assert measured["task"] | {"task": "going_on", "limit": 6, "num_fewshot": 1, "seed": 1234} == measured["task"]
    assert measured["task"]["impart_hf"] == __version__ and "lm_eval" in measured["task"]
    assert {"python", "torch", "transformers"} <= set(found["run"]["versions"]) and found["run"]["batch_size"] == 8
    assert str(tmp_path) not in path.read_text("utf-8"), "the machine's folders are no part of it"


TASK_CLASS = """
from lm_eval.api.task import ConfigurableTask

class Backwards(ConfigurableTask):
    def __init__(self, config=None, **options):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def doc_to_text(self, doc, *args):
        return doc["question"][::-1]
"""


@pytest.mark.parametrize(
    "change", ["settings", "dtype", "config", "weights", "tokenizer", "documents", "configuration", "function", "class"]
)
def test_what_is_measured_anew(change: str, pair: Pair, tmp_path: Path, calls: Calls) -> None:
    (tmp_path / "task").mkdir()
    task, settings, dtype = write_task(tmp_path / "task"), TaskSettings(limit=4), torch.float32
    functions = task.parent / "functions.py"
    functions.write_text(
        "def text(question): return begin(question)\ndef begin(question): return question['question']\n"
    )
    given = task.read_text("utf-8").replace('"{{question}}"', "!function functions.text")
    task.write_text(given, "utf-8")
    evaluate_tasks(str(pair.base), [str(task)], settings, dtype=dtype, results=tmp_path / "results")
    assert calls.since()[0] == 1
    if change == "settings":
        settings = TaskSettings(limit=4, num_fewshot=1)
    elif change == "dtype":
        dtype = torch.bfloat16
    elif change == "config":
        edit_json(pair.base / "config.json", rms_norm_eps=1e-3)
    elif change == "weights":
        (pair.base / "model.safetensors").unlink()
        shutil.copy(pair.finetuned / "model.safetensors", pair.base)
    elif change == "tokenizer":
        edit_json(pair.base / "tokenizer_config.json", add_bos_token=True)
    elif change == "documents":
        lines = (task.parent / "examples.jsonl").read_text("utf-8").splitlines()
        (task.parent / "examples.jsonl").write_text("\n".join(lines[::-1]) + "\n", "utf-8")
    elif change == "class":
        own = task.parent / "own_class.py"
        own.write_text(TASK_CLASS, "utf-8")
        task.write_text(f"{task.read_text('utf-8')}class: !function own_class.Backwards\n", "utf-8")
        shutil.rmtree(tmp_path / "results")
        evaluate_tasks(str(pair.base), [str(task)], settings, dtype=dtype, results=tmp_path / "results")
        calls.since()
        own.write_text(TASK_CLASS.replace("[::-1]", "[::-2]"), "utf-8")
    elif change == "function":  # one that the task's own calls
        functions.write_text(functions.read_text("utf-8").replace("['question']", "['question'][:9]"), "utf-8")
    else:
        task.write_text(task.read_text("utf-8").replace("answer\n", "1\n"), "utf-8")
    evaluate_tasks(str(pair.base), [str(task)], settings, dtype=dtype, results=tmp_path / "results")
    assert calls.since()[0] == 1 and len(files_of(tmp_path / "results")) == 2


def test_what_is_no_part_of_a_measurement(task: Path, tiny_pair: Pair, tmp_path: Path, calls: Calls) -> None:
    """Another number of requests at a time, and the same model at another place."""
    moved = Path(shutil.copytree(tiny_pair.base, tmp_path / "other" / tiny_pair.base.name))
    status = (tiny_pair.base / "model.safetensors").stat()
    os.utime(moved / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    (moved / "README.md").write_text("Scores may stand here.\n")
    results = tmp_path / "results"
    first = evaluate_tasks(str(tiny_pair.base), [str(task)], results=results)
    second = evaluate_tasks(str(moved), [str(task)], TaskSettings(batch_size=3), results=results)
    assert second == first and calls.since()[0] == 1


@pytest.mark.parametrize("name", ["choice", "generation"])
def test_an_interrupted_task_continues(
    name: str, task: Path, reciting: Path, tiny_pair: Pair, tmp_path: Path, calls: Calls
) -> None:
    path, settings = {"choice": task, "generation": reciting}[name], TaskSettings(batch_size=1)
    run: Callable[[], list[TaskScore]] = lambda: evaluate_tasks(  # noqa: E731
        str(tiny_pair.base), [str(path)], settings, dtype=torch.float32, results=tmp_path / "results"
    )
    expected = evaluate_tasks(str(tiny_pair.base), [str(path)], settings, dtype=torch.float32)
    whole = calls.since()[1]
    calls.most = whole // 2
    with pytest.raises(KeyboardInterrupt):
        run()
    (answers,) = (tmp_path / "results").rglob("*.db")
    shutil.copytree(answers.parent, str(answers.parent).replace("answers-0", "answers-1"))  # of a job's second process
    calls.most = float("inf")
    calls.since()
    assert run() == expected
    # What was interrupted in its midst is asked again: a choice is one call, an answer eight.
    assert calls.since()[1] <= whole - whole // 2 + 8
    (model,) = (tmp_path / "results").iterdir()
    assert [found.suffix for found in model.iterdir()] == [".json"], "the answers are not kept"


class OneOfTwo:
    """A model of lm-eval in a job of two processes, which do a step of each call together."""

    world_size = 2

    def __init__(self) -> None:
        self.asked: list[int] = []

    def set_cache_hook(self, hook: Any) -> None:
        pass

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        self.asked.append(len(requests))
        return [-float(len(request.args[0])) for request in requests]


def test_a_process_that_has_all_answers_still_takes_part(tmp_path: Path) -> None:
    requests = [SimpleNamespace(args=("a" * length,)) for length in (3, 5)]
    for asked in ([2], [1]):  # whose answers are all there, asks for one again
        model = OneOfTwo()
        answering = KeptAnswers(model, str(tmp_path / "answers.db"))
        assert answering.loglikelihood_rolling(requests) == [-3, -5]
        assert model.asked == asked
        answering.dbdict.close()
    lone = OneOfTwo()
    lone.world_size = 1
    answering = KeptAnswers(lone, str(tmp_path / "answers.db"))
    assert answering.loglikelihood_rolling(requests) == [-3, -5] and lone.asked == []
    answering.dbdict.close()


class NoModel:
    """What a cache of lm-eval needs of a model that is not asked."""

    def set_cache_hook(self, hook: Any) -> None:
        self.hook = hook


def test_two_runs_of_one_task_with_one_folder(tmp_path: Path) -> None:
    first, second = (FinishedTask(tmp_path, "model", {"task": {"task": "a"}}) for _ in range(2))
    other = FinishedTask(tmp_path, "model", {"task": {"task": "b"}})
    with first.kept_answers(NoModel()), other.kept_answers(NoModel()):
        with pytest.raises(OutputError, match=naming(tmp_path, "another process")):
            with second.kept_answers(NoModel()):
                pytest.fail("both write to one file")
    with second.kept_answers(NoModel()):
        pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the database's own thread
def test_damaged_answers_are_named(tmp_path: Path) -> None:
    task = FinishedTask(tmp_path, "model", {"task": {"task": "a"}})
    with pytest.raises(KeyboardInterrupt), task.kept_answers(NoModel()):
        raise KeyboardInterrupt
    (answers,) = tmp_path.rglob("*.db")
    answers.write_bytes(b"no database" * 100)
    with pytest.raises(OutputError, match=naming(answers, "delete")):
        with task.kept_answers(NoModel()) as answering:
            len(answering.dbdict)


def test_a_damaged_file_is_named(task: Path, tiny_pair: Pair, tmp_path: Path) -> None:
    settings = TaskSettings(limit=2)
    evaluate_tasks(str(tiny_pair.base), [str(task)], settings, results=tmp_path)
    (path,) = files_of(tmp_path)
    for content in ("{", '{"scores": [{"task": "going_on"}]}', '{"scores": 1}', "[]"):
        path.write_text(content)
        with pytest.raises(OSError, match=naming(path)):
            evaluate_tasks(str(tiny_pair.base), [str(task)], settings, results=tmp_path)


def test_functions_with_some_arguments_given_are_recognised(task: Path) -> None:
    """As mmlu_pro has them; without the address that differs from run to run."""
    loaded = next(iter(load_tasks([str(task)], TaskSettings())[0].tasks.values()))
    found = []
    for number in (1, 1, 2):
        loaded.set_config(key="doc_to_text", value=functools.partial(model_identity, revision=str(number)))
        found.append(configuration(loaded))
    assert found[0] == found[1] != found[2] and " at 0x" not in found[0]


def test_identity_of_a_delta(repository: Path) -> None:
    """Of the same size, another content of the delta file is another model: its time of change tells."""
    before = model_identity(str(repository), None)
    (path,) = repository.glob("*.safetensors")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert model_identity(str(repository), None) != before
