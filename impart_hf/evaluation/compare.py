"""Comparison of models: cost, quality on a text or task, and latency."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.text import CalibrationSource, calibration_tokens, check_vocabulary, load_tokenizer
from ..common.devices import usable_device
from ..common.markdown import markdown_table
from ..common.progress import Progress
from ..modeling.checkpoints import Checkpoint
from ..modeling.model_files import HubOptions, repository_kind
from ..modeling.repository_kind import RepositoryKind
from ..repository.open import open_repository
from ..repository.report import human_bytes
from .cost import (
    ModelCost,
    check_positions,
    empty_model,
    max_positions,
    model_cost,
)
from .defaults import NEW_TOKENS, PROMPT_TOKENS
from .latency import Latency, measure_latency
from .metrics import load, perplexity
from .tasks import TaskEvaluation


@dataclass
class Evaluation:
    """The evaluation of one model.

    Attributes:
        model: folder or Hub id.
        cost: parameters, FLOPs and cache size, computed from shapes.
        perplexity: perplexity on the text, per token; None without a text.
        text_tokens: number of tokens over which the perplexity is the mean; None without a text.
        task_metric, task_score: name and value of the task's metric; None without a task.
        latency: measured time and memory; None if not requested.
    """

    model: str
    cost: ModelCost
    perplexity: float | None = None
    text_tokens: int | None = None
    task_metric: str | None = None
    task_score: float | None = None
    latency: Latency | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def cells(self) -> dict[str, str]:
        """Return the evaluation as a row of a table, by column."""
        cost, latency = self.cost, self.latency
        cells = {"model": self.model}
        if self.perplexity is not None:
            cells["perplexity"] = f"{self.perplexity:.3f}"
        if self.task_score is not None:
            cells[str(self.task_metric)] = f"{self.task_score:.4f}"
        cells |= {
            "parameters": f"{cost.parameters:,}",
            "without embeddings": f"{cost.parameters_without_embeddings:,}",
            "weights": f"{human_bytes(cost.weight_bytes)} ({cost.dtype})",
            "prefill MFLOP/token": f"{cost.prefill_flops_per_token / 1e6:,.2f}",
            "decode MFLOP/token": f"{cost.decode_flops_per_token / 1e6:,.2f}",
            "KV cache B/token": f"{sum(cost.kv_cache_bytes_per_token):,}",
        }
        if latency is not None:
            peaks = (latency.prefill_peak_bytes, latency.decode_peak_bytes)
            prefill, decode = ("unknown" if peak is None else human_bytes(peak) for peak in peaks)
            cells |= {
                "prefill ms": f"{latency.prefill_seconds * 1e3:.2f}",
                "decode tokens/s": f"{latency.decode_tokens_per_second:.1f}",
                "prefill peak": prefill,
                "decode peak": decode,
            }
        return cells


@dataclass
class Comparison:
    """The evaluations of several models under the same conditions.

    Attributes:
        evaluations: in the order in which the models were given.
        other_vocabularies: models whose vocabulary differs from the first model's; their perplexities per token cannot
            be compared with its.
    """

    evaluations: list[Evaluation]
    other_vocabularies: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "models": [evaluation.to_dict() for evaluation in self.evaluations],
            "other_vocabularies": self.other_vocabularies,
        }

    def table(self) -> str:
        """Return a Markdown table with a line for each model."""
        return markdown_table([evaluation.cells() for evaluation in self.evaluations])


def compare_models(
    models: Sequence[str],
    *,
    text: CalibrationSource | None = None,
    task: str | None = None,
    task_limit: int | None = None,
    samples: int = 64,
    length: int = 512,
    batch_size: int = 8,
    latency: bool = False,
    prompt_tokens: int | None = None,
    new_tokens: int = NEW_TOKENS,
    repeats: int = 5,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    progress: bool = False,
) -> Comparison:
    """Evaluate models under the same conditions: cost, and if requested, quality and latency.

    Weights are read only for a text, a task or latency, one model at a time, and only after all arguments have been
    checked.

    Args:
        models: local folders or Hub ids of dense models, delta repositories and pruned models.
        text: of the kinds that `compress` takes for calibration; perplexity is measured on the same tokens for all
            models with equal vocabularies.
        task: a task of lm-eval, or the path of a task's YAML file; the task's first metric is measured.
        task_limit: the most examples of the task; None for all.
        samples, length: the most sequences of the text, and tokens per sequence, at most the positions of any model.
        batch_size: sequences, or the task's requests, at a time.
        latency: measure time and memory of prefill and decode.
        prompt_tokens: length of the prompt for cost and latency; None for 512, or fewer if some model's positions
            would not leave room for the new tokens.
        new_tokens, repeats: as for `measure_latency`.
        device: where models are evaluated.
        dtype: dtype of the weights; None for each model's own.
        revision: branch, tag or commit of the models on the Hub.
        base_model: folder or Hub id of the base of delta repositories, instead of the recorded ones.
        progress: show a progress bar.

    Raises:
        CheckpointError, DeltaFormatError, WrongBaseError: if a model is missing or damaged.
        ValueError: if a model is not a causal language model, a number is out of range, the text is empty, the task or
            the device is not available, or `base_model` is given and no model is a delta repository.
        ModuleNotFoundError: if a task is given and lm-eval is not installed.
    """
    if not models:
        raise ValueError("there is no model to evaluate: give at least one")
    for name, number in (("batch_size", batch_size), ("repeats", repeats), ("task_limit", task_limit)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    device = usable_device(device)
    empty = [empty_model(model, dtype, revision) for model in models]
    positions = [limit for limit in map(max_positions, empty) if limit is not None]
    following = new_tokens if latency else 1
    if prompt_tokens is None:
        prompt_tokens = max(1, min([PROMPT_TOKENS, *(limit - following for limit in positions)]))
    evaluations = []
    for source, model in zip(models, empty, strict=True):
        check_positions(model, prompt_tokens, following)
        evaluations.append(Evaluation(source, model_cost(model, prompt_tokens)))
    comparison = Comparison(evaluations, [])
    if text is None and task is None and not latency:
        return comparison
    deltas = {source for source in models if _check_weights(source, HubOptions(revision), base_model)}
    if base_model is not None and not deltas:
        raise ValueError("base_model: none of the models is a delta repository; leave it out")
    evaluators: list[_Evaluator] = []
    if text is not None or task is not None:
        for source in models:
            tokenizer = load_tokenizer(source, HubOptions(revision))
            evaluator = next((evaluator for evaluator in evaluators if evaluator.reads_like(tokenizer)), None)
            if evaluator is None:
                evaluator = _Evaluator(tokenizer, batch_size)
                if text is not None:
                    evaluator.take_text(text, samples, min([length, *positions]))
                if task is not None:
                    evaluator.take_task(task, task_limit)
            evaluator.check_vocabulary(empty[len(evaluators)])
            evaluators.append(evaluator)
        comparison.other_vocabularies += [s for s, e in zip(models, evaluators, strict=True) if e is not evaluators[0]]
    for number, source in enumerate(Progress(progress).track(models, "Evaluating")):
        options = {"base_model": base_model} if source in deltas else {}
        loaded = load(source, empty[number].dtype, device, revision=revision, **options)
        if evaluators:
            evaluators[number].evaluate(loaded, evaluations[number])
        if latency:
            evaluations[number].latency = measure_latency(
                loaded, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats
            )
        del loaded  # frees its memory before the next model is loaded
    return comparison


class _Evaluator:
    """Evaluates the models of one vocabulary on a text and a task."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self._tokens: torch.Tensor | None = None
        self._task: TaskEvaluation | None = None

    def reads_like(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Return whether another tokenizer has the same vocabulary and special tokens."""
        own = self._tokenizer
        same_ends = (own.bos_token_id, own.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        return same_ends and own.get_vocab() == tokenizer.get_vocab()

    def take_text(self, text: CalibrationSource, samples: int, length: int) -> None:
        self._tokens = calibration_tokens(text, self._tokenizer, samples=samples, length=length)

    def check_vocabulary(self, model: PreTrainedModel) -> None:
        """Check that a model has every token of the text, as `calibration.text.check_vocabulary` does."""
        embeddings: Any = model.get_input_embeddings()
        if self._tokens is not None:
            check_vocabulary(self._tokens, embeddings.num_embeddings, str(model.name_or_path))

    def take_task(self, task: str, limit: int | None) -> None:
        self._task = TaskEvaluation(task, self._tokenizer, limit, self._batch_size)

    def evaluate(self, model: PreTrainedModel, evaluation: Evaluation) -> None:
        """Measure a model's perplexity and task score, and set them in its evaluation."""
        if self._tokens is not None:
            # The first token of a sequence is not predicted.
            evaluation.text_tokens = self._tokens.numel() - len(self._tokens)
            evaluation.perplexity = perplexity(model, self._tokens, self._batch_size)
        if self._task is not None:
            evaluation.task_metric, evaluation.task_score = self._task.metric, self._task.score(model)


def _check_weights(source: str, options: HubOptions, base_model: str | None) -> bool:
    """Check that a model's weight files, and its base's, can be opened; return whether it is a delta repository."""
    is_delta = repository_kind(source, options) is RepositoryKind.DELTA
    if is_delta:
        open_repository(source, options, base_model)
    else:
        Checkpoint(source, options)
    return is_delta
