"""The compression pipeline: from a pair to a delta repository, one tensor at a time."""

import time
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from ..calibration.hidden_states import HiddenStates
from ..calibration.layer_stream import stream_layers
from ..calibration.sensitivity import sensitivities
from ..calibration.streamed_model import StreamedModel
from ..coding.svd_cache import SvdOf, uncached_svd
from ..common import processes
from ..common.progress import Progress
from ..common.version import __version__
from ..distillation import DistillReport, DistillSettings
from ..methods import MethodConfig
from ..modeling.checkpoints import text_config
from ..repository.report import CompressionReport
from ..storage.workspace import Workspace
from .budgets import budgets_or_exact, find_spectra, spectra_bytes
from .encoding import Encoding
from .exact_tensors import store_exactly
from .pair import ModelPair
from .plan import CompressionPlan, make_plan
from .scan import TensorPlan
from .stage_times import StageTimes, stage_times
from .stages import ALLOCATING, SCANNING, WRITING, stage_titles
from .writer import card_bytes, json_bytes, repository_config, write_repository

Method = TypeVar("Method", bound=MethodConfig)


@dataclass(frozen=True)
class CompressionRequest:
    """How to compress a pair.

    Attributes:
        method: a method's configuration.
        max_bytes: the most that the repository may take, instead of the method's ratio; None for the ratio.
        calibration: calibration tokens, int64 (sequences, length), or None.
        distillation: tokens to distil on, int64 (sequences, length), or None.
        distill_settings: settings of distillation.
        max_shard_size: in bytes; a larger delta file is split.
        card_data: additional entries for the model card's metadata.
        counted_card_data: entries whose length counts instead of theirs, so that repositories that state other
            numbers get the same budgets; None if `card_data` counts.
        counted_method_data: entries of config.json on the method whose length is set aside, for what is known later.
        origin: where the fine-tune comes from, as for `delta_card`.
        is_built_in: whether the calibration text is the built-in one, which may reach nothing.
    """

    method: MethodConfig
    max_bytes: int | None = None
    calibration: torch.Tensor | None = None
    distillation: torch.Tensor | None = None
    distill_settings: DistillSettings = field(default_factory=DistillSettings)
    max_shard_size: int = 5 * 10**9
    card_data: dict[str, Any] = field(default_factory=dict)
    counted_card_data: dict[str, Any] | None = None
    counted_method_data: dict[str, Any] = field(default_factory=dict)
    origin: str = ""
    is_built_in: bool = False

    def recorded_method(self, method: MethodConfig, reach: "Reach", encoded: Iterable[TensorPlan]) -> dict[str, Any]:
        """Return config.json's entry on the method: its name and settings, the sizes of the texts, and what they reach.

        Args:
            encoded: the tensors to encode.

        Raises:
            ValueError: if a text has an effect on none of them.
        """
        recorded, encoded = method.to_dict(), list(encoded)
        if self.calibration is not None:
            matrices = {t.name for t in encoded if not t.vocabulary}
            if self.is_built_in and not matrices & reach.calibrated:
                recorded["calibration"] = "none: nothing reached"
            else:
                part = _part("calibration reaches", matrices, reach.calibrated, "matrices that changed")
                name = "built-in text, " if self.is_built_in else ""
                recorded["calibration"] = name + _text_size(self.calibration) + part
        elif method.quantises:
            recorded["calibration"] = method.uncalibrated
        if self.distillation is not None:
            settings = self.distill_settings
            part = _part("distillation trains", {t.name for t in encoded}, reach.trained, "tensors that changed")
            text = _text_size(self.distillation)
            recorded["distillation"] = f"{settings.trains}, {settings.steps} steps, {text}{part}"
        return recorded

    def fingerprint_inputs(self) -> list[Any]:
        """Return what the result depends on besides the pair and the method, in types that JSON can hold."""
        texts = [None if ids is None else ids.tolist() for ids in (self.calibration, self.distillation)]
        return [*texts, None if self.distillation is None else asdict(self.distill_settings)]


@dataclass(frozen=True)
class Reach:
    """What calibration and distillation can have an effect on.

    Attributes:
        calibrated: names of the weights whose inputs calibration computes.
        trained: names of the tensors that distillation can train.
    """

    calibrated: frozenset[str] = frozenset()
    trained: frozenset[str] = frozenset()


def with_ratio_for(method: Method, max_bytes: int | None, weight_bytes: int) -> Method:
    """Return the method with the ratio at which the repository takes `max_bytes`; unchanged if that is None.

    Args:
        weight_bytes: size of the fine-tuned checkpoint's weight files.

    Raises:
        ValueError: if `max_bytes` is not below that size.
    """
    if max_bytes is None:
        return method
    if max_bytes >= weight_bytes:
        raise ValueError(
            f"max_bytes={max_bytes} is not below the {weight_bytes} bytes of the model's own weights: ask for less"
        )
    return replace(method, compression_ratio=weight_bytes / max_bytes)


