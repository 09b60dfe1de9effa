"""Inspection of a delta repository without its base: a table, JSON and a plot."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

from ..modeling.configuration_delta_compressed import DeltaCompressedConfig
from ..modeling.delta_chain import MOST_DELTAS
from ..modeling.delta_file import RECORD_SUFFIX, DeltaFile, find_delta_files
from ..modeling.delta_record import DeltaFormatError, Record, parse_stack
from ..modeling.delta_repository import read_config
from ..modeling.model_files import CheckpointError, HubOptions
from .kl_forecast import FORECAST, forecast_text
from .open import warn_of_adapter_beside
from .report import TensorReport, human_bytes, read_reports, settings_text

_HEADINGS = ("tensor", "shape", "rank", "bits", "keep ratio", "bytes", "relative error")


class Inspection:
    """The contents of a delta repository.

    Attributes:
        source: folder or Hub id of the repository.
        config: its configuration.
        tensors: a report on every changed tensor.
        chain: the deltas that this one rests on, and the first base: folder or Hub id and revision of each.
        equal_tensors: number of tensors that are equal to the base's.
        delta_bytes: size of the delta files.
    """

    def __init__(self, repo: str, options: HubOptions):
        """Read the repository's own files; the base is not needed. An adapter beside the delta is only warned of.

        If the base is a delta repository, its config.json says what that one rests on, as far as it can be read.

        Raises:
            CheckpointError: if it is missing or not a delta repository.
            DeltaFormatError: if its delta file is damaged.
        """
        self.source = repo
        self.config: DeltaCompressedConfig = read_config(repo, options)
        warn_of_adapter_beside(repo, options)
        self.chain, self._broken = _bases(self.config, options)
        self._paths, _ = find_delta_files(repo, options)
        self.tensors, base_tensors = read_reports(self._paths)
        self.equal_tensors = base_tensors - len({t.name for t in self.tensors})
        self.delta_bytes = sum(path.stat().st_size for path in self._paths)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, in types that JSON can hold."""
        return {
            "repository": self.source,
            "base_model": self.config.base_model_name_or_path,
            "base_model_revision": self.config.base_model_revision,
            "chain": [{"model": model, "revision": revision} for model, revision in self.chain],
            "method": self.config.method,
            "format_version": self.config.format_version,
            "delta_bytes": self.delta_bytes,
            "equal_tensors": self.equal_tensors,
            "tensors": [t.to_dict() for t in self.tensors],
        }

    def table(self) -> str:
        """Return a table with a line for each changed tensor, and totals."""
        rows = [_HEADINGS, *(_row(t) for t in self.tensors)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        method = dict(self.config.method or {})
        name = method.pop("name", "unknown")
        forecast = method.pop(FORECAST, None)
        revision = self.config.base_model_revision
        lines += [
            "",
            f"method      {name}" + (f" ({settings_text(method)})" if method else ""),
            f"base model  {self.config.base_model_name_or_path}" + (f" at {revision}" if revision else ""),
            f"tensors     {len({t.name for t in self.tensors})} changed, {self.equal_tensors} equal to the base's",
            f"delta file  {human_bytes(self.delta_bytes)}: values {human_bytes(sum(t.bytes for t in self.tensors))}, "
            "headers and checksums the rest",
        ]
        if self.config.base_is_delta:
            shown = [model + (f" at {revision}" if revision else "") for model, revision in self.chain]
            lines.append(f"chain       {len(shown)} deltas, this one on {' on '.join(shown)}{self._broken}")
        if forecast is not None:
            lines.append(f"forecast    not measured: KL to the fine-tune about {forecast_text(forecast)}")
        return "\n".join(lines)

    def records(self) -> dict[str, list[Record]]:
        """Return the parsed records of every encoded tensor."""
        file = DeltaFile(self._paths)
        names = [t.name for t in self.tensors if t.kind == "encoded" and t.name + RECORD_SUFFIX in file]
        return {name: parse_stack(file.read_records(name), name) for name in names}

    def plot(self, path: Path | BytesIO) -> None:
        """Write a plot of spectra, keep ratios and bytes by layer; errors as `plot.draw`."""
        from .plot import draw  # imported late, because it needs matplotlib

        draw(self, path)


def _bases(config: DeltaCompressedConfig, options: HubOptions) -> tuple[list[tuple[str, str | None]], str]:
    """Return the bases that a delta rests on, the first base last, with their revisions; and why they are not all."""
    bases: list[tuple[str, str | None]] = []
    while len(bases) < MOST_DELTAS:
        bases.append((config.base_model_name_or_path, config.base_model_revision))
        if not config.base_is_delta:
            return bases, ""
        try:
            config = read_config(bases[-1][0], replace(options, revision=bases[-1][1], subfolder=""))
        except (CheckpointError, DeltaFormatError) as error:
            return bases, f", which cannot be read: {error}"
    return bases, " and more"


def _row(t: TensorReport) -> tuple[str, ...]:
    rank = "-" if t.rank is None else f"{t.rank:g} of {t.full_rank}"
    return (
        t.name if t.kind != "added rows" else f"{t.name} (added rows)",
        "x".join(map(str, t.shape)),
        {"encoded": rank, "exact": "exact"}.get(t.kind, "stored whole"),
        "/".join(":".join(map(str, dict.fromkeys(bits))) for bits in t.bits) or "-",
        "-" if t.keep_ratio is None else f"{t.keep_ratio:.4f}",
        str(t.bytes),
        "-" if t.relative_error is None else f"{t.relative_error:.4f}",
    )
