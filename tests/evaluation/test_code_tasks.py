"""lm-eval's own tasks that execute code, in the sandbox: their scores are known, as the answers are."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evaluate
import pytest
from support.code_tasks import HUMANEVAL, MBPP, ScriptedModel, usable_isolation, write_code_task
from support.messages import naming

from impart_hf.evaluation.code_tasks import (
    CodeNotAllowedError,
    SandboxedCodeEval,
    confine,
    pass_at_k,
    sandboxed_code_eval,
)
from impart_hf.evaluation.sandbox import Limits, Outcome, Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are confined on Linux alone")


class CountingSandbox(Sandbox):
    """Says how many programs it ran together each time."""

    together: list[int]

    def run_all(self, programs: Sequence[str]) -> list[Outcome]:
        self.together = [*getattr(self, "together", []), *([len(programs)] if programs else [])]
        return super().run_all(programs)


@pytest.fixture
def sandbox() -> CountingSandbox:
    """A new one; what is tested here does not depend on namespaces."""
    return CountingSandbox(usable_isolation(), Limits(seconds=30))


@pytest.mark.parametrize("samples, correct, k", [(5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 5), (6, 1, 6), (7, 3, 5)])
def test_pass_at_k_is_the_share_of_choices_with_a_correct_program(samples: int, correct: int, k: int) -> None:
    choices = list(itertools.combinations([i < correct for i in range(samples)], k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_the_interface_of_code_eval(sandbox: CountingSandbox) -> None:
    """Its documented example, with two problems of different numbers of candidates."""
    metric = SandboxedCodeEval(sandbox)
    candidates = [["def add(a, b): return a * b", "def add(a, b): return a + b"]]
    scores, results = metric.compute(references=["assert add(2, 3) == 5"], predictions=candidates, k=[1, 2])
    assert scores == {"pass@1": 0.5, "pass@2": 1.0}
    assert [(number, found["passed"]) for number, found in results[0]] == [(0, False), (1, True)]
    assert results[0][0][1]["result"].startswith("failed: AssertionError") and results[0][1][1]["result"] == "passed"
    tests = ["assert add(2, 3) == 5", "assert add(2, 2) == 4"]
    scores, _ = metric.compute(references=tests, predictions=[candidates[0], candidates[0][:1]])
    assert scores == {"pass@1": 0.75}  # two candidates are too few for the others, one is for pass@2
    assert sum(sandbox.together) == 3  # what has been run is not run again
    with pytest.raises(ValueError):
        metric.compute(references=tests, predictions=candidates)


def loaded(path: Path, sandbox: Sandbox | None) -> Any:
    from lm_eval.tasks import TaskManager

    with sandboxed_code_eval(path.stem, sandbox):
        (task,) = TaskManager(include_defaults=False).load([str(path)])["tasks"].values()
    confine(path.stem, task, sandbox)
    return task


def scores(task: Any, answer: Callable[[str], str]) -> dict[str, float]:
    """What lm-eval makes of a task and a model's answers."""
    from lm_eval import evaluate as evaluate_tasks

    settings = {"bootstrap_iters": 0, "log_samples": False, "confirm_run_unsafe_code": True}
    results = evaluate_tasks(ScriptedModel(answer), {"tasks": {"task": task}}, **settings)
    found = results["results"]["task"]
    return {name.split(",")[0]: value for name, value in found.items()}


def bodies(prompt: str) -> str:
    """Right answers to two of the four problems of HumanEval's kind; two that end the process early."""
    number = next(i for i in range(4) if f"power{i}" in prompt)
    early = {1: "    import os; os._exit(0)", 2: "    raise SystemExit(0)"}
    return early.get(number, HUMANEVAL[number]["canonical_solution"])


@pytest.mark.parametrize("name", ["humaneval", "humaneval_instruct"])
def test_humaneval(name: str, tmp_path: Path, sandbox: CountingSandbox) -> None:
    task = loaded(write_code_task(tmp_path, f"humaneval/{name}.yaml", HUMANEVAL), sandbox)
    ending = "```\nThis is it." if "instruct" in name else ""
    found = scores(task, lambda prompt: bodies(prompt) + ending)
    assert found["pass@1"] == 0.5
    assert sandbox.together[-1] == 4  # in one go


