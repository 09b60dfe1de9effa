"""Search for a method's hyperparameters on a validation text or task (arXiv 2504.13237, appendix B.3)."""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration.text import CalibrationSource
from ..coding.svd_cache import SvdCache
from ..common.devices import usable_device
from ..common.progress import Progress
from ..common.validation import byte_budget, shard_bytes
from ..evaluation.reference import Reference
from ..evaluation.tasks import TaskEvaluation, TaskSettings
from ..methods import ImPartConfig, MethodConfig
from ..methods.importance_allocation import BETAS, CS, ImportanceAllocation
from ..modeling.model_files import HubOptions
from ..repository.report import CompressionReport
from ..storage.workspace import Workspace
from .pair import ModelPair
from .pipeline import CompressionRequest, compress_pair


@dataclass
class Candidate:
    """One combination of settings that was tried.

    Attributes:
        beta, c, seed: its settings.
        score: its value of the metric.
        bytes: size of its repository.
        seconds: time to compress and evaluate it.
    """

    beta: float
    c: float
    seed: int
    score: float
    bytes: int
    seconds: float

    def summary(self) -> dict[str, float]:
        """Return the candidate's entry in the model card."""
        return {"beta": self.beta, "c": self.c, "seed": self.seed, "score": round(self.score, 6)}


@dataclass
class TuningReport:
    """The result of a search.

    Attributes:
        metric: name of the score: "KL, nats/token" from the fine-tune, or a task's metric.
        higher_is_better: whether a higher score is better.
        candidates: in the order in which they were tried.
        best: the best candidate, whose repository was written.
        report: the report on that repository.
    """

    metric: str
    higher_is_better: bool
    candidates: list[Candidate]
    best: Candidate
    report: CompressionReport

    def table(self) -> str:
        """Return a table with a line for each candidate, the best one marked."""
        lines = [f"{'beta':>6}{'C':>7}{'seed':>7}{'bytes':>14}  {self.metric}"]
        lines += [
            f"{c.beta:>6g}{c.c:>7g}{c.seed:>7}{c.bytes:>14}  {c.score:.5f}{'  best' if c is self.best else ''}"
            for c in self.candidates
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "report": self.report.to_dict()}


