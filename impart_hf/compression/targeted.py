"""The smallest repository of a pair that keeps a target, from a few compressions at different ratios."""

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..calibration.text import check_vocabulary, text_name
from ..coding.svd_cache import SvdCache
from ..common import processes
from ..common.progress import Progress
from ..evaluation.reference import Reference
from ..modeling.checkpoints import text_config
from ..repository.report import CompressionReport, human_bytes
from ..repository.target_report import TargetReport, TriedRatio
from ..storage.checked_files import read_checked, write_checked
from ..storage.workspace import Workspace
from .budgets import spectra_bytes
from .pair import ModelPair
from .pipeline import (
    CompressionRequest,
    Reach,
    compress_pair,
    models_for_texts,
    planned,
    run_inputs,
    stages_of,
    stored_scan,
)
from .plan import CompressionPlan, UnreachableRatioError, make_plan
from .ratio_search import MOST_POINTS, Point, best, next_ratio
from .scan import TensorPlan
from .target import QualityTarget
from .writer import describe_again, json_bytes

# Below this ratio a delta takes nearly as much as the fine-tune itself.
LOWEST_RATIO = 1.5
_HIGHEST_RATIO = 1e5
_RATIO_STEPS = 6  # halvings of the interval between two powers of two that holds the highest possible ratio
_BELOW = 0.99  # share of that ratio that is tried: near it, the length of a number may decide
_SPARE_BYTES = 16
_TRIED = "tried.json"


def validation_tokens(pair: ModelPair, target: QualityTarget) -> torch.Tensor:
    """Return the target's text as sequences of tokens, int64 (sequences, length).

    Raises:
        ValueError: if it is too short, or the tokenizer has tokens that the model does not have.
    """
    tokens = pair.tokens(target.validation, target.samples, target.length)
    if (vocabulary := getattr(text_config(pair.finetuned.config), "vocab_size", None)) is not None:
        check_vocabulary(tokens, vocabulary, pair.finetuned.source)
    return tokens


def compress_to_target(
    pair: ModelPair, workspace: Workspace, request: CompressionRequest, target: QualityTarget
) -> CompressionReport:
    """Find the highest ratio at which a repository keeps the target, and publish that repository.

    What was measured, the best repository so far, singular values and components are kept in the workspace, so that a
    stopped search goes on. The processes of a job share the tensors of every candidate, and the text's batches.

    Args:
        request: how to compress; the ratio of its method is the first that is tried.

    Raises:
        ValueError: if no ratio keeps the target; nothing is left then.
    """
    started = time.perf_counter()
    sequences = processes.each(lambda: validation_tokens(pair, target))
    text, start = text_name(target.validation), request.method.compression_ratio
    draft = _draft(target, text, sequences)
    widest = draft.widest(MOST_POINTS)
    request = replace(
        request, counted_card_data=request.card_data | widest.card_data(), counted_method_data=_method_data(widest)
    )
    state = processes.in_first(pair.state)
    tensors = stored_scan(pair, workspace, state, stages_of(request, bool(pair.exact.patterns)))
    lowest, highest, plan = processes.each(lambda: _range(pair, tensors, request))
    inputs = [*run_inputs(pair, request), str(target), text, sequences.tolist()]
    first = replace(request.method, compression_ratio=LOWEST_RATIO)
    kept_bytes = spectra_bytes(plan.encoded, request.method)
    workspace.begin(plan.fingerprint(first, inputs), plan.allowed_bytes + plan.fixed_bytes, kept_bytes)
    processes.in_first(lambda: workspace.put_scan(state, [tensor.to_dict() for tensor in tensors]))
    reference = Reference(processes.each(pair.load), sequences, target.batch_size)
    search = _Search(pair, workspace, request, target, reference)
    while (ratio := next_ratio(search.points, start, lowest, highest)) is not None:
        search.measure(ratio)
    chosen = best(search.points)
    if chosen is None:

        def refuse() -> None:
            workspace.discard()
            raise ValueError(_not_kept(target, text, request, search))

        processes.in_first(refuse)
    assert chosen is not None
    candidate = search.made(chosen.ratio)
    tried = next(one for one in search.tried if one.ratio == chosen.ratio)
    found = replace(
        draft,
        limit=search.limit, measured=search.measured(tried), reference_loss=reference.loss, tried=tuple(search.tried),
        chosen=tried, remark=_remark(chosen, highest, any(tensor.kind == "encoded" for tensor in tensors)),
    )  # fmt: skip

    def publish() -> CompressionReport:
        report = candidate.report
        workspace.adopt(candidate.folder)
        report.shortfall = ""  # the ratio is found, not requested
        method = report.method | _method_data(found)
        card_data = request.card_data | found.card_data()
        describe_again(pair, workspace.repository, method, card_data, request.origin, report)
        report.target, report.seconds = found, time.perf_counter() - started
        workspace.publish()
        return report

    return processes.in_first(publish)


def _draft(target: QualityTarget, text: str, sequences: torch.Tensor) -> TargetReport:
    nothing = TriedRatio(0.0, 0, 0.0, 0.0, 0.0)
    return TargetReport(str(target), 0.0, 0.0, text, sequences[:, 1:].numel(), 0.0, (), nothing)


def _method_data(report: TargetReport) -> dict[str, Any]:
    """Return config.json's entry on the search."""
    return {"target": report.summary()}


