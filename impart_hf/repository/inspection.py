"""Looking into a delta repository without its base: a table, JSON, and a picture."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling.checkpoints import HubOptions
from ..modeling.configuration_delta_compressed import DeltaCompressedConfig
from ..modeling.delta_decode import decode_planes
from ..modeling.delta_record import FACTORED, Record, parse_stack
from ..modeling.delta_repository import RECORD_SUFFIX, DeltaFile, find_delta_files
from .open import read_config
from .report import TensorReport, human_bytes, read_reports, settings_text

_HEADINGS = ("tensor", "shape", "rank", "bits", "keep ratio", "bytes", "relative error")


class Inspection:
    """What a delta repository holds.

    Attributes:
        config: its configuration.
        tensors: a report on every changed tensor.
        equal_tensors: how many are equal to the base's.
        delta_bytes: size of the delta files.
    """

    def __init__(self, repo: str, options: HubOptions):
        """Read the repository's own files; the base is not needed.

        Raises:
            CheckpointError: if it is missing or no delta repository.
            DeltaFormatError: if its delta file is damaged.
        """
        self.source = repo
        self.config: DeltaCompressedConfig = read_config(repo, options)
        self._paths, _ = find_delta_files(repo, options)
        self.tensors, base_tensors = read_reports(self._paths)
        self.equal_tensors = base_tensors - len({t.name for t in self.tensors})
        self.delta_bytes = sum(path.stat().st_size for path in self._paths)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {
            "repository": self.source,
            "base_model": self.config.base_model_name_or_path,
            "base_model_revision": self.config.base_model_revision,
            "method": self.config.method,
            "format_version": self.config.format_version,
            "delta_bytes": self.delta_bytes,
            "equal_tensors": self.equal_tensors,
            "tensors": [t.to_dict() for t in self.tensors],
        }

    def table(self) -> str:
        """A line for each changed tensor, and totals."""
        rows = [_HEADINGS, *(_row(t) for t in self.tensors)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        method = dict(self.config.method or {})
        name = method.pop("name", "unknown")
        revision = self.config.base_model_revision
        lines += [
            "",
            f"method      {name} ({settings_text(method)})",
            f"base model  {self.config.base_model_name_or_path}" + (f" at {revision}" if revision else ""),
            f"tensors     {len(self.tensors)} changed, {self.equal_tensors} equal to the base's",
            f"delta file  {human_bytes(self.delta_bytes)}, of it {human_bytes(sum(t.bytes for t in self.tensors))} "
            "values and the rest header and checksums",
        ]
        return "\n".join(lines)

    def records(self) -> dict[str, list[Record]]:
        """The parsed records of every encoded tensor."""
        file = DeltaFile(self._paths)
        names = [t.name for t in self.tensors if t.kind == "encoded" and t.name + RECORD_SUFFIX in file]
        return {name: parse_stack(file.read_records(name), name) for name in names}

    def plot(self, path: Path) -> None:
        """Draw spectra, keep ratios and bytes by layer.

        Raises:
            ModuleNotFoundError: if matplotlib is missing, saying how to get it.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("drawing needs matplotlib: pip install 'impart-hf[plot]'") from error
        figure = Figure(figsize=(15, 4.6), layout="constrained")
        spectrum, ratios, sizes = figure.subplots(1, 3)
        kinds = _colours(self.tensors)
        _draw_components(spectrum, ratios, self, kinds)
        _draw_bytes(sizes, self.tensors, kinds)
        method = (self.config.method or {}).get("name", "")
        figure.suptitle(f"{Path(self.source).name}: {method}, {human_bytes(self.delta_bytes)}")
        figure.savefig(path, dpi=130)


def _row(t: TensorReport) -> tuple[str, ...]:
    rank = "-" if t.rank is None else f"{t.rank:g} of {t.full_rank}"
    return (
        t.name if t.kind != "added rows" else f"{t.name} (added rows)",
        "x".join(map(str, t.shape)),
        "as it is" if t.kind != "encoded" else rank,
        "/".join(":".join(map(str, dict.fromkeys(bits))) for bits in t.bits) or "-",
        "-" if t.keep_ratio is None else f"{t.keep_ratio:.4f}",
        str(t.bytes),
        "-" if t.relative_error is None else f"{t.relative_error:.4f}",
    )


def _kind(t: TensorReport) -> str:
    """The module's name without its place in the model: model.layers.3.mlp.up_proj.weight -> up_proj."""
    parts = [p for p in t.name.split(".") if not p.isdigit()]
    return _SMALL if t.kind == "kept" else parts[-2] if len(parts) > 1 else t.name


def _layer(name: str) -> int | None:
    numbers = [int(p) for p in name.split(".") if p.isdigit()]
    return numbers[0] if numbers else None


_SMALL = "norms, small"  # tensors kept as they are share one colour


def _colours(tensors: list[TensorReport]) -> dict[str, str]:
    """A colour for every kind of module that is encoded, and one for the rest."""
    encoded = sorted({_kind(t) for t in tensors} - {_SMALL})
    return {**{kind: f"C{i % 10}" for i, kind in enumerate(encoded)}, _SMALL: "black"}


def singular_values(record: Record, name: str) -> np.ndarray:
    """float64, shape (rank,): the delta's singular values, estimated from what is left of a factored record's vectors.

    Of a unit vector's squared norm a share q is kept, and sigma carries 1/q^2 and the scales of levels.
    """
    norms = [plane.dense().norm(dim=1).double().numpy() for plane in decode_planes(record, name)]
    return record.scale * record.sigma.astype(np.float64) * norms[0] * norms[1] * record.keep_ratios()


def _draw_components(spectrum: Any, ratios: Any, inspection: Inspection, kinds: dict[str, str]) -> None:
    shown: set[str] = set()
    kind_of = {t.name: _kind(t) for t in inspection.tensors if t.kind == "encoded"}
    for name, stack in inspection.records().items():
        kind = kind_of[name]
        label = kind if kind not in shown else None
        for record in stack[:1]:
            if record.layout == FACTORED and record.rank:
                steps = range(1, record.rank + 1)
                sigma = singular_values(record, name)
                spectrum.plot(
                    steps, sigma, color=kinds[kind], lw=0.8, marker="." if record.rank < 3 else None, label=label
                )
                ratios.plot(
                    steps, record.keep_ratios(), color=kinds[kind], lw=0.8, marker="." if record.rank < 3 else None
                )
                shown.add(kind)
            elif record.plane_columns:
                ratios.axhline(float(record.keep_ratios().mean()), color=kinds[kind], lw=0.8)
    spectrum.set(xlabel="singular component", ylabel="singular value", xscale="log", yscale="log", title="Spectra kept")
    ratios.set(xlabel="singular component", ylabel="keep ratio", xscale="log", ylim=(0, 1.05), title="Keep ratios")
    if shown:
        spectrum.legend(fontsize=7)


def _draw_bytes(axes: Any, tensors: list[TensorReport], kinds: dict[str, str]) -> None:
    sizes: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for t in tensors:
        layer = _layer(t.name)
        sizes[_kind(t)][-1 if layer is None else layer] += t.bytes
    layers = sorted({layer for by_layer in sizes.values() for layer in by_layer})
    bottom = [0.0] * len(layers)
    for kind, by_layer in sorted(sizes.items()):
        heights = [by_layer.get(layer, 0) / 1000 for layer in layers]
        axes.bar(range(len(layers)), heights, bottom=bottom, color=kinds[kind], label=kind)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    step = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), step), ["rest" if layer < 0 else str(layer) for layer in layers][::step])
    axes.set(xlabel="layer", ylabel="kB", title="Bytes by layer")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
