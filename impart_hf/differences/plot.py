"""A picture of what differs: changed shares and bits by layer and kind, and spectra."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..repository.plot import new_figure
from .groups import Group, layer_label
from .tensor_diff import TensorDiff

if TYPE_CHECKING:
    from .report import DiffReport

_FAINT = 0.6  # opacity of a spectrum's line, of which there is one for each layer


def draw(report: "DiffReport", path: Path) -> None:
    """Write a picture: two heat maps of layers and kinds, and a line for the spectrum of each tensor's first matrix.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    figure = new_figure(17, max(4.6, 1.5 + 0.22 * len(report.layers)))
    shares, bits, spectra = figure.subplots(1, 3)
    layers, kinds = [group.label for group in report.layers], [group.label for group in report.kinds]
    cells: dict[tuple[str, str], list[TensorDiff]] = {}
    for tensor in report.tensors:
        cells.setdefault((layer_label(tensor), tensor.kind), []).append(tensor)
    groups = {place: Group.of("", own) for place, own in cells.items()}
    _draw_map(shares, "Entries that changed, %", layers, kinds, {at: 100 * g.share for at, g in groups.items()})
    _draw_map(bits, "Bits per entry of an exact store", layers, kinds, {at: g.bits for at, g in groups.items()})
    _draw_spectra(spectra, report.tensors, kinds)
    figure.suptitle(f"{Path(report.base).name} to {Path(report.finetuned).name}")
    figure.savefig(path, dpi=130)


def _draw_map(axes: Any, title: str, layers: list[str], kinds: list[str], values: dict[tuple[str, str], float]) -> None:
    """Draw a value for every layer and kind that has tensors."""
    cells = np.full((len(layers), len(kinds)), np.nan)
    for (layer, kind), value in values.items():
        cells[layers.index(layer), kinds.index(kind)] = value
    image = axes.imshow(cells, aspect="auto", interpolation="nearest", vmin=0)
    axes.figure.colorbar(image, ax=axes)
    step = max(1, len(layers) // 24)
    axes.set_yticks(range(0, len(layers), step), layers[::step])
    axes.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", fontsize=8)
    axes.set(ylabel="layer", title=title)


def _draw_spectra(axes: Any, tensors: tuple[TensorDiff, ...], kinds: list[str]) -> None:
    shown: set[str] = set()
    for tensor in tensors:
        if not tensor.spectra:
            continue
        sigma, kind = tensor.spectra[0].sigma, tensor.kind
        label = None if kind in shown else kind
        axes.plot(
            np.arange(1, len(sigma) + 1), sigma, color=f"C{kinds.index(kind) % 10}", lw=0.8, alpha=_FAINT, label=label
        )
        shown.add(kind)
    axes.set(xlabel="singular component", ylabel="singular value", xscale="log", yscale="log", title="Spectra")
    if shown:
        axes.legend(fontsize=7)