def _range(
    pair: ModelPair, tensors: list[TensorPlan], request: CompressionRequest
) -> tuple[float, float, CompressionPlan]:
    """Return the lowest ratio to try, the highest that the pair's tensors allow, and the plan for the first to try.

    Raises:
        UnreachableRatioError: if there is no such ratio.
    """
    start = request.method.compression_ratio
    stream, trained = models_for_texts(pair, request)
    reach = Reach(frozenset() if stream is None else stream.matrices, trained)
    if not any(tensor.kind == "encoded" for tensor in tensors):  # then the ratio has no effect
        return start, start, planned(pair, tensors, request, reach)[2]
    at_lowest = replace(request, method=replace(request.method, compression_ratio=LOWEST_RATIO))
    _, config, plan = planned(pair, tensors, at_lowest, reach)
    # All plans count the same bytes for config.json, but for the digits of the ratio.
    config_bytes = json_bytes(config | {"method": config["method"] | request.counted_method_data}) + _SPARE_BYTES
    card_bytes = plan.card_bytes

    def is_possible(ratio: float) -> bool:
        nonlocal plan
        method = replace(request.method, compression_ratio=ratio)
        try:
            found = make_plan(tensors, method, plan.checkpoint_bytes, config_bytes, card_bytes, request.max_shard_size)
        except UnreachableRatioError:
            return False
        if ratio <= start:
            plan = found
        return True

    possible = LOWEST_RATIO
    while (ratio := 2 * possible) < _HIGHEST_RATIO and is_possible(ratio):
        possible = ratio
    for _ in range(_RATIO_STEPS):
        middle = math.sqrt(possible * ratio)
        possible, ratio = (middle, ratio) if is_possible(middle) else (possible, middle)
    return LOWEST_RATIO, max(LOWEST_RATIO, float(f"{possible * _BELOW:.4g}")), plan


@dataclass(frozen=True)
class _Candidate:
    """A repository that was made at one ratio, and the report on it."""

    folder: Path
    report: CompressionReport


class _Search:
    """The ratios that were tried, in this run or before it was stopped.

    Attributes:
        limit: the most that the target allows, nats per token.
        tried: what was measured, in order.
    """

    def __init__(
        self,
        pair: ModelPair,
        workspace: Workspace,
        request: CompressionRequest,
        target: QualityTarget,
        reference: Reference,
    ):
        self._pair, self._workspace, self._request = pair, workspace, request
        self._target, self._reference = target, reference
        self._svds = SvdCache(workspace.components())
        self.limit = target.limit(reference.loss)
        folder = workspace.candidates()
        processes.in_first(lambda: folder.mkdir(exist_ok=True))
        data = processes.in_first(lambda: read_checked(folder / _TRIED))
        self.tried = [] if data is None else [TriedRatio(**fields) for fields in json.loads(data)]

    def measured(self, tried: TriedRatio) -> float:
        """Return the value that the target limits, nats per token."""
        return self._target.measured(tried.kl, tried.loss, self._reference.loss)

    @property
    def points(self) -> list[Point]:
        return [Point(tried.ratio, self.measured(tried) / self.limit, tried.bytes) for tried in self.tried]

    def made(self, ratio: float) -> _Candidate:
        """Return the repository of a ratio, made unless it is there."""
        folder = self._workspace.candidates() / f"ratio-{ratio:g}"
        stored = folder.with_name(f"{folder.name}.json")
        data = processes.in_first(lambda: read_checked(stored) if folder.exists() else None)
        if data is not None:
            return _Candidate(folder, CompressionReport.from_dict(json.loads(data)))
        method = replace(self._request.method, compression_ratio=ratio)
        self._pair.progress = Progress(self._pair.progress.enabled)  # each ratio has the same stages
        with Workspace(folder, self._workspace) as own:
            report = compress_pair(self._pair, own, replace(self._request, method=method), self._svds.of)
        processes.in_first(lambda: write_checked(stored, json.dumps(report.to_dict()).encode()))
        return _Candidate(folder, report)

    def measure(self, ratio: float) -> None:
        """Try a ratio, and keep its repository if it is the best so far."""
        started = time.perf_counter()
        candidate = self.made(ratio)
        loss, divergence = self._reference.compare(processes.each(lambda: self._pair.load(candidate.folder)))
        seconds = processes.from_first(time.perf_counter() - started)
        tried = TriedRatio(ratio, candidate.report.repository_bytes, divergence, loss, seconds)
        self.tried.append(tried)
        processes.in_first(self._store)
        self._pair.progress.note(
            f"ratio {ratio:g}: {human_bytes(tried.bytes)}, {self.measured(tried):.4g} of {self.limit:.4g} nats/token"
        )

    def _store(self) -> None:
        """Store what was measured, and remove the repositories that are not the best."""
        folder = self._workspace.candidates()
        write_checked(folder / _TRIED, json.dumps([asdict(tried) for tried in self.tried]).encode())
        kept = best(self.points)
        for path in folder.glob("ratio-*"):
            if kept is not None and path.name in (f"ratio-{kept.ratio:g}", f"ratio-{kept.ratio:g}.json"):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remark(chosen: Point, highest: float, has_encoded: bool) -> str:
    if not has_encoded:
        return "no matrix differs from the base's: the ratio has no effect"
    if chosen.ratio == highest:
        return f"{highest:g} is the highest ratio that these tensors allow, and it keeps the target"
    return ""


def _not_kept(target: QualityTarget, text: str, request: CompressionRequest, search: _Search) -> str:
    """Return the message for a target that no ratio keeps."""
    reached = {tried: search.measured(tried) for tried in search.tried}
    least = min(reached, key=lambda tried: math.inf if math.isnan(reached[tried]) else reached[tried])
    return (
        f"{target} cannot be kept on {text}: of the {len(reached)} ratios tried, down to "
        f"{min(tried.ratio for tried in reached):g}, '{request.method.name}' was best at {least.ratio:g} "
        f"({human_bytes(least.bytes)}), with {reached[least]:.4g} nats/token where {search.limit:.4g} are allowed: "
        "allow more, or choose another method"
    )
