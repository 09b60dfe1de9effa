"""Quality of a causal language model on text: perplexity, and KL divergence from another model."""

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

_CHUNK_ENTRIES = 1 << 25  # logits compared at a time: 128 MiB in float32


def load(source: str, dtype: torch.dtype, device: str | torch.device, **options: Any) -> PreTrainedModel:
    """A model, ready to be evaluated.

    Args:
        source: local folder or Hub id, a delta repository or not.
        dtype, device: of its weights.
        options: more of `from_pretrained`'s.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    return model.to(device).eval()  # type: ignore[arg-type]  # transformers' decorator hides the first parameter


def perplexity(model: PreTrainedModel, blocks: torch.Tensor, batch_size: int) -> float:
    """Perplexity of the sequences' tokens but the first; arguments as for `evaluate`."""
    return evaluate(model, None, blocks, batch_size)[0]


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel, reference: PreTrainedModel | None, blocks: torch.Tensor, batch_size: int
) -> tuple[float, float]:
    """Perplexity of the sequences' tokens but the first, and mean KL(reference || model) in nats per token.

    Args:
        model: to be judged.
        reference: what it is compared with; may be the same model. The KL is NaN without one, or if their
            vocabularies differ in size.
        blocks: int64 (sequences, length).
        batch_size: sequences at a time.
    """
    loss, divergence, tokens = 0.0, 0.0, 0
    for rows in blocks.split(batch_size):
        rows = rows.to(model.device)
        targets = rows[:, 1:].reshape(-1)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].flatten(0, 1)
        if reference is None or reference is model:
            expected = logits if reference is model else logits.new_empty(len(targets), 0)
        else:
            expected = reference(input_ids=rows, use_cache=False).logits[:, :-1].flatten(0, 1)
        chunk = max(1, _CHUNK_ENTRIES // logits.shape[1])
        for part, other, target in zip(*(t.split(chunk) for t in (logits, expected, targets)), strict=True):
            found = part.float().log_softmax(-1)
            loss -= found.gather(1, target[:, None]).double().sum().item()
            if part.shape == other.shape:
                wanted = other.float().log_softmax(-1)
                divergence += (wanted.exp() * (wanted - found)).sum(-1).double().sum().item()
            else:
                divergence = math.nan
        tokens += len(targets)
    # Infinite for a model that is broken beyond what a float can say, where math.exp would raise.
    return torch.tensor(loss / tokens, dtype=torch.float64).exp().item(), divergence / tokens


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
