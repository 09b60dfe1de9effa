"""The resources that a run takes, added up from what single matrices and layers cost."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..calibration.layer_stream import BATCH_SIZE
from ..calibration.sensitivity import enough_of
from ..repository.report import human_bytes
from ..storage.workspace import needed_bytes
from .budgets import sharing
from .matrix_timing import MatrixCosts, MatrixKind
from .pipeline import CompressionRequest
from .plan import CompressionPlan
from .run_timing import sensitivity_operations, training_operations
from .writer import delta_file_bytes, json_bytes

# Finished files are written and flushed; no forecast writes any, so that this is assumed.
_WRITTEN_PER_SECOND = 400e6
_TENSORS_PER_SECOND, _WRITING = 3000.0, 0.05
_FLOAT = 4  # bytes of a float32
_PRICE_BYTES = 200  # memory for the price, for each component
_ALIVE = 3  # activations of a layer that are alive at a time in calibration, in units of its widest


@dataclass(frozen=True)
class RunTimes:
    """Times of a run that do not depend on its matrices' kinds.

    Attributes:
        opening: seconds to open the models, read texts and check everything.
        scan_rate: bytes of both models that are scanned in a second.
        price: seconds in which one budget is shared out among all matrices.
        calibration: seconds in which all layers are run over the calibration text.
        training_speed: operations per second of training; 0 where nothing is trained and no sensitivity measured.
    """

    opening: float
    scan_rate: float
    price: float = 0.0
    calibration: float = 0.0
    training_speed: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: the stage.
        seconds: its time.
        shared: whether the processes of a job share it out.
    """

    name: str
    seconds: float
    shared: bool


