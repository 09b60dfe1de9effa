"""The public function `forecast`: what a compression will take, from headers and a few seconds of timing."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from ..calibration.text import AUTOMATIC, CalibrationSource
from ..common import processes
from ..common.devices import usable_device
from ..common.progress import Progress
from ..common.validation import byte_budget, check_whole_number, shard_bytes
from ..distillation import DistillSettings
from ..methods import ExactConfig, MethodConfig
from ..modeling.model_files import HubOptions
from ..storage.output import check_output, existing_parent
from .compress import checked_method, request_for
from .matrix_timing import (
    MatrixCosts,
    MatrixKind,
    MatrixTimer,
    Source,
    kind_of,
    pair_source,
    resident_bytes,
    time_matrices,
)
from .pair import ModelPair
from .pipeline import CompressionRequest, Reach, kept_bytes, models_for_texts, planned
from .plan import CompressionPlan
from .resources import Forecast, RunTimes, forecast_of
from .run_timing import allocation_seconds, counts_of, layer_seconds, scan_rate, training_speed
from .scan import sampled_scan
from .training_memory import training_bytes

# Seconds in which matrices are timed; the rest of a forecast takes about as long again.
_MATRIX_SECONDS = 6.0


def forecast(
    base: str,
    finetuned: str,
    method: MethodConfig | ExactConfig | None = None,
    *,
    output_dir: str | Path | None = None,
    process_count: int | None = None,
    max_bytes: int | str | None = None,
    calibration: CalibrationSource | None = AUTOMATIC,
    distill: CalibrationSource | None = None,
    calibration_samples: int = 128,
    calibration_length: int = 2048,
    distill_settings: DistillSettings | None = None,
    device: str | torch.device = "cpu",
    base_revision: str | None = None,
    finetuned_revision: str | None = None,
    base_name: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    max_shard_size: int | str = "5GB",
) -> Forecast:
    """Forecast what `compress` will take with the same arguments on this machine; nothing is written.

    Which tensors changed is found by comparing at most 64 KiB of each: a tensor that differs elsewhere only counts as
    equal. Budgets are planned as `compress` plans them. A few matrices, or parts of large ones, are decomposed and
    encoded, and other times follow from shapes. That takes about ten seconds; an adapter, or a fine-tune whose experts
    are stored in another form than the base's, is read whole besides.

    Args:
        output_dir: the folder that `compress` would write; None leaves it and the free space unchecked.
        process_count: number of processes of the job; those of the running one if None.

    The other arguments are those of `compress`.

    Raises:
        As `compress`, for everything that it finds before any work except damaged weights and a full disk.
    """
    opened = time.perf_counter()
    checked = checked_method(method, calibration, distill, distill_settings)
    if isinstance(checked, ExactConfig):
        raise ValueError(f"there is no forecast for method '{checked.name}': its size is known when it is stored")
    method = checked
    shard_size, wanted_bytes = shard_bytes(max_shard_size), byte_budget(max_bytes)
    processes.connect(str(device).startswith("cpu"))
    check_whole_number(1, process_count=processes.count() if process_count is None else process_count)
    device = usable_device(device)
    output = None if output_dir is None else check_output(output_dir, replaces_delta=True)
    pair = processes.each(
        lambda: ModelPair(
            base, finetuned, HubOptions(base_revision, token, cache_dir),
            HubOptions(finetuned_revision, token, cache_dir), base_name=base_name, device=device,
            progress=Progress(False),
        )
    )  # fmt: skip
    request = request_for(
        pair, method, wanted_bytes, calibration, distill, calibration_samples, calibration_length, distill_settings,
        shard_size,
    )  # fmt: skip
    free = None if output is None else shutil.disk_usage(existing_parent(output)).free
    count = process_count or processes.count()

    def in_one() -> Forecast:
        with processes.alone():
            return _forecast_pair(pair, request, count, opened, free)

    return processes.in_first(in_one)


def _forecast_pair(
    pair: ModelPair, request: CompressionRequest, process_count: int, opened: float, free_bytes: int | None
) -> Forecast:
    """Forecast the compression of a pair.

    Args:
        opened: when opening the pair was begun, from `time.perf_counter`.
        free_bytes: free space at the output, or None.
    """
    stream, trained = models_for_texts(pair, request)
    reach = Reach(frozenset() if stream is None else stream.matrices, trained)
    pair.tensors = sampled_scan(pair.base, pair.finetuned)
    method, config, plan = planned(pair, pair.tensors, request, reach)
    opening = time.perf_counter() - opened
    transposed = frozenset[str]() if stream is None else stream.transposed
    kinds = {t.name: kind_of(t, t.name in reach.calibrated, t.name in transposed) for t in plan.encoded}
    costs = matrix_costs(plan, kinds, method, pair_source(pair, kinds, method.seed), pair.device, _MATRIX_SECONDS)
    layer = layers = 0.0
    if stream is not None and request.calibration is not None:
        layer, layers = layer_seconds(stream, pair.finetuned, request.calibration), len(stream.layers)
    measures = request.calibration is not None and method.shares_budget
    times = RunTimes(
        opening=opening,
        scan_rate=scan_rate(plan.tensors, pair.base, pair.finetuned),
        price=allocation_seconds(plan.encoded, kinds, method),
        calibration=layer * layers,
        training_speed=training_speed(pair.device) if measures or request.distillation is not None else 0.0,
    )
    training = 0
    if request.distillation is not None:
        text = request.distillation.shape[0], request.distillation.shape[1]
        training = training_bytes(plan, method, request.distill_settings, pair.finetuned, text, pair.device)
    return forecast_of(
        plan, replace(request, method=method), config, kinds, costs, times,
        model_config=dict(pair.finetuned.config), process_count=process_count, resident=resident_bytes(),
        free_bytes=free_bytes, kept_bytes=kept_bytes(pair, plan, method, request, stream), training_bytes=training,
    )  # fmt: skip


def matrix_costs(
    plan: CompressionPlan,
    kinds: dict[str, MatrixKind],
    method: MethodConfig,
    source: Source,
    device: torch.device,
    seconds: float,
) -> MatrixCosts:
    """Time matrices of a plan for about so many seconds.

    Args:
        kinds: the kind of each tensor to encode.
        source: gives parts of them, see `matrix_timing.Source`.
    """
    timer = MatrixTimer(source, method, _share(plan), device)
    return time_matrices(counts_of(plan.encoded, kinds), timer, seconds)


def _share(plan: CompressionPlan) -> float:
    return sum(t.max_bytes for t in plan.encoded) / max(1, sum(t.dense_bytes for t in plan.encoded))
