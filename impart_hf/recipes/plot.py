"""The curve of a recipe: the quality of the models along the way against what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.files import atomic_write
from ..repository.plot import new_figure

_Model = Mapping[str, Any]


def draw(models: Sequence[_Model], path: Path) -> bool:
    """Draw a row for each quality that was measured and a column for each cost, into a PNG file.

    Args:
        models: of every measured model its `StageResult.to_dict()`, in the order in which they were made.

    Returns:
        Whether the picture is as it should be: drawn, or not there because no quality was measured. False if
        matplotlib is not installed.
    """
    qualities = {name: values for name, values in _qualities(models).items() if any(v is not None for v in values)}
    costs = {name: values for name, values in _costs(models).items() if any(v is not None for v in values)}
    if not qualities:
        path.unlink(missing_ok=True)
        return True
    try:
        figure = new_figure(3.6 * len(costs), 0.6 + 3.0 * len(qualities))
    except ModuleNotFoundError:
        return False
    names = [model["stage"] for model in models]
    panels = figure.subplots(len(qualities), len(costs), squeeze=False, sharey="row")
    for row, (quality, heights) in zip(panels, qualities.items(), strict=True):
        for axes, (cost, widths) in zip(row, costs.items(), strict=True):
            points = [(x, y, name) for x, y, name in zip(widths, heights, names, strict=True) if None not in (x, y)]
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color="0.75", linewidth=0.8, zorder=1)
            for x, y, name in points:
                axes.scatter([x], [y], s=18, color="C0" if name == names[-1] else "C1", zorder=2)
                axes.annotate(name.partition("-")[0], (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7)
            axes.grid(True, color="0.93")
            axes.set_xlabel(cost)
            if quality == _PERPLEXITY:
                axes.set_yscale("log")
        row[0].set_ylabel(quality)
    figure.suptitle("  ".join(names), fontsize=7)
    with atomic_write(path) as new:
        figure.savefig(new, dpi=130, format="png")
    return True


_PERPLEXITY = "perplexity"


def _qualities(models: Sequence[_Model]) -> dict[str, list[float | None]]:
    """Return what was measured of the models' quality, by its name."""
    evaluations = [model["evaluation"] for model in models]
    metric = next((e["task_metric"] for e in evaluations if e["task_metric"] is not None), "task score")
    return {_PERPLEXITY: [e["perplexity"] for e in evaluations], metric: [e["task_score"] for e in evaluations]}


def _costs(models: Sequence[_Model]) -> dict[str, list[float | None]]:
    """Return the models' costs, by their names."""
    costs = [model["evaluation"]["cost"] for model in models]
    latencies = [model["evaluation"]["latency"] for model in models]
    return {
        "parameters, millions": [cost["parameters"] / 1e6 for cost in costs],
        "prefill, MFLOP/token": [cost["prefill_flops_per_token"] / 1e6 for cost in costs],
        "decode, MFLOP/token": [cost["decode_flops_per_token"] / 1e6 for cost in costs],
        "KV cache, bytes/token": [sum(cost["kv_cache_bytes_per_token"]) for cost in costs],
        "on disk, MB": [None if model["disk_bytes"] is None else model["disk_bytes"] / 1e6 for model in models],
        "prefill, ms": [None if found is None else found["prefill_seconds"] * 1e3 for found in latencies],
        "decode, ms/token": [None if found is None else 1e3 / found["decode_tokens_per_second"] for found in latencies],
    }
