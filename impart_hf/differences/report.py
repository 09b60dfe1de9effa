"""The report on what differs between two models: tables, JSON and a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..repository.report import human_bytes
from .groups import Group, by_kind, by_layer, other_dtypes
from .ratios import RatioEstimate
from .tensor_diff import TensorDiff
from .verdict import Verdict

_TENSORS = ("tensor", "shape", "changed", "rows", "||d||/||W||", "largest", "bits", "stable rank", "in 16", "64", "256")
_GROUPS = ("tensors", "changed tensors", "entries", "changed", "||d||/||W||", "bits", "exact", "dense")


@dataclass(frozen=True)
class DiffReport:
    """What differs between two models.

    Attributes:
        base, finetuned: the folders or Hub ids of the two.
        tensors: the differences of all tensors, sorted by name; equal ones are among them.
        absent: tensors of the base that the other lacks, and needs not have.
        checkpoint_bytes: size of the fine-tune's weight files; of a delta repository or adapter, of its tensors.
        config: names of the fields of config.json that differ; of nested ones with a dot.
        files: names of the sidecar files, such as the tokenizer's, that differ, or that only the fine-tune has.
        estimates: what `impart-rd` is expected to lose, by rising ratio.
        verdict: which method fits.
        seconds: duration of the comparison.
    """

    base: str
    finetuned: str
    tensors: tuple[TensorDiff, ...]
    absent: tuple[str, ...]
    checkpoint_bytes: int
    config: tuple[str, ...]
    files: tuple[str, ...]
    estimates: tuple[RatioEstimate, ...]
    verdict: Verdict
    seconds: float

    @cached_property
    def total(self) -> Group:
        """The sum over all tensors."""
        return Group.of("total", self.tensors)

    @cached_property
    def kinds(self) -> list[Group]:
        """The sums over kinds of modules."""
        return by_kind(self.tensors)

    @cached_property
    def layers(self) -> list[Group]:
        """The sums over layers."""
        return by_layer(self.tensors)

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors have another dtype than the base's, by "BASE to FINE-TUNE"."""
        return other_dtypes(self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the singular values, in types that JSON can hold."""
        return {
            "base": self.base,
            "finetuned": self.finetuned,
            "total": self.total.to_dict(),
            "kinds": [group.to_dict() for group in self.kinds],
            "layers": [group.to_dict() for group in self.layers],
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "absent": list(self.absent),
            "checkpoint_bytes": self.checkpoint_bytes,
            "dtypes": self.dtypes,
            "config": list(self.config),
            "files": list(self.files),
            "estimates": [estimate.to_dict() for estimate in self.estimates],
            "verdict": asdict(self.verdict) | {"commands": list(self.verdict.commands)},
            "seconds": self.seconds,
        }

    def table(self) -> str:
        """Return tables of the tensors that changed, of kinds, of layers and of estimates, and the verdict."""
        changed = [tensor for tensor in self.tensors if not tensor.is_equal]
        lines = _aligned([_TENSORS, *map(_tensor_row, changed)]) if changed else []
        for title, groups in (("kind", [*self.kinds, self.total]), ("layer", self.layers)):
            lines += ["", *_aligned([(title, *_GROUPS), *map(_group_row, groups)])]
        if self.estimates:
            heading = ("impart-rd at ratio", "bytes", "KL / base's KL, expected", "least", "largest")
            lines += ["", *_aligned([heading, *map(_estimate_row, self.estimates)])]
        lines += ["", *self._facts()]
        lines += ["", f"verdict     {self.verdict.text}"]
        lines += [f"{'run' if number == 0 else '':12}{command}" for number, command in enumerate(self.verdict.commands)]
        return "\n".join(lines).lstrip("\n")

    def _facts(self) -> list[str]:
        total = self.total
        facts = {
            "tensors": f"{total.changed_tensors} changed, {total.tensors - total.changed_tensors} equal",
            "dtypes": ", ".join(f"{count} from {change}" for change, count in self.dtypes.items()),
            "absent": f"{len(self.absent)} tensors of the base, such as {self.absent[0]}" if self.absent else "",
            "non-finite": f"{total.nonfinite} changed numbers are NaN or infinite" if total.nonfinite else "",
            "config.json": ", ".join(self.config),
            "other files": ", ".join(self.files),
            "bits": "of an exact store per entry, estimated; other estimates are from singular values, not measured",
        }
        return [f"{name:12}{text}" for name, text in facts.items() if text]

    def plot(self, path: Path) -> None:
        """Write a picture of changed shares, bits and spectra; errors as `plot.draw`."""
        from .plot import draw  # imported late, because it needs matplotlib

        draw(self, path)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows in columns, with a line below the first."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]


def _tensor_row(t: TensorDiff) -> tuple[str, ...]:
    leading: Mapping[int, float] = t.leading
    shares = [_percent(share) for share in leading.values()] or ["-"] * 3
    return (
        f"{t.name} (+{t.added_rows} rows)" if t.added_rows else t.name,
        "x".join(map(str, t.shape)),
        _percent(t.changed / t.entries) if t.entries else "-",
        "-" if t.changed_rows is None else str(t.changed_rows),
        "-" if t.relative_norm is None else f"{t.relative_norm:.2e}",
        f"{t.largest:.2e}",
        f"{t.bits:.3f}",
        "-" if t.stable_rank is None else f"{t.stable_rank:.1f}",
        *shares,
    )


def _group_row(group: Group) -> tuple[str, ...]:
    return (
        group.label,
        str(group.tensors),
        str(group.changed_tensors),
        str(group.entries),
        _percent(group.share),
        f"{group.relative_norm:.2e}",
        f"{group.bits:.3f}",
        human_bytes(group.exact_bytes),
        human_bytes(group.dense_bytes),
    )


def _estimate_row(estimate: RatioEstimate) -> tuple[str, ...]:
    low, share, high = estimate.share
    return (f"{estimate.ratio:g}", human_bytes(estimate.bytes), *(f"{100 * of:.2g}%" for of in (share, low, high)))


def _percent(share: float) -> str:
    """Return a share in per cent; a little that changed is not 0."""
    return f"{100 * share:.2f}%" if share >= 1e-4 or not share else f"{100 * share:.1e}%"
