"""Evaluation on tasks of lm-eval."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TaskEvaluation:
    """Evaluates models on one task of lm-eval.

    Attributes:
        metric: name of the task's first metric.
        higher_is_better: whether a higher value of it is better.
    """

    def __init__(self, task: str, tokenizer: PreTrainedTokenizerBase, limit: int | None, batch_size: int):
        """Find the task and load its data.

        Args:
            task: name of a task, or path of its YAML file.
            tokenizer: the models' tokenizer.
            limit: the most examples; None for all.
            batch_size: requests at a time.

        Raises:
            ModuleNotFoundError: if lm-eval is not installed.
            ValueError: if there is no such task, its data cannot be loaded, or it is a group of tasks.
        """
        try:
            from lm_eval.tasks import TaskManager, get_task_dict
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("running tasks needs lm-eval: pip install 'impart-hf[eval]'") from error
        self._manager = TaskManager(include_defaults=not task.endswith((".yaml", ".yml")))
        try:
            tasks = list(get_task_dict([task], self._manager).values())
        except Exception as error:  # tasks run code and load data of third parties, which can raise anything
            raise ValueError(f"task '{task}' cannot be loaded, check its name and its data: {error}") from error
        if len(tasks) != 1 or isinstance(tasks[0], dict):
            raise ValueError(f"task '{task}' is a group of tasks: name one of them")
        self._task, self._tokenizer, self._limit, self._batch_size = tasks[0], tokenizer, limit, batch_size
        self.metric, self.higher_is_better = next(iter(self._task.higher_is_better().items()))

    def score(self, model: PreTrainedModel) -> float:
        """Return the task's metric for a model."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=self._tokenizer, batch_size=self._batch_size),
            tasks=[self._task],
            task_manager=self._manager,
            limit=self._limit,
            bootstrap_iters=0,
            log_samples=False,
        )
        assert results is not None  # None only occurs in the other processes of a distributed run
        (values,) = results["results"].values()
        return next(float(value) for name, value in values.items() if name.split(",")[0] == self.metric)
