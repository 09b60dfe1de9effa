"""Scores of models on the tables' tasks: a model is loaded once for all of its tasks, a task's data once for a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from ..common import processes
from ..common.model_names import split_revision
from ..evaluation.models import ModelLoader
from ..evaluation.task_scores import TaskScore
from ..evaluation.tasks import TaskEvaluation
from .makes import Making
from .planning import Conditions
from .tables import Task


class Scorer:
    """Scores models under the same conditions."""

    def __init__(self, conditions: Conditions):
        self._conditions = conditions
        self._tasks: dict[Task, TaskEvaluation] = {}

    @contextmanager
    def of(self, making: Making, folder: Path) -> Iterator[Callable[[Task], TaskScore]]:
        """Within this context there is a function that scores a model on a task; the model is loaded when it is called.

        Args:
            making: how the model was made.
            folder: where, if it was.

        Raises:
            Whatever libraries raise that load models and run tasks; ValueError too if a task has not the score.
        """
        conditions = self._conditions
        processes.connect(conditions.device.startswith("cpu"))
        source, revision = split_revision(making.stored or str(folder / "model"))
        base = None if making.base is None else split_revision(making.base)[0]
        with closing(ModelLoader(conditions.backend, conditions.device, revision, base).opened(source)) as model:

            def score(task: Task) -> TaskScore:
                evaluation = self.load(task)
                evaluation.check_tokenizer(model.tokenizer, source)
                return chosen(evaluation.score_source(model), task)

            yield score

    def load(self, task: Task) -> TaskEvaluation:
        """Return a task with its data, which is loaded once; errors as for `TaskEvaluation`."""
        assert task.lm_eval is not None
        if task not in self._tasks:
            # What a judge says is kept, because it costs money.
            kept = self._conditions.output / "verdicts" if task.judge else None
            self._tasks[task] = TaskEvaluation([task.lm_eval], self._conditions.settings_for(task), kept)
        return self._tasks[task]


def chosen(scores: Sequence[TaskScore], task: Task) -> TaskScore:
    """Return a task's score among all that lm-eval gives.

    Raises:
        ValueError: if it is not there.
    """
    # Of a group, not those of its tasks: it may have no score of its own, or not this one.
    own = [s for s in scores if s.task == task.lm_eval] or scores
    if len({score.task for score in own}) > 1:
        raise ValueError(f"'{task.lm_eval}' is several tasks without a common score: name one of them")
    found = [s for s in own if task.metric in ("", s.metric) and task.filter in ("", s.filter)]
    if not found:
        there = ", ".join(f"{score.metric} ({score.filter})" for score in own)
        raise ValueError(f"task '{task.lm_eval}' has no score {task.metric} ({task.filter}), but {there}")
    return found[0]
