"""The curve of a recipe: the quality of the models along the way against what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.files import atomic_write
from ..repository.plot import new_figure

_Model = Mapping[str, Any]
_Values = Sequence[float | None]  # of all models; None where it is not known

_COLUMNS = 4
_MOST_TASKS = 4  # that are drawn, of groups of dozens


def draw(models: Sequence[_Model], path: Path) -> bool:
    """Draw each quality that was measured against each cost, into a PNG file.

    Qualities are perplexity, and the first score of each task, of the first four tasks, with its standard error.

    Args:
        models: of every measured model its `StageResult.to_dict()`, in the order in which they were made.

    Returns:
        Whether the picture is as it should be: drawn, or not there because no quality was measured. False if
        matplotlib is not installed.
    """
    qualities = {name: found for name, found in _qualities(models).items() if any(v is not None for v, _ in found)}
    costs = {name: values for name, values in _costs(models).items() if any(v is not None for v in values)}
    if not qualities:
        path.unlink(missing_ok=True)
        return True
    rows_each = -(-len(costs) // _COLUMNS)
    columns = min(_COLUMNS, len(costs))
    try:
        figure = new_figure(3.4 * columns, 0.6 + 2.8 * rows_each * len(qualities))
    except ModuleNotFoundError:
        return False
    names = [model["stage"] for model in models]
    panels = figure.subplots(rows_each * len(qualities), columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for number, (quality, heights) in enumerate(qualities.items()):
        own = panels[number * rows_each : (number + 1) * rows_each].flat
        for axes, (cost, widths) in zip(own, costs.items(), strict=False):
            axes.set_axis_on()
            axes.set(xlabel=cost, ylabel=quality)
            _draw_curve(axes, widths, heights, names)
    figure.suptitle(", ".join(names), fontsize=8)
    with atomic_write(path) as new:
        figure.savefig(new, dpi=110, format="png")
    return True


def _draw_curve(
    axes: Any, widths: _Values, heights: Sequence[tuple[float | None, float | None]], names: Sequence[str]
) -> None:
    """Draw the models as points in their order, each with its stage's number; the last one is filled.

    Args:
        heights: values, each with its standard error if it has one.
    """
    points = [
        (x, y, error or 0.0, name)
        for x, (y, error), name in zip(widths, heights, names, strict=True)
        if None not in (x, y)
    ]
    axes.errorbar(*([point[i] for point in points] for i in range(3)), color="0.75", linewidth=0.8, zorder=1)
    for x, y, _, name in points:
        axes.scatter([x], [y], s=22, edgecolor="C0", color="C0" if name == names[-1] else "white", zorder=2)
        axes.annotate(name.partition("-")[0], (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.margins(0.15)
    axes.grid(True, color="0.93")


def _qualities(models: Sequence[_Model]) -> dict[str, list[tuple[float | None, float | None]]]:
    """Return what was measured of the models' quality, with standard errors where there are some, by its name."""
    evaluations = [model["evaluation"] for model in models]
    found: dict[str, list[tuple[float | None, float | None]]] = {
        "perplexity": [(evaluation["perplexity"], None) for evaluation in evaluations]
    }
    tasks = list(dict.fromkeys(score["task"] for score in evaluations[0]["scores"]))
    for task in tasks[:_MOST_TASKS]:
        firsts = [next(score for score in e["scores"] if score["task"] == task) for e in evaluations]
        found[f"{task}, {firsts[0]['metric']}"] = [(score["value"], score["stderr"]) for score in firsts]
    return found


def _costs(models: Sequence[_Model]) -> dict[str, _Values]:
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
