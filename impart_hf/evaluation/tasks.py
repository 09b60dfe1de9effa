"""Tasks of lm-eval."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TaskEvaluation:
    """One task of lm-eval, to judge several models by.

    Attributes:
        metric: the task's first.
        higher_is_better: which way it goes.
    """

    def __init__(self, task: str, tokenizer: PreTrainedTokenizerBase, limit: int | None, batch_size: int):
        """Find the task and fetch its data.

        Args:
            task: name of a task, or path of its YAML file.
            tokenizer: the models'.
            limit: examples at most; None for all.
            batch_size: requests at a time.

        Raises:
            ModuleNotFoundError: if lm-eval is missing, saying how to get it.
            ValueError: if there is no such task, its data cannot be had, or it is a group of tasks.
        """
        try:
            from lm_eval.tasks import TaskManager, get_task_dict
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("tasks are run by lm-eval: pip install 'impart-hf[eval]'") from error
        self._manager = TaskManager(include_defaults=not task.endswith((".yaml", ".yml")))
        try:
            found = list(get_task_dict([task], self._manager).values())
        except Exception as error:  # its data come from anywhere, by anyone's code
            raise ValueError(f"task '{task}' cannot be had: {error}") from error
        if len(found) != 1 or isinstance(found[0], dict):
            raise ValueError(f"'{task}' is a group of tasks; name one of them")
        self._task, self._tokenizer, self._limit, self._batch_size = found[0], tokenizer, limit, batch_size
        self.metric, self.higher_is_better = next(iter(self._task.higher_is_better().items()))

    def score(self, model: PreTrainedModel) -> float:
        """The task's metric for a model."""
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
        assert results is not None  # it is None on the other processes of a distributed run alone
        (values,) = results["results"].values()
        return next(float(value) for name, value in values.items() if name.split(",")[0] == self.metric)
