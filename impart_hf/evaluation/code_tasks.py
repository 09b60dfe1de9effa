"""Tasks of lm-eval that execute the programs that a model writes, such as humaneval and mbpp.

Their files ask HF evaluate for its metric "code_eval", which is downloaded and runs programs in a process with all of
the user's rights. While they are loaded, `sandboxed_code_eval` gives them one with the same interface and the same
results, whose programs run in a `Sandbox`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .sandbox import Outcome, Sandbox

METRIC = "code_eval"
# They execute programs in lm-eval's own process or with its rights, by code of their own, and do not say so.
_UNMARKED = ("cruxeval",)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of the probability that one of k programs is correct.

    It is 1 - C(samples - correct, k) / C(samples, k): Chen et al. 2021 (arXiv 2107.03374), equation 1.

    Args:
        samples: number of programs; at least k.
        correct: number of correct ones among them.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


class SandboxedCodeEval:
    """HF evaluate's metric "code_eval", with programs that run in a sandbox.

    A program that has been run is not run again. lm-eval keeps the files of its tasks, and with them this object, until
    the process ends, so its sandbox can be replaced.
    """

    def __init__(self, sandbox: Sandbox):
        self._sandbox = sandbox
        self._outcomes: dict[str, Outcome] = {}
        self._asked: list[str] | None = None

    def use(self, sandbox: Sandbox) -> None:
        """Run programs in this sandbox from now on."""
        if sandbox is not self._sandbox:
            self._sandbox, self._outcomes = sandbox, {}

    def compute(
        self, predictions: Sequence[Sequence[str]], references: Sequence[str], k: Sequence[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """Run each candidate with its tests.

        Args:
            predictions: the candidates of each problem.
            references: the tests of each problem.
            k: numbers of candidates.

        Returns:
            "pass@k" for each k for which every problem has enough candidates, as shares of 1; and the outcome of each
            candidate, by number of problem.

        Raises:
            SandboxError: if the machine stops a program from starting.
        """
        problems = [
            [f"{candidate}\n{tests}" for candidate in candidates]
            for candidates, tests in zip(predictions, references, strict=True)
        ]
        if self._asked is None:
            self.run([program for programs in problems for program in programs])
            outcomes = self._outcomes
        else:
            self._asked += [program for programs in problems for program in programs]
            outcomes = defaultdict(lambda: Outcome(False))
        found = [[outcomes[program] for program in programs] for programs in problems]
        scores = {
            f"pass@{count}": sum(pass_at_k(len(one), sum(o.passed for o in one), count) for one in found) / len(found)
            for count in ([k] if isinstance(k, int) else k)
            if all(len(one) >= count for one in found)
        }
        return scores, {problem: list(enumerate(map(_result, one))) for problem, one in enumerate(found)}

    def run(self, programs: Sequence[str]) -> None:
        """Run those of the programs that have not been run, side by side."""
        new = [program for program in dict.fromkeys(programs) if program not in self._outcomes]
        self._outcomes.update(zip(new, self._sandbox.run_all(new), strict=True))

    @contextmanager
    def collected(self) -> Iterator[list[str]]:
        """Within this context, `compute` runs nothing; what it would run is collected."""
        self._asked = []
        try:
            yield self._asked
        finally:
            self._asked = None


def _result(outcome: Outcome) -> dict[str, Any]:
    return {"passed": outcome.passed, "result": "passed" if outcome.passed else f"failed: {outcome.reason}"}


class CodeNotAllowedError(ValueError):
    """A task executes programs, and none may run."""

    def __init__(self, task: str):
        super().__init__(
            f"task '{task}' executes the programs that the model writes: allow it with --allow-code isolated "
            "(allow_code='isolated')"
        )


@contextmanager
def sandboxed_code_eval(name: str, sandbox: Sandbox | None) -> Iterator[None]:
    """Within this context, what asks HF evaluate for "code_eval" gets a `SandboxedCodeEval`.

    Args:
        name: what is loaded in it.
        sandbox: where programs run; None if none may.

    Raises:
        CodeNotAllowedError: in the context, if "code_eval" is asked for and no programs may run.
    """
    import evaluate

    load = evaluate.load

    def load_ours(path: str, *args: Any, **options: Any) -> Any:
        if path != METRIC:
            return load(path, *args, **options)
        if sandbox is None:
            raise CodeNotAllowedError(name)
        return SandboxedCodeEval(sandbox)

    evaluate.load = load_ours
    try:
        yield
    finally:
        evaluate.load = load


def confine(name: str, task: Any, sandbox: Sandbox | None) -> None:
    """Let the programs of a loaded task run in a sandbox, side by side before lm-eval asks for one after the other.

    Args:
        name: the task's name.
        task: a task of lm-eval, loaded in `sandboxed_code_eval`; if it executes code, its method `apply_filters` is
            replaced.
        sandbox: where programs run; None if none may.

    Raises:
        CodeNotAllowedError: if the task executes code and none may run.
        ValueError: if it does so in a way of its own, which cannot be confined.
    """
    metric = _metric_of(task)
    if metric is None and not getattr(task, "UNSAFE_CODE", False) and not name.startswith(_UNMARKED):
        return
    if sandbox is None:
        raise CodeNotAllowedError(name)
    if metric is None:
        raise ValueError(f"task '{name}' executes programs by code of its own, which cannot be confined: leave it out")
    apply_filters: Callable[[], Any] = task.apply_filters

    def apply_filters_and_run() -> Any:
        result = apply_filters()
        metric.use(sandbox)
        questions: dict[int, list[Any]] = defaultdict(list)
        for instance in sorted(task.instances, key=lambda instance: instance.idx):
            questions[instance.doc_id].append(instance)
        with metric.collected() as programs:
            for instances in questions.values():
                for key in instances[0].filtered_resps:
                    task.process_results(instances[0].doc, [one.filtered_resps[key] for one in instances])
        metric.run(programs)
        return result

    task.apply_filters = apply_filters_and_run


def _metric_of(task: Any) -> SandboxedCodeEval | None:
    """The stand-in that a task's functions use: a global of the file that defines them."""
    functions = [entry.get("metric") for entry in task.get_config("metric_list") or []]
    for function in [*functions, task.get_config("process_results")]:
        for value in getattr(function, "__globals__", {}).values():
            if isinstance(value, SandboxedCodeEval):
                return value
    return None