@dataclass(frozen=True)
class Forecast:
    """What a compression will take.

    Attributes:
        method: the method's name and settings, as in config.json.
        process_count: number of processes of the job.
        stages: the stages of the run in order.
        memory_bytes: peak of each process's memory without mapped files; None where the system does not tell.
        disk_bytes: free space that the run needs, beside the output folder.
        free_bytes: free space there is; None if no output folder was given.
        repository_bytes: expected size of the repository, counted as for the ratio.
        allowed_bytes: the most that the repository may take at the requested ratio.
        checkpoint_bytes: size of the fine-tuned checkpoint's weight files.
        changed_tensors, equal_tensors: number of tensors that differ from the base's, and that do not, by a sample.
        shortfall: why and by how much the ratio will be missed; empty if it is met.
        timed: by kind of matrix: its shape, the number of matrices, and the shape of the largest part that was timed.
    """

    method: dict[str, Any]
    process_count: int
    stages: list[Stage]
    memory_bytes: int | None
    disk_bytes: int
    free_bytes: int | None
    repository_bytes: int
    allowed_bytes: int
    checkpoint_bytes: int
    changed_tensors: int
    equal_tensors: int
    shortfall: str
    timed: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        """Time of the whole run."""
        return sum(stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the whole time, in types that JSON can hold."""
        return {"seconds": self.seconds, **asdict(self)}

    def __str__(self) -> str:
        rows = [(stage.name, duration(stage.seconds)) for stage in self.stages]
        rows.append(("time in all", duration(self.seconds)))
        memory = "not known on this system" if self.memory_bytes is None else human_bytes(self.memory_bytes)
        rows.append(("peak memory" + (" of each process" if self.process_count > 1 else ""), memory))
        free = "" if self.free_bytes is None else f", {human_bytes(self.free_bytes)} are free"
        rows.append(("disk while running", f"{human_bytes(self.disk_bytes)}{free}"))
        ratio = self.checkpoint_bytes / self.repository_bytes
        rows.append(("result", f"{human_bytes(self.repository_bytes)}, ratio {ratio:.2f}"))
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        if self.shortfall:
            lines.append(f"ratio missed: {self.shortfall}")
        lines.append(
            f"{self.changed_tensors} of {self.changed_tensors + self.equal_tensors} tensors differ in a sample of up "
            "to 64 KiB each. If no other has changed, the result takes at most "
            f"{max(self.allowed_bytes, self.repository_bytes):,} bytes. Times and memory are estimates, from a few "
            "matrices timed now."
        )
        return "\n".join(lines)


def duration(seconds: float) -> str:
    """Format a time for people: "0.4 s", "12 s", "3 min 20 s", "5 h 10 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def forecast_of(
    plan: CompressionPlan,
    request: CompressionRequest,
    config: dict[str, Any],
    kinds: Mapping[str, MatrixKind],
    costs: MatrixCosts,
    times: RunTimes,
    *,
    kept_bytes: int,
    model_config: Mapping[str, Any],
    training_bytes: int = 0,
    process_count: int = 1,
    resident: int | None = None,
    free_bytes: int | None = None,
) -> Forecast:
    """Add up what a run takes.

    Args:
        request: with the method's real ratio.
        config: the content of config.json.
        kinds: the kind of each tensor to encode.
        kept_bytes: what the run keeps on disk besides records and the files made of them, in bytes.
        model_config: the content of the fine-tune's config.json.
        training_bytes: memory of distillation.
        resident: memory of the process now, in bytes; None if it is not known.
        free_bytes: free space at the output, if it is known.
    """
    method, encoded = request.method, plan.encoded
    cost = {name: costs.of(kind) for name, kind in kinds.items() if name in {t.name for t in encoded}}
    sizes = {t.name: t.matrices * int(t.max_bytes // t.matrices * min(1.0, cost[t.name].fill)) for t in encoded}
    repository_bytes = plan.card_bytes + json_bytes(config) + delta_file_bytes(plan.tensors, sizes, plan.max_shard_size)

    def shared(part: str) -> float:
        """The time of the processes: as much as the tensor that takes longest takes one of them, at least."""
        single = [t.matrices * getattr(cost[t.name], part) for t in encoded]
        return max([sum(single) / process_count, *single], default=0.0)

    read = [2 * (t.dense_bytes + t.added_bytes) / times.scan_rate for t in plan.tensors]
    stages = [Stage("open and check", times.opening, False)]
    stages.append(Stage("scan", max(sum(read) / process_count, max(read, default=0.0)), True))
    if sharing(encoded, method):
        stages.append(Stage("singular values", shared("spectrum"), True))
        if request.calibration is not None:
            operations = sensitivity_operations(plan, request.calibration)
            stages.append(Stage("sensitivity", operations / times.training_speed, False))
        stages.append(Stage("price", times.price, False))
    stages.append(Stage("vectors and encoding", shared("encoding"), True))
    if request.calibration is not None:
        decoding = sum(t.matrices * cost[t.name].decoding for t in encoded)
        stages.append(Stage("calibration", times.calibration / process_count + decoding, True))
    if request.distillation is not None:
        operations = training_operations(plan, request.distillation, request.distill_settings, model_config, cost)
        seconds = operations / times.training_speed
        stages.append(Stage("distillation", seconds / process_count, True))
    writing = _WRITING + len(plan.tensors) / _TENSORS_PER_SECOND + 2 * repository_bytes / _WRITTEN_PER_SECOND
    stages.append(Stage("writing", writing, False))
    record_bytes = sum(sizes.values())
    return Forecast(
        method=config["method"],
        process_count=process_count,
        stages=stages,
        memory_bytes=None if resident is None else resident + _peak(plan, request, model_config, cost, training_bytes),
        disk_bytes=needed_bytes(plan.allowed_bytes + plan.fixed_bytes, kept_bytes),
        free_bytes=free_bytes,
        repository_bytes=repository_bytes,
        allowed_bytes=plan.allowed_bytes,
        checkpoint_bytes=plan.checkpoint_bytes,
        changed_tensors=sum(t.kind != "equal" or t.added_rows > 0 for t in plan.tensors),
        equal_tensors=sum(t.kind == "equal" and not t.added_rows for t in plan.tensors),
        shortfall=plan.shortfall(repository_bytes, record_bytes, method.compression_ratio),
        timed=[
            {
                "rows": kind.rows,
                "columns": kind.columns,
                "matrices": sum(t.matrices for t in encoded if kinds[t.name] == kind),
                "timed": max(
                    ([s.rows, s.columns] for s in costs.samples.get(kind, ())), key=lambda s: s[0] * s[1], default=None
                ),
            }
            for kind in dict.fromkeys(kinds[t.name] for t in encoded)
        ],
    )


def _sensitivity_bytes(plan: CompressionPlan, calibration: torch.Tensor, text_config: Mapping[str, Any]) -> int:
    """Return the memory for it: embeddings, output projection, a layer, all layers' hidden states and some logits."""
    tokens, layers = enough_of(calibration), int(text_config.get("num_hidden_layers") or 1)
    vocabulary = [t.shape for t in plan.tensors if t.vocabulary]
    others = sum(math.prod(t.shape) for t in plan.tensors if len(t.shape) >= 2 and not t.vocabulary)
    rows, size = (max((shape[axis] for shape in vocabulary), default=0) for axis in (0, -1))
    held = sum(map(math.prod, vocabulary)) + others // layers + tokens.numel() * size * layers
    return _FLOAT * (held + _ALIVE * tokens.shape[1] * rows)


def _peak(
    plan: CompressionPlan,
    request: CompressionRequest,
    model_config: Mapping[str, Any],
    cost: Mapping[str, Any],
    training_bytes: int,
) -> int:
    """Return the most memory that the run takes beside what the process has when it starts, in bytes."""
    encoding = max((each.peak for each in cost.values()), default=0.0)
    components = sum(t.matrices * min(t.shape[-2:]) for t in sharing(plan.encoded, request.method))
    most = max(encoding, _PRICE_BYTES * components)
    if request.calibration is not None:
        # One layer in the model's dtype, its activations and second moments; before the first layer, the embeddings.
        text = model_config.get("text_config") or model_config
        sequences, length = request.calibration.shape
        vocabulary = sum(t.dense_bytes for t in plan.tensors if t.vocabulary)
        others = [t for t in plan.tensors if len(t.shape) >= 2 and not t.vocabulary]
        layer = sum(t.dense_bytes for t in others) // int(text.get("num_hidden_layers") or 1)
        inputs = max((max(t.shape[-2:]) for t in others), default=0)
        active = _ALIVE * _FLOAT * min(BATCH_SIZE, sequences) * length * inputs
        most = max(most, vocabulary, layer + _FLOAT * inputs**2 + max(active, encoding))
        if sharing(plan.encoded, request.method):
            most = max(most, _sensitivity_bytes(plan, request.calibration, text))
    return int(max(most, training_bytes))