def tune(
    base: str,
    finetuned: str,
    output_dir: str | Path,
    method: MethodConfig | None = None,
    *,
    max_bytes: int | str | None = None,
    validation: CalibrationSource | None = None,
    task: str | None = None,
    betas: Sequence[float] = BETAS,
    cs: Sequence[float] = CS,
    seeds: Sequence[int] | None = None,
    calibration: CalibrationSource | None = None,
    samples: int = 64,
    length: int = 512,
    calibration_samples: int = 128,
    calibration_length: int = 2048,
    limit: int | float | None = None,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    base_revision: str | None = None,
    finetuned_revision: str | None = None,
    base_name: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: bool = False,
) -> TuningReport:
    """Compress with every combination of beta, C and seed, and keep the best repository.

    Every matrix is decomposed once for all candidates; the components are kept in a hidden folder beside `output_dir`
    until the search ends. Each candidate is loaded as a user would load it, and evaluated.

    Args:
        base, finetuned, output_dir: as for `compress`.
        method: ImPart's or ImPart-Qt's configuration, for the settings that are not searched; ImPart at ratio 32 if
            None.
        max_bytes: as for `compress`.
        validation: validation text, of the kinds that `compress` takes for calibration; candidates are compared by
            KL(fine-tune || candidate).
        task: a task of lm-eval, or the path of a task's YAML file; candidates are compared by the task's first metric.
            Exactly one of `validation` and `task` must be given.
        betas, cs, seeds: the values to try; only the method's own seed if `seeds` is None.
        calibration, calibration_samples, calibration_length: as for `compress`, but without a text by default.
        samples, length: the most sequences of the validation text, and tokens per sequence.
        limit: the most questions of the task, or a share of them if less than 1; None for all.
        batch_size: sequences evaluated at a time.
        device: where matrices are decomposed and models are evaluated.
        base_revision, finetuned_revision, base_name, token, cache_dir, max_shard_size, progress: as for `compress`.

    Raises:
        ValueError: if not exactly one of `validation` and `task` is given, or there is nothing to search; and as
            `compress` does.
    """
    method = method if method is not None else ImPartConfig()
    if not isinstance(method, ImportanceAllocation):
        raise ValueError(f"only ImPart and ImPart-Qt have a beta and a C to search, not '{method.name}'")
    if (validation is None) == (task is None):
        raise ValueError("candidates are compared on either a validation text or a task: give exactly one of them")
    if calibration is not None and not method.quantises:
        raise ValueError(f"calibration is for the methods that quantise, and '{method.name}' does not: leave it out")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    # The candidates that need most components come first, so that their decomposition serves all others.
    grid = itertools.product(
        sorted(set(betas)), sorted(set(cs), reverse=True), [method.seed] if seeds is None else dict.fromkeys(seeds)
    )
    candidates = [dataclasses.replace(method, beta=beta, c=c, seed=seed) for beta, c, seed in grid]
    if not candidates:
        raise ValueError("there is nothing to search: give betas, cs and seeds at least one value each")
    device, shard_size, wanted_bytes = usable_device(device), shard_bytes(max_shard_size), byte_budget(max_bytes)
    with Workspace(Path(output_dir)) as workspace:
        scratch, search_started = workspace.scratch(), time.perf_counter()
        pair = ModelPair(
            base,
            finetuned,
            HubOptions(base_revision, token, cache_dir),
            HubOptions(finetuned_revision, token, cache_dir),
            base_name=base_name,
            device=device,
            progress=Progress(False),
        )
        pair.check_output(workspace.output)
        inputs = None if calibration is None else pair.tokens(calibration, calibration_samples, calibration_length)
        scorer = (
            _TextScorer(pair, validation, samples, length, batch_size)
            if validation is not None
            else _TaskScorer(pair, str(task), limit, batch_size)
        )
        svds = SvdCache(scratch / "components")
        tried: list[Candidate] = []
        request = CompressionRequest(
            method, wanted_bytes, calibration=inputs, max_shard_size=shard_size,
            counted_card_data=_widest_card_data(scorer.metric, candidates),
        )  # fmt: skip
        for candidate in Progress(progress).track(candidates, "Tuning"):
            started = time.perf_counter()
            folder = scratch / "candidate"
            with Workspace(folder) as candidate_workspace:
                report = compress_pair(pair, candidate_workspace, replace(request, method=candidate), svds.of)
            score = scorer.score(pair.load(folder))
            seconds = time.perf_counter() - started
            tried.append(
                Candidate(candidate.beta, candidate.c, candidate.seed, score, report.repository_bytes, seconds)
            )
        best = (max if scorer.higher_is_better else min)(tried, key=lambda candidate: candidate.score)
        chosen = replace(
            request, method=candidates[tried.index(best)], card_data=_card_data(scorer.metric, tried, best)
        )
        report = compress_pair(pair, workspace, chosen, svds.of)
        report.seconds = time.perf_counter() - search_started
    return TuningReport(scorer.metric, scorer.higher_is_better, tried, best, report)


def _card_data(metric: str, candidates: Sequence[Candidate], best: Candidate) -> dict[str, Any]:
    """Return the model card's entry on a search."""
    rows = [candidate.summary() for candidate in candidates]
    return {"impart_hf_tuning": {"metric": metric, "candidates": rows, "chosen": best.summary()}}


def _widest_card_data(metric: str, candidates: Sequence[ImportanceAllocation]) -> dict[str, Any]:
    """Return an entry at least as long as that on the finished search, so that its bytes can be set aside."""
    widest = [Candidate(c.beta, c.c, c.seed, -99999.123456, 0, 0.0) for c in candidates]
    return _card_data(metric, widest, max(widest, key=lambda candidate: len(str(candidate.summary()))))


class _TextScorer:
    """Scores candidates by their KL divergence from the fine-tune on a text."""

    metric, higher_is_better = "KL, nats/token", False

    def __init__(self, pair: ModelPair, source: CalibrationSource, samples: int, length: int, batch_size: int):
        sequences = pair.tokens(source, samples, length)
        self._reference = Reference(pair.load(), sequences, batch_size)

    def score(self, model: PreTrainedModel) -> float:
        return self._reference.compare(model)[1]


class _TaskScorer:
    """Scores candidates by the first metric of a task of lm-eval."""

    def __init__(self, pair: ModelPair, task: str, limit: int | float | None, batch_size: int):
        settings = TaskSettings(limit=limit, batch_size=batch_size, bootstrap_iters=0)
        self._evaluation, self._tokenizer = TaskEvaluation([task], settings), pair.tokenizer()
        self.metric, self.higher_is_better = self._evaluation.first_metric()

    def score(self, model: PreTrainedModel) -> float:
        scores = self._evaluation.score(model, self._tokenizer)
        return next(score.value for score in scores if score.metric == self.metric)
