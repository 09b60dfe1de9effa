"""A plot of a delta repository's contents."""

from collections import defaultdict
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..modeling.delta_decode import decode_planes
from ..modeling.delta_record import FACTORED, Record
from .parts import layer_of
from .report import TensorReport, human_bytes

if TYPE_CHECKING:
    from .inspection import Inspection

_SMALL = "norms, small"  # label of all tensors that are stored whole; they share one colour


def draw(inspection: "Inspection", path: Path | BytesIO) -> None:
    """Write a plot of spectra, keep ratios and bytes by layer; to a path in the format of its suffix, otherwise as PNG.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    figure = new_figure(15, 4.6)
    spectrum, ratios, sizes = figure.subplots(1, 3)
    kinds = _colours(inspection.tensors)
    _draw_components(spectrum, ratios, inspection, kinds)
    _draw_bytes(sizes, inspection.tensors, kinds)
    method = (inspection.config.method or {}).get("name", "")
    figure.suptitle(f"{Path(inspection.source).name}: {method}, {human_bytes(inspection.delta_bytes)}")
    figure.savefig(path, dpi=130)


def check_plot(path: Path) -> None:
    """Check, before long work, that a picture can be drawn and written there.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if matplotlib writes no such file.
        NotADirectoryError: if there is no such folder.
    """
    formats = new_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        raise ValueError(f"plot: '{path}' is no picture that matplotlib writes ({', '.join(sorted(formats))})")
    if not path.parent.is_dir():
        raise NotADirectoryError(f"plot: there is no folder '{path.parent}' to write {path.name} to")


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of matplotlib, in inches.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("drawing needs matplotlib: pip install 'impart-hf[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def singular_values(record: Record, name: str) -> np.ndarray:
    """Estimate the delta's singular values from a factored record: float64, shape (rank,).

    A share q of a unit vector's squared norm is kept, and sigma includes the factor 1/q^2 and the scales of levels.
    """
    norms = [plane.dense().norm(dim=1).double().numpy() for plane in decode_planes(record, name)]
    return record.scale * record.sigma.astype(np.float64) * norms[0] * norms[1] * record.keep_ratios()


def _kind(t: TensorReport) -> str:
    """Return the module's name without its path: model.layers.3.mlp.up_proj.weight -> up_proj."""
    parts = [p for p in t.name.split(".") if not p.isdigit()]
    return _SMALL if t.kind == "kept" else parts[-2] if len(parts) > 1 else t.name


def _colours(tensors: list[TensorReport]) -> dict[str, str]:
    """Return a colour for every kind of module that is encoded, and one for the rest."""
    encoded = sorted({_kind(t) for t in tensors} - {_SMALL})
    return {**{kind: f"C{i % 10}" for i, kind in enumerate(encoded)}, _SMALL: "black"}


def _draw_components(spectrum: Any, ratios: Any, inspection: "Inspection", kinds: dict[str, str]) -> None:
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
        layer = layer_of(t.name)
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
