"""Reports on compressed tensors and repositories, read back from the written files."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from ..distillation import DistillReport
from ..modeling.delta_file import BASE_CHECKSUMS, EXACT_SUFFIX, RECORD_SUFFIX, ROWS_SUFFIX, DeltaFile
from ..modeling.delta_record import FACTORED, parse_stack
from ..modeling.exact_record import stated_shape
from ..modeling.width_codes import bits_of
from .parts import Part, parts_of
from .target_report import TargetReport


def human_bytes(count: float) -> str:
    """Format a size for people: 1,500,000 bytes are "1.50 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def settings_text(settings: dict[str, Any]) -> str:
    """Format a method's settings in one line: "beta 0.6, bits 8/3/2"."""
    texts = {k: "/".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v) for k, v in settings.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


@dataclass
class TensorReport:
    """The report on one changed tensor.

    Attributes:
        name: the tensor's name.
        kind: "encoded", "exact", "kept" (stored whole) or "added rows".
        shape: shape of the file's entry; for "encoded", of the matrix or stack; for "exact", of all rows.
        bytes: size of its data in the file.
        rank: number of singular components stored, the mean over a stack; None for a direct or kept tensor.
        full_rank: min(m, n).
        bits: bits per stored value, for each segment of columns, of U and of V if the record has both; for a stack,
            those of its first matrix.
        keep_ratio: share of entries kept in the stored columns, the mean over a stack.
        relative_error: ||delta - decoded|| / ||delta||, the root mean square over a stack.
        inputs: how the layer's inputs are known for which values were rounded: "calibrated" on a text, "guessed" from
            the delta, None if they are not. Not known of a repository that was made before.
        notes: the method's notes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    rank: float | None = None
    full_rank: int | None = None
    bits: tuple[tuple[int, ...], ...] = ()
    keep_ratio: float | None = None
    relative_error: float | None = None
    inputs: str | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TensorReport":
        """Return the report that `to_dict` gave these fields."""
        return cls(**fields | {"shape": tuple(fields["shape"]), "bits": tuple(map(tuple, fields["bits"]))})


@dataclass
class CompressionReport:
    """The result of a compression.

    Attributes:
        method: the method's name and settings.
        checkpoint_bytes: size of the fine-tuned checkpoint's weight files.
        repository_bytes: size of the delta files, config.json and model card.
        sidecar_files: names of the files copied from the fine-tune.
        sidecar_bytes: size of the sidecar files, which are not counted in the ratio, as both models have them.
        reader_bytes: size of the reader files, which are not counted in the ratio.
        shortfall: why and by how much the requested ratio was missed; empty if it was met.
        tensors: the changed tensors.
        equal_tensors: number of tensors that are equal to the base's.
        seconds: duration of the run; of the last one if it was resumed.
        distilled: the report of distillation, or None.
        target: the report of the search for a target, or None.
    """

    method: dict[str, Any]
    checkpoint_bytes: int
    repository_bytes: int
    sidecar_files: list[str]
    sidecar_bytes: int
    reader_bytes: int
    shortfall: str
    tensors: list[TensorReport]
    equal_tensors: int
    seconds: float
    distilled: DistillReport | None = None
    target: TargetReport | None = None

    @property
    def requested_ratio(self) -> float | None:
        """The ratio that was asked for; None for method `exact`, which has none."""
        ratio = self.method.get("compression_ratio")
        return None if ratio is None else float(ratio)

    @property
    def changed_tensors(self) -> int:
        """Number of tensors that differ from the base's; a tensor with added rows may have two reports."""
        return len({tensor.name for tensor in self.tensors})

    @property
    def ratio(self) -> float:
        """The compression ratio reached: bytes of the checkpoint over bytes of the repository."""
        return self.checkpoint_bytes / self.repository_bytes

    @property
    def parts(self) -> list[Part]:
        """Where the repository's bytes are."""
        return parts_of(self.tensors, self.repository_bytes)

    @property
    def encoded_tensors(self) -> list[TensorReport]:
        """The tensors that are stored as records."""
        return [tensor for tensor in self.tensors if tensor.kind == "encoded"]

    @property
    def exact_tensors(self) -> list[TensorReport]:
        """The tensors that are stored exactly."""
        return [tensor for tensor in self.tensors if tensor.kind == "exact"]

    @property
    def inputs(self) -> dict[str, int]:
        """How many encoded tensors have `TensorReport.inputs` "calibrated", "guessed" and, as "unknown", None."""
        found = [tensor.inputs or "unknown" for tensor in self.encoded_tensors]
        return {kind: found.count(kind) for kind in ("calibrated", "guessed", "unknown")}

    @property
    def stored_whole(self) -> dict[str, int]:
        """How many tensors are stored whole, by the reason."""
        whole = [tensor for tensor in self.tensors if tensor.kind not in ("encoded", "exact")]
        reasons = ["rows of added tokens" if t.kind == "added rows" else _reason(t.shape) for t in whole]
        return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}

    def to_dict(self) -> dict[str, Any]:
        target = None if self.target is None else self.target.to_dict()
        return {
            **asdict(self),
            "target": target,
            "ratio": self.ratio,
            "requested_ratio": self.requested_ratio,
            "parts": [asdict(part) for part in self.parts],
            "inputs": self.inputs,
            "stored_whole": self.stored_whole,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "CompressionReport":
        """Return the report, without a target, that `to_dict` gave these fields."""
        own = {field.name: fields[field.name] for field in dataclass_fields(cls)} | {"target": None}
        own["tensors"] = [TensorReport.from_dict(tensor) for tensor in fields["tensors"]]
        if (distilled := fields["distilled"]) is not None:
            own["distilled"] = DistillReport(**distilled | {"untrained": tuple(distilled["untrained"])})
        return cls(**own)


def _reason(shape: tuple[int, ...]) -> str:
    return "norms and biases" if len(shape) < 2 else "too small for a record"


def tensor_report(name: str, data: Any) -> TensorReport:
    """Return the report on a tensor's records (uint8)."""
    records = parse_stack(data, name)
    first = records[0]
    shape = (first.rows, first.columns) if len(records) == 1 else (len(records), first.rows, first.columns)
    ratios = [float(r.keep_ratios().mean()) for r in records if r.plane_columns]
    return TensorReport(
        name=name,
        kind="encoded",
        shape=shape,
        bytes=len(data),
        rank=sum(r.rank for r in records) / len(records) if first.layout == FACTORED else None,
        full_rank=min(first.rows, first.columns),
        bits=tuple(tuple(bits_of(s.widths())) for s in first.segments),
        keep_ratio=sum(ratios) / len(ratios) if ratios else None,
        relative_error=math.sqrt(sum(r.relative_error**2 for r in records) / len(records)),
    )


def read_reports(paths: Iterable[Path]) -> tuple[list[TensorReport], int]:
    """Return reports on all entries of delta files, and the number of tensors in the base."""
    file = DeltaFile(list(paths))
    reports, base_tensors = [], 0
    for entry in file.names():
        if entry == BASE_CHECKSUMS:
            base_tensors = file.shape(entry)[0] - 1
        elif entry.endswith(RECORD_SUFFIX) and file.dtype_name(entry) == "U8":
            name = entry[: -len(RECORD_SUFFIX)]
            reports.append(tensor_report(name, file.read_records(name)))
        elif entry.endswith(EXACT_SUFFIX) and file.dtype_name(entry) == "U8":
            name = entry[: -len(EXACT_SUFFIX)]
            data = file.read_exact(name)
            reports.append(TensorReport(name, "exact", stated_shape(data, name), len(data)))
        else:
            tensor = file.read(entry)
            kind = "added rows" if entry.endswith(ROWS_SUFFIX) else "kept"
            name = entry.removesuffix(ROWS_SUFFIX)
            reports.append(TensorReport(name, kind, tuple(tensor.shape), tensor.numel() * tensor.element_size()))
    return reports, base_tensors