def test_several_samples_of_a_problem(tmp_path: Path, sandbox: CountingSandbox) -> None:
    """humaneval_64 asks 64 times; of each problem's answers 16 are right, and twins are run once."""
    task = loaded(write_code_task(tmp_path, "humaneval/humaneval_64.yaml", HUMANEVAL), sandbox)
    turns = itertools.count()
    found = scores(task, lambda prompt: next_answer(prompt, next(turns)))
    assert {name: found[name] for name in ("pass@2", "pass@16")} == pytest.approx(
        {f"pass@{k}": pass_at_k(64, 16, k) for k in (2, 16)}
    )
    assert sandbox.together[-1] == 8


def next_answer(prompt: str, turn: int) -> str:
    number = next(i for i in range(4) if f"power{i}" in prompt)
    return HUMANEVAL[number]["canonical_solution"] if turn % 4 == 0 else "    return []"


@pytest.mark.parametrize("name", ["mbpp", "mbpp_instruct"])
def test_mbpp(name: str, tmp_path: Path, sandbox: CountingSandbox) -> None:
    task = loaded(write_code_task(tmp_path, f"mbpp/{name}.yaml", MBPP), sandbox)
    # The first word of a block's first line is taken for its language by lm-eval.
    form = "\n{}\n```\nDone." if "instruct" in name else "{}\n"

    def answer(prompt: str) -> str:
        number = next(i for i in range(4) if f"add{i}(0)" in prompt)
        return form.format("import os\nos._exit(0)" if number == 3 else MBPP[number]["code"])

    assert scores(task, answer)["pass_at_1"] == 0.75


def test_nothing_is_executed_unless_it_is_allowed(tmp_path: Path, sandbox: CountingSandbox) -> None:
    """Whether or not lm-eval has already loaded the task's functions, and asked for the metric."""
    path = write_code_task(tmp_path, "mbpp/mbpp.yaml", MBPP)
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.mbpp")]:
        del sys.modules[name]
    for _ in range(2):
        with pytest.raises(CodeNotAllowedError, match=naming("mbpp_here", "--allow-code")):
            loaded(path, None)
        loaded(path, sandbox)


def test_each_task_runs_in_its_own_sandbox(tmp_path: Path, sandbox: CountingSandbox) -> None:
    """Though the two have one file of functions."""
    other = CountingSandbox("unisolated", Limits(seconds=30))
    paths = [write_code_task(tmp_path / name, f"mbpp/{name}.yaml", MBPP) for name in ("mbpp", "mbpp_plus")]
    first, second = loaded(paths[0], sandbox), loaded(paths[1], other)
    for task, where in ((first, sandbox), (second, other), (first, sandbox)):
        before = len(getattr(where, "together", []))
        assert scores(task, lambda prompt: "def add0(x): return x")["pass_at_1"] == 0.25
        assert where.together[before:] == [4]


def test_tasks_that_execute_code_in_their_own_way(tmp_path: Path, sandbox: CountingSandbox) -> None:
    path = write_code_task(tmp_path, "mbpp/mbpp.yaml", MBPP)
    (tmp_path / "own.py").write_text("def score(doc, results):\n    return {'own': eval(results[0])}\n")
    metrics = "metric_list:\n  - metric: own\n    aggregation: mean\n    higher_is_better: true\n"
    path.write_text(path.read_text() + "process_results: !function own.score\n" + metrics)
    with pytest.raises(ValueError, match=naming("mbpp_here")):
        loaded(path, sandbox)
    path.write_text(path.read_text() + "unsafe_code: false\n")
    harmless = loaded(path, None)
    with pytest.raises(ValueError, match=naming("cruxeval_input")):  # does not say that it executes code
        confine("cruxeval_input", harmless, sandbox)


def test_other_metrics_are_left_alone(monkeypatch: pytest.MonkeyPatch, sandbox: CountingSandbox) -> None:
    monkeypatch.setattr(evaluate, "load", lambda path, **options: (path, options))
    original = evaluate.load
    with sandboxed_code_eval("task", sandbox):
        assert evaluate.load("bleu", module_type="metric") == ("bleu", {"module_type": "metric"})
        assert isinstance(evaluate.load("code_eval"), SandboxedCodeEval)
    assert evaluate.load is original