def compress_pair(
    pair: ModelPair, workspace: Workspace, request: CompressionRequest, svd_of: SvdOf = uncached_svd
) -> CompressionReport:
    """Compress a pair into a workspace, and publish it; the processes of a job share the tensors out.

    Args:
        svd_of: gives, for a tensor's name and a matrix's index in its stack, the function that computes its singular
            components.
    """
    started = time.perf_counter()
    stream, trained = processes.each(lambda: models_for_texts(pair, request))
    reach = Reach(frozenset() if stream is None else stream.matrices, trained)
    state = processes.in_first(pair.state)
    tensors = stored_scan(pair, workspace, state, stages_of(request, bool(pair.exact.patterns)))
    method, config, plan = processes.each(lambda: planned(pair, tensors, request, reach))
    inputs = run_inputs(pair, request)
    expected_bytes = plan.allowed_bytes + plan.fixed_bytes
    kept = kept_bytes(pair, plan, method, request, stream)
    workspace.begin(plan.fingerprint(method, inputs), expected_bytes, kept)
    processes.in_first(lambda: workspace.put_scan(state, [tensor.to_dict() for tensor in tensors]))
    times = StageTimes()
    if pair.progress.tells_time:
        times = stage_times(
            pair, plan, method, stream, request.calibration, request.distillation, request.distill_settings,
            workspace.has_record,
        )  # fmt: skip
    pair.progress.expect(times.stages)
    store_exactly(plan.exact, pair, workspace)
    _encode(pair, workspace, plan, method, svd_of, stream, request.calibration, times.tensors)
    distilled = _distil(pair, workspace, plan, request)
    about = request.card_data, request.origin, distilled, reach.calibrated
    return write_and_publish(pair, workspace, plan, config, started, *about)


def write_and_publish(
    pair: ModelPair,
    workspace: Workspace,
    plan: CompressionPlan,
    config: dict[str, Any],
    started: float,
    card_data: Mapping[str, Any] = MappingProxyType({}),
    origin: str = "",
    distilled: DistillReport | None = None,
    calibrated: Set[str] = frozenset(),
) -> CompressionReport:
    """Write the repository in the first process, and publish it; all processes return the report.

    Args:
        started: when the run began, from `time.perf_counter`.

    The other arguments are those of `write_repository`.
    """

    def publish() -> CompressionReport:
        seconds = time.perf_counter() - started
        with pair.progress.bar(1, WRITING):
            report = write_repository(
                pair, workspace, plan, config, dict(card_data), origin, seconds, distilled, calibrated
            )
            workspace.publish()
        return report

    return processes.in_first(publish)


def stored_scan(pair: ModelPair, workspace: Workspace, state: Any, stages: list[str]) -> list[TensorPlan]:
    """Return the scan of a pair, from the workspace if an earlier run stored it there for models in this state.

    Args:
        stages: those that follow, by the titles of their bars.
    """
    if (stored := processes.in_first(lambda: workspace.scan(state))) is not None:
        pair.tensors = list(map(TensorPlan.from_dict, stored))
    pair.progress.plan(stages if pair.is_scanned else [SCANNING, *stages])
    return pair.tensors


def stages_of(request: CompressionRequest, exactly: bool = False) -> list[str]:
    """Return the stages of what is asked for after the scan, by the titles of their bars.

    Args:
        exactly: whether some tensors are stored exactly.
    """
    return stage_titles(request.method, request.calibration is not None, request.distillation is not None, exactly)


def models_for_texts(pair: ModelPair, request: CompressionRequest) -> tuple[StreamedModel | None, frozenset[str]]:
    """Return the model for calibration, if asked for, and the names of the tensors that distillation can train."""
    stream = None if request.calibration is None else pair.streamed(request.calibration)
    if request.distillation is None:
        return stream, frozenset()
    return stream, _distillation().check_distillation(
        pair.base, pair.finetuned, request.distillation, request.distill_settings, pair.device
    )


def run_inputs(pair: ModelPair, request: CompressionRequest) -> list[Any]:
    """Return what the bytes of a run depend on besides the tensors and the method, in types that JSON can hold."""
    return [*request.fingerprint_inputs(), str(pair.device), torch.__version__, __version__]


