"""How long each stage of a compression will take, about, so that the time left of the run can be told.

It is a forecast's arithmetic with next to nothing timed: a part of one matrix, and a few products. Where a stage's own
speed is known, the progress goes by that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..calibration.streamed_model import StreamedModel
from ..common import processes
from ..distillation import DistillSettings
from ..methods import MethodConfig
from .budgets import sharing
from .matrix_timing import MatrixCosts, MatrixKind, MatrixTimer, Sample, kind_of, pair_source
from .pair import ModelPair
from .plan import CompressionPlan
from .run_timing import allocation_seconds, sensitivity_operations, training_operations, training_speed, used_share
from .scan import TensorPlan
from .stages import ALLOCATING, COMPRESSING, DECOMPOSING, DISTILLING, MEASURING, WRITING

# A run of less work than this, in m n min(m, n) of its matrices and operations on texts, ends before it matters.
_LEAST_WORK = 2e10
# Parts of a matrix that are timed: their shorter sides, and the most that the other one is longer. The first is to do
# what is done once in a process.
_SIDES, _ASPECT = (128, 384), 4
_PRODUCTS, _PRICED = 3, 2048
_PASSES = 3  # times that calibration runs a layer, about: to each group of its matrices, and to the end


@dataclass(frozen=True)
class StageTimes:
    """Seconds that a run takes from its plan on.

    Attributes:
        stages: by stage; empty where it is not known.
        tensors: of compressing, by tensor to encode; empty where it is not known.
    """

    stages: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, float] = field(default_factory=dict)


def stage_times(
    pair: ModelPair,
    plan: CompressionPlan,
    method: MethodConfig,
    stream: StreamedModel | None,
    calibration: torch.Tensor | None,
    distillation: torch.Tensor | None,
    settings: DistillSettings,
    is_encoded: Callable[[str], bool],
    least_work: float = _LEAST_WORK,
) -> StageTimes:
    """Time parts of what a run does, and return how long its stages take; nothing is timed for a short run.

    Args:
        stream: the model for calibration.
        calibration, distillation: tokens of the texts, (sequences, length).
        settings: settings of distillation.
        is_encoded: whether an earlier run has encoded a tensor.
        least_work: of a run that is timed.
    """
    encoded = [tensor for tensor in plan.encoded if not is_encoded(tensor.name)]
    on_text = {} if stream is None or calibration is None else _calibration(encoded, pair, stream, calibration)
    config = dict(pair.finetuned.config)
    steps = 0.0
    if distillation is not None:
        steps = settings.steps * settings.batch_size * distillation.shape[1]
    weights = sum(tensor.dense_bytes // tensor.dtype.itemsize for tensor in plan.tensors)
    if sum(t.work for t in encoded) + sum(on_text.values()) + 8 * weights * steps < least_work:
        return StageTimes()
    transposed = frozenset[str]() if stream is None else stream.transposed
    kinds = {t.name: kind_of(t, t.name in on_text, t.name in transposed) for t in plan.encoded}
    costs = _costs(pair, plan, method, kinds)
    speed = training_speed(pair.device, products=_PRODUCTS) if on_text or steps else 1.0
    count = processes.count()
    tensors = {
        t.name: t.matrices * (costs.of(kinds[t.name]).encoding + costs.of(kinds[t.name]).decoding)
        + on_text.get(t.name, 0.0) / speed
        for t in encoded
    }
    stages = {COMPRESSING: sum(tensors.values()) / count, WRITING: 0.0}
    if shared := sharing(encoded, method):
        stages[DECOMPOSING] = sum(t.matrices * costs.of(kinds[t.name]).spectrum for t in shared) / count
        stages[ALLOCATING] = allocation_seconds(encoded, kinds, method, most=_PRICED)
        if calibration is not None:
            stages[MEASURING] = sensitivity_operations(plan, calibration) / speed
    elif method.shares_budget:
        stages |= {DECOMPOSING: 0.0, MEASURING: 0.0, ALLOCATING: 0.0}
    if distillation is not None:
        cost = {name: costs.of(kind) for name, kind in kinds.items()}
        stages[DISTILLING] = training_operations(plan, distillation, settings, config, cost) / speed / count
    return StageTimes(stages, tensors)


def _calibration(
    encoded: list[TensorPlan], pair: ModelPair, stream: StreamedModel, tokens: torch.Tensor
) -> dict[str, float]:
    """Return the operations of calibration by tensor: running its layer, and the second moments of its inputs."""
    config = dict(pair.finetuned.config)
    operations = {}
    for tensor in encoded:
        if tensor.name in stream.matrices:
            entries = tensor.dense_bytes / tensor.dtype.itemsize
            inputs = tensor.shape[-2 if tensor.name in stream.transposed else -1]
            each = 2 * _PASSES * entries + tensor.matrices * inputs**2
            operations[tensor.name] = each * tokens.numel() * used_share(tensor.name, config)
    return operations


def _costs(pair: ModelPair, plan: CompressionPlan, method: MethodConfig, kinds: dict[str, MatrixKind]) -> MatrixCosts:
    """Time parts of a matrix of the kind that takes longest, and the same of those whose rows are tokens."""
    dense = sum(t.dense_bytes for t in plan.encoded)
    timer = MatrixTimer(
        pair_source(pair, kinds, method.seed), method, sum(t.max_bytes for t in plan.encoded) / max(1, dense),
        pair.device,
    )  # fmt: skip
    counts = Counter(kinds.values())
    samples: dict[MatrixKind, list[Sample]] = {}
    for vocabulary in (False, True):
        own = [kind for kind in counts if kind.vocabulary == vocabulary]
        if own:
            kind = max(own, key=lambda kind: kind.work * counts[kind])
            for side in _SIDES:
                rows, columns = (min(_ASPECT * side, length) for length in kind.crop(side))
                samples[kind] = [Sample(rows, columns, timer(kind, rows, columns, 0))]
    return MatrixCosts(samples)
