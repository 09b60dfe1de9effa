"""Comparison of models: cost, quality on a text or task, and latency."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.text import CalibrationSource, calibration_tokens, check_vocabulary, load_tokenizer
from ..common import processes
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
from .metrics import perplexity_of
from .models import EvaluatedModel, ModelLoader
from .reference import Reference
from .tables import markdown_table, score_table
from .tasks import TaskEvaluation, TaskScore, TaskSettings


@dataclass
class Evaluation:
    """The evaluation of one model.

    Attributes:
        model: folder or Hub id.
        cost: parameters, FLOPs and cache size, computed from shapes.
        perplexity: perplexity on the text, per token; None without a text.
        text_tokens: number of tokens over which the perplexity is the mean; None without a text.
        scores: the tasks' scores; none without a task.
        latency: measured time and memory; None if not requested.
    """

    model: str
    cost: ModelCost
    perplexity: float | None = None
    text_tokens: int | None = None
    scores: list[TaskScore] = field(default_factory=list)
    latency: Latency | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def cells(self) -> dict[str, str]:
        """Return the evaluation as a row of a table, by column; tasks have a table of their own."""
        cost, latency = self.cost, self.latency
        cells = {"model": self.model}
        if self.perplexity is not None:
            cells["perplexity"] = f"{self.perplexity:.3f}"
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
        """Return a Markdown table with a line for each model, and one with a line for each score of a task."""
        tables = [markdown_table([evaluation.cells() for evaluation in self.evaluations])]
        scores = {evaluation.model: evaluation.scores for evaluation in self.evaluations}
        if any(scores.values()):
            tables.append(score_table(scores))
        return "\n\n".join(tables)


def compare_models(
    models: Sequence[str],
    *,
    text: CalibrationSource | None = None,
    tasks: Sequence[str] = (),
    task_settings: TaskSettings | None = None,
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
    backend: str = "hf",
    model_args: Mapping[str, Any] | None = None,
    results: Path | None = None,
    progress: bool = False,
) -> Comparison:
    """Evaluate models under the same conditions: cost, and if requested, quality and latency.

    Weights are read only for a text, a task or latency, one model at a time, and only after all arguments have been
    checked. The processes of a job share the sequences of the text and the questions of tasks; each loads every model.

    Args:
        models: local folders or Hub ids of dense models, delta repositories and pruned models.
        text: of the kinds that `compress` takes for calibration; perplexity is measured on the same tokens for all
            models with equal vocabularies.
        tasks: names of tasks, groups and tags of lm-eval, and paths of YAML files.
        task_settings: how they are run.
        samples, length: the most sequences of the text, and tokens per sequence, at most the positions of any model.
        batch_size: sequences of the text at a time.
        latency: measure time and memory of prefill and decode.
        prompt_tokens: length of the prompt for cost and latency; None for 512, or fewer if some model's positions
            would not leave room for the new tokens.
        new_tokens, repeats: as for `measure_latency`.
        device: where models are evaluated.
        dtype: dtype of the weights; None for each model's own.
        revision: branch, tag or commit of the models on the Hub.
        base_model: folder or Hub id of the base of delta repositories, instead of the recorded ones.
        backend, model_args, results: as for `evaluate_tasks`; texts and latency are for "hf".
        progress: show a progress bar.

    Raises:
        CheckpointError, DeltaFormatError, WrongBaseError: if a model is missing or damaged.
        ValueError: if a model is not a causal language model, a number is out of range, the text is empty, a task or
            the device is not available, or `base_model` is given and no model is a delta repository.
        ModuleNotFoundError: if a task is given and lm-eval, or what the task needs, is not installed.
    """
    if not models:
        raise ValueError("there is no model to evaluate: give at least one")
    for name, number in (("batch_size", batch_size), ("repeats", repeats)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if latency and processes.is_distributed():
        raise ValueError("latency is measured in one process: start it without accelerate launch or torchrun")
    processes.connect(str(device).startswith("cpu"))
    loader = ModelLoader(backend, device, revision, base_model, model_args)
    if backend != "hf" and (text is not None or latency):
        raise ValueError(f"a text and latency are measured with the backend 'hf', not with '{backend}'")
    empty = [empty_model(model, dtype, revision) for model in models]
    positions = [limit for limit in map(max_positions, empty) if limit is not None]
    following = new_tokens if latency else 1
    if prompt_tokens is None:
        prompt_tokens = max(1, min([PROMPT_TOKENS, *(limit - following for limit in positions)]))
    evaluations = []
    for source, shapes in zip(models, empty, strict=True):
        check_positions(shapes, prompt_tokens, following)
        evaluations.append(Evaluation(source, model_cost(shapes, prompt_tokens)))
    comparison = Comparison(evaluations, [])
    if text is None and not tasks and not latency:
        return comparison
    deltas = [source for source in models if _check_weights(source, HubOptions(revision), base_model)]
    if base_model is not None and not deltas:
        raise ValueError("base_model: none of the models is a delta repository; leave it out")
    tokenizers = (
        [load_tokenizer(source, HubOptions(revision)) for source in models] if text is not None or tasks else []
    )
    readers: list[_Reader] = []
    if text is not None:
        for shapes, tokenizer in zip(empty, tokenizers, strict=True):
            reader = next((reader for reader in readers if reader.reads_like(tokenizer)), None)
            reader = reader or _Reader(tokenizer, text, samples, min([length, *positions]))
            reader.check_vocabulary(shapes)
            readers.append(reader)
        comparison.other_vocabularies += [s for s, r in zip(models, readers, strict=True) if r is not readers[0]]
    task_evaluation = TaskEvaluation(tasks, task_settings, results, progress) if tasks else None
    if task_evaluation is not None:
        for source, tokenizer in zip(models, tokenizers, strict=True):
            task_evaluation.check_tokenizer(tokenizer, source)
    for number, source in enumerate(Progress(progress).track(models, "Evaluating")):
        evaluation, reads_by = evaluations[number], tokenizers[number] if tokenizers else None
        with closing(EvaluatedModel(source, empty[number].dtype, loader, reads_by)) as model:
            if readers:
                evaluation.text_tokens, evaluation.perplexity = readers[number].perplexity(model.model, batch_size)
            if task_evaluation is not None:
                evaluation.scores = task_evaluation.score_source(model)
            if latency:
                evaluation.latency = measure_latency(
                    model.model, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats
                )
    return comparison


class _Reader:
    """The models of one vocabulary, which read the text as the same tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: CalibrationSource, samples: int, length: int):
        self._tokenizer = tokenizer
        self._tokens = calibration_tokens(text, tokenizer, samples=samples, length=length)

    def reads_like(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Return whether another tokenizer has the same vocabulary and special tokens."""
        own = self._tokenizer
        same_ends = (own.bos_token_id, own.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        return same_ends and own.get_vocab() == tokenizer.get_vocab()

    def check_vocabulary(self, model: PreTrainedModel) -> None:
        """Check that a model has every token of the text, as `calibration.text.check_vocabulary` does."""
        embeddings: Any = model.get_input_embeddings()
        check_vocabulary(self._tokens, embeddings.num_embeddings, str(model.name_or_path))

    def perplexity(self, model: PreTrainedModel, batch_size: int) -> tuple[int, float]:
        """Return the number of tokens that are predicted, all except each sequence's first, and the perplexity."""
        loss = Reference(model, self._tokens, batch_size, most_kept=0).loss
        return self._tokens.numel() - len(self._tokens), perplexity_of(loss)


def _check_weights(source: str, options: HubOptions, base_model: str | None) -> bool:
    """Check that a model's weight files, and its base's, can be opened; return whether it is a delta repository."""
    is_delta = repository_kind(source, options) is RepositoryKind.DELTA
    if is_delta:
        open_repository(source, options, base_model)
    else:
        Checkpoint(source, options)
    return is_delta