def planned(
    pair: ModelPair, tensors: list[TensorPlan], request: CompressionRequest, reach: Reach
) -> tuple[MethodConfig, dict[str, Any], CompressionPlan]:
    """Return the method, with the ratio that it is to reach, the content of config.json, and the plan."""
    method = with_ratio_for(request.method, request.max_bytes, pair.finetuned.weight_bytes)
    encoded = [tensor for tensor in tensors if tensor.kind == "encoded"]
    config = repository_config(pair, request.recorded_method(method, reach, encoded))
    counted = config | {"method": config["method"] | request.counted_method_data}
    card = card_bytes(pair, counted, request.counted_card_data or request.card_data, request.origin)
    weight_bytes, config_bytes = pair.finetuned.weight_bytes, json_bytes(counted)
    plan = make_plan(tensors, method, weight_bytes, config_bytes, card, request.max_shard_size)
    if request.max_bytes is not None:
        plan.check_size()
    # The plan may leave fewer tensors to encode; this never makes config.json longer.
    config["method"] = request.recorded_method(method, reach, plan.encoded)
    return method, config, plan


def _encode(
    pair: ModelPair,
    workspace: Workspace,
    plan: CompressionPlan,
    method: MethodConfig,
    svd_of: SvdOf,
    stream: StreamedModel | None,
    calibration: torch.Tensor | None,
    seconds: dict[str, float],
) -> None:
    """Write the records of every tensor to encode into the workspace.

    Args:
        seconds: about what each takes; empty if it is not known.
    """
    if stream is None or not any(tensor.name in stream.matrices for tensor in plan.encoded):
        calibration = None  # there is nothing to calibrate
    budgets: dict[str, list[int]] = {}
    if method.shares_budget:
        processes.each(lambda: find_spectra(plan.encoded, pair, method, workspace))

        known: dict[str, float] = {}
        if calibration is not None:
            known = processes.in_first(
                lambda: workspace.sensitivities(
                    lambda: sensitivities(pair.finetuned, calibration, pair.device, pair.progress)
                )
            )
        with pair.progress.bar(1, ALLOCATING):
            budgets = processes.in_first(
                lambda: workspace.budgets(lambda: budgets_or_exact(plan.encoded, method, workspace, known))
            )
        chosen = [tensor for tensor in plan.encoded if budgets.get(tensor.name) == []]
        for tensor in chosen:
            tensor.kind = "exact"
        store_exactly(chosen, pair, workspace)
    encoding = Encoding(pair, plan.encoded, method, workspace, svd_of, budgets, stream, seconds)
    with encoding.bar:
        if stream is not None and calibration is not None:
            stream_layers(
                stream, calibration, encoding.compressed, workspace.states(),
                prepare=encoding.prepare, is_kept=encoding.is_kept, progress=Progress(False),
            )  # fmt: skip
        processes.each(lambda: encoding.encode_all(plan.encoded))


def _distil(
    pair: ModelPair, workspace: Workspace, plan: CompressionPlan, request: CompressionRequest
) -> DistillReport | None:
    """Train the workspace's records in all processes, if the request asks for distillation."""
    if request.distillation is None:
        return None
    records = {tensor.name: workspace.record(tensor.name) for tensor in plan.encoded}
    changed, report = _distillation().distill(
        pair.base, pair.finetuned, records, request.distillation, request.distill_settings,
        device=pair.device, checkpoints=workspace.checkpoints(), progress=pair.progress,
    )  # fmt: skip
    if processes.is_first():
        for name, data in changed.items():
            workspace.put_distilled(name, data)
    return report


def kept_bytes(
    pair: ModelPair,
    plan: CompressionPlan,
    method: MethodConfig,
    request: CompressionRequest,
    stream: StreamedModel | None,
) -> int:
    """Return the bytes that a run keeps in the workspace besides records and the files made of them, about.

    They are of singular values, of calibration's hidden states and of distillation's checkpoints, and sidecar files.
    """
    kept = spectra_bytes(plan.encoded, method) + sum(path.stat().st_size for path in pair.companions.files.values())
    if stream is not None and request.calibration is not None:
        kept += HiddenStates.bytes_needed(stream.states_shape(request.calibration), stream.dtype)
    if request.distillation is not None:
        from ..distillation.memory import checkpoint_bytes_for

        layers = getattr(text_config(pair.finetuned.config), "num_hidden_layers", 1)
        kept += checkpoint_bytes_for(plan.allowed_bytes, method.name, layers, request.distill_settings)
    return kept


def _distillation() -> Any:
    """Import the distillation module late: it loads the Trainer, which takes seconds and which nothing else needs."""
    from ..distillation import distillation

    return distillation


def _part(what: str, wanted: Set[str], reached: Set[str], kind: str) -> str:
    """Return how many of the wanted tensors are reached, or "" if all are.

    Raises:
        ValueError: if none is.
    """
    count = len(wanted & reached)
    if wanted and not count:
        raise ValueError(f"{what} none of the {len(wanted)} {kind}, such as {min(wanted)}: leave it out")
    return "" if count == len(wanted) else f", {count} of {len(wanted)} {kind.split()[0]}"


def _text_size(tokens: torch.Tensor | None) -> str:
    return "" if tokens is None else f"{tokens.shape[0]} x {tokens.shape[1]} tokens"
