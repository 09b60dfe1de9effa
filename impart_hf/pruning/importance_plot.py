"""A chart of an importance report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .choices import SCORES
from .importance_report import Importance

_NAMES = {"igia": "IGIA", "gradient_norm": "gradient norm"}


def draw(importance: Importance, path: Path) -> bool:
    """Draw both scores of the layers as bars, and the IGIA of the heads as a heat map, into a PNG file.

    Returns:
        False, with nothing drawn, if matplotlib is not installed.
    """
    try:
        # pyplot would keep the figure in memory and may need a display
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    layers = len(importance.shape.layers)
    figure = Figure(figsize=(max(6.0, 2 + 0.3 * layers), 7.0), layout="constrained")
    FigureCanvasAgg(figure)
    bars, heads = figure.subplots(2, 1, sharex=True)
    for number, score in enumerate(SCORES):
        values = importance.layers[score].numpy()
        shares = 100 * values / values.sum() if values.sum() > 0 else values
        bars.bar(np.arange(layers) + 0.4 * (number - 0.5), shares, 0.4, label=_NAMES[score])
    if all((importance.layers[score] > 0).all() for score in SCORES):
        bars.set_yscale("log")  # the first layer's share is often a hundred times the second's
    bars.set_ylabel("share of the model's score, %")
    bars.set_title(f"{importance.model}: importance by layer, {importance.steps} steps")
    bars.legend()
    per_layer = [scores.numpy() for scores in importance.heads["igia"]]
    # Layers may have different numbers of heads; missing heads and heads with a score of zero stay blank
    table = np.full((max(map(len, per_layer)), layers), np.nan)
    for layer, scores in enumerate(per_layer):
        table[: len(scores), layer] = np.where(scores > 0, scores, np.nan)
    if np.isfinite(table).any():
        low, high = np.nanmin(table), np.nanmax(table)
        norm = LogNorm(low, high) if low < high else None
        shades = heads.imshow(table, norm=norm, aspect="auto", interpolation="nearest")
        figure.colorbar(shades, ax=heads, label="IGIA of the attention head")
    heads.set_xlabel("decoder layer")
    heads.set_ylabel("attention head")
    for axis in (heads.xaxis, heads.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)
    return True
