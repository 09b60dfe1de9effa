"""Evaluation on tasks of lm-eval (EleutherAI's language model evaluation harness)."""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..calibration.text import load_tokenizer
from ..common import processes
from ..modeling.model_files import HubOptions
from .local_data import is_on_hub
from .models import EvaluatedModel, ModelLoader
from .task_loading import RequestedTask, load_tasks
from .task_results import FinishedTask, model_identity, results_folder, task_identity
from .task_scores import TaskScore, TaskSettings, scores_of

__all__ = ["TaskEvaluation", "TaskScore", "TaskSettings", "evaluate_tasks"]


class TaskEvaluation:
    """Evaluates models on tasks that are loaded once.

    Attributes:
        requested: the tasks, as they were asked for.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        settings: TaskSettings | None = None,
        results: Path | None = None,
        progress: bool = False,
    ):
        """Find the tasks and load their data.

        Args:
            tasks: names of tasks, groups and tags of lm-eval, and paths of YAML files.
            settings: how they are run.
            results: folder for finished tasks, which are not run again; None for none.
            progress: show lm-eval's progress bars, on a terminal.

        Raises:
            ModuleNotFoundError, ValueError, OSError: as for `load_tasks`.
            OutputError: if `results` is a file.
        """
        self.settings = settings or TaskSettings()
        self._shows_bars = progress and processes.is_first() and sys.stderr.isatty()
        self._results = None if results is None else results_folder(results)
        with _lm_evals_output(self._shows_bars):
            self.requested: list[RequestedTask] = load_tasks(tasks, self.settings, self._results)
        self._tasks: dict[str, Any] = {name: task for found in self.requested for name, task in found.tasks.items()}

    def first_metric(self) -> tuple[str, bool]:
        """Return the name of the first metric, and whether a higher value is better, for who judges by one number.

        Raises:
            ValueError: if there is more than one task.
        """
        (request, *others), names = self.requested, list(self._tasks)
        if others or request.groups or len(names) > 1:
            raise ValueError(f"task '{request.name}' is a group of tasks: name one of them")
        return next(iter(self._tasks[names[0]].higher_is_better().items()))

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        """Check that a model can be asked as the settings say.

        Raises:
            ValueError: if it has no chat template, and one is to be applied.
        """
        if self.settings.apply_chat_template and not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of '{source}' has no chat template to apply: leave --apply-chat-template out"
            )

    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[TaskScore]:
        """Return the scores of a loaded model; what is kept of finished tasks is neither read nor written.

        Args:
            model: a causal language model, or a `DeltaModel`.
            tokenizer: its tokenizer.
        """
        from .hf_lm import TransformersLM

        lm = TransformersLM(model, tokenizer, self.settings.batch_size)
        return self._all_scores({name: self._run(lm, name) for name in self._tasks})

    def score_source(self, model: EvaluatedModel) -> list[TaskScore]:
        """Return the scores of a model, which is loaded only if a task is not finished."""
        identity = {} if self._results is None else model_identity(model.source, model.revision)
        found = {}
        for name, task in self._tasks.items():
            if self._results is None:
                found[name] = self._run(processes.each(lambda: model.lm(self.settings)), name)
                continue
            measured = {"model": identity, **model.how, "task": task_identity(task, self.settings)}
            file = FinishedTask(self._results, model.source, measured)
            scores = processes.in_first(file.read)
            if scores is None:
                lm, started = processes.each(lambda: model.lm(self.settings)), time.perf_counter()
                with file.kept_answers(lm) as answering:
                    scores = self._run(answering, name)
                run = {"batch_size": self.settings.batch_size, "seconds": round(time.perf_counter() - started, 3)}
                processes.in_first(partial(file.write, scores, run))
            found[name] = scores
        return self._all_scores(found)

    def _all_scores(self, found: Mapping[str, list[TaskScore]]) -> list[TaskScore]:
        """Return the scores of all that was asked for: of each request its groups', then its tasks'."""
        scores: list[TaskScore] = []
        for request in self.requested:
            scores += request.group_scores(found)
            scores += [score for name in request.tasks for score in found[name]]
        return list(dict.fromkeys(scores))

    def _run(self, lm: Any, name: str) -> list[TaskScore]:
        """Run one task, in all processes of the job; each returns its scores."""
        from lm_eval import evaluate
        from lm_eval.evaluator_utils import get_sample_size

        settings, task = self.settings, self._tasks[name]
        questions = min(len(task.eval_docs), get_sample_size(task, settings.limit) or len(task.eval_docs))
        if questions < processes.count():
            raise ValueError(f"task '{name}' has {questions} questions for {processes.count()} processes: start fewer")
        # Before each task, so that its examples and samples do not depend on those that were run before it.
        set_seed(settings.seed)
        task.set_fewshot_seed(seed=settings.seed)
        with _lm_evals_output(self._shows_bars), _failures(name):
            results = evaluate(
                lm,
                {"tasks": {name: task}},
                limit=settings.limit,
                bootstrap_iters=settings.bootstrap_iters,
                log_samples=False,
                system_instruction=settings.system_instruction,
                apply_chat_template=settings.apply_chat_template,
                fewshot_as_multiturn=settings.apply_chat_template and settings.fewshot_as_multiturn,
                confirm_run_unsafe_code=settings.allow_code is not None,
            )
        return processes.from_first(results and _scores(task, results, settings.data_dir))


def _scores(task: Any, results: Mapping[str, Any], data_dir: str | Path | None) -> list[TaskScore]:
    name = task.task_name
    better = results["higher_is_better"][name]
    if len(better) == 1:  # a metric that gives several numbers, such as pass@1 and pass@10
        better = dict.fromkeys((key.partition(",")[0] for key in results["results"][name]), *better.values())
    return scores_of(
        results["results"][name],
        task=name,
        higher_is_better=better,
        num_fewshot=results["n-shot"][name],
        version=results["versions"][name],
        dataset=task.DATASET_PATH if is_on_hub(task, data_dir) else "",
    )


def evaluate_tasks(
    model: str | PreTrainedModel,
    tasks: Sequence[str],
    settings: TaskSettings | None = None,
    *,
    backend: str = "hf",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    results: Path | None = None,
    progress: bool = False,
) -> list[TaskScore]:
    """Evaluate a model on tasks of lm-eval.

    Args:
        model: folder or Hub id of a dense model, delta repository or pruned model; or a loaded model, for the backend
            "hf", whose tokenizer is read from where it was loaded from.
        tasks: names of tasks, groups and tags of lm-eval, and paths of YAML files.
        settings: how they are run.
        backend: "hf" for transformers; "runtime" for transformers with the base in memory and the delta beside it;
            "vllm" for vLLM.
        device: where the model runs; for "vllm" it is the engine's choice.
        dtype: dtype of the weights; None for the model's own.
        revision: branch, tag or commit of the model on the Hub.
        base_model: folder or Hub id of the base of a delta repository, instead of the recorded one.
        model_args: further arguments of `from_pretrained`, or for "vllm" of lm-eval's class `VLLM`.
        results: folder for finished tasks: a file for each model, task and settings. Tasks that have one are not run
            again, and one that was interrupted continues.
        progress: show lm-eval's progress bars, on a terminal.

    Returns:
        The scores, in the tasks' order: each metric with each filter, of a group before those of its tasks.

    Raises:
        ModuleNotFoundError: if lm-eval, or what a task or the backend needs, is not installed.
        ValueError: if there is no such task, its data cannot be loaded, it executes code and that is not allowed, or
            options do not fit one another.
        SandboxError: if code cannot be confined on this machine as it is to be.
        JudgeError: if the judge of alpaca_eval does not answer; its verdicts until then are kept in `results`.
        CheckpointError, DeltaFormatError, WrongBaseError: if the model is missing or damaged.
    """
    if not isinstance(model, str):
        if results is not None:
            raise ValueError("results are kept of models by folder or Hub id: give one of these, or leave results out")
        evaluation = TaskEvaluation(tasks, settings, progress=progress)
        tokenizer = load_tokenizer(str(model.name_or_path), HubOptions())
        evaluation.check_tokenizer(tokenizer, str(model.name_or_path))
        return evaluation.score(model, tokenizer)
    processes.connect(str(device).startswith("cpu"))
    loader = ModelLoader(backend, device, revision, base_model, model_args)
    with closing(loader.opened(model, dtype)) as evaluated:
        evaluation = TaskEvaluation(tasks, settings, results, progress)
        evaluation.check_tokenizer(evaluated.tokenizer, model)
        return evaluation.score_source(evaluated)


@contextmanager
def _failures(task: str) -> Iterator[None]:
    """Convert lm-eval's assertions; and in a job errors of torch, which may come from a connection that has ended."""
    try:
        yield
    except AssertionError as error:  # such as that a model has too few positions for the tokens to generate
        raise ValueError(f"task '{task}' cannot be run: {error}") from error
    except RuntimeError as error:
        if not processes.is_distributed():
            raise
        raise processes.ProcessError(f"task '{task}' failed in process {processes.number()}: {error}") from error


@contextmanager
def _lm_evals_output(shown: bool) -> Iterator[None]:
    """Within this context, lm-eval's progress bars are shown or not, and what it prints is not.

    It has no argument for either. It prints the batch sizes that it tries, in the midst of what we print.
    """
    on = tqdm.__init__
    with open(os.devnull, "w") as nowhere:

        def unseen(bar: Any, *args: Any, **options: Any) -> None:
            # Not disabled: vLLM asks its bars for the time taken.
            on(bar, *args, **{**options, "file": nowhere})

        if not shown:
            tqdm.__init__ = unseen  # type: ignore[method-assign, assignment]
        try:
            with redirect_stdout(nowhere):
                yield
        finally:
            tqdm.__init__ = on  # type: ignore[method-assign]
