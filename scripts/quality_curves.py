"""Quality against bytes: means over seeds, values between the measured sizes, and pictures."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = Mapping[str, Any]
ANSWERS = "right_answers"  # in runs: the share of them
NUMBERS = ("bytes", "ratio", "perplexity", "kl")
_SLACK = 1.02  # sizes that differ by a smaller factor count as equal


def over_seeds(runs: Iterable[Mapping[str, Any]], names: Sequence[str] = NUMBERS) -> list:
    """Return one row per method and requested ratio: for each number the mean over seeds, and half the range."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["method"], run["asked"]), []).append(run)
    rows = []
    for (method, asked), group in groups.items():
        row: dict[str, Any] = {"method": method, "asked": asked, "seeds": len(group)}
        for name in names:
            values = [run[name] for run in group]
            row[name], row[f"{name}_spread"] = statistics.fmean(values), (max(values) - min(values)) / 2
        rows.append(row)
    return rows


def in_digits(row: Row, name: str) -> str:
    """Return a number of a row of `over_seeds` in three digits or more, with its spread if there are several seeds."""
    digits = max(2, 2 - math.floor(math.log10(max(row[name], 1e-9))))
    return f"{row[name]:.{digits}f}" + (f" ± {row[f'{name}_spread']:.{digits}f}" if row["seeds"] > 1 else "")


def bytes_axes(axes: Any, sizes: Sequence[float], asked: Iterable[float], checkpoint_bytes: int) -> None:
    """Make both matplotlib axes logarithmic, with bytes on the lower axis and compression ratios on the upper one.

    Args:
        sizes: all bytes that are drawn.
        asked: the ratios to mark.
        checkpoint_bytes: the bytes at ratio 1.
    """
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    low, high = (round(math.log2(size)) for size in (min(sizes), max(sizes)))
    axes.set_xticks([2.0**tick for tick in range(low - 1, high + 2)])
    axes.set_xlim(min(sizes) / 1.2, max(sizes) * 1.2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _human(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))
    axes.xaxis.set_minor_formatter(NullFormatter())

    def inverse(value: Any) -> Any:
        return checkpoint_bytes / np.maximum(value, 1e-9)  # matplotlib also evaluates it at zero

    top = axes.secondary_xaxis("top", functions=(inverse, inverse))
    top.set_xticks(sorted(set(asked)), [f"{value:g}x" for value in sorted(set(asked))])
    top.minorticks_off()
    top.set_xlabel("compression ratio")


def _human(size: float) -> str:
    power = min(3, int(math.log(size, 1024)))
    return f"{size / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def curve_at(rows: Iterable[Row], size: float) -> float | None:
    """Return the KL at a size in bytes, interpolated logarithmically between rows; None below the smallest."""
    points = sorted((row["bytes"], row["kl"]) for row in rows)
    if not points or size * _SLACK < points[0][0]:
        return None
    sizes, values = np.log(np.array(points)).T
    return math.exp(np.interp(math.log(size), sizes, values))


def picture(runs: Sequence[Row], base_kl: float, path: Path, shares: Mapping[str, float] | None = None) -> None:
    """Draw KL against bytes, both on logarithmic axes, with one line per method: the means over seeds.

    Args:
        runs: each with method, asked, seed, bytes, kl and checkpoint_bytes.
        base_kl: the base's KL, or NaN.
        shares: the shares of right answers of models to compare with, by name. They are drawn below, with those of the
            runs, if given.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels, height = (2, 8.0) if shares else (1, 4.8)
    figure, found = pyplot.subplots(panels, squeeze=False, sharex=True, figsize=(9.5, height), layout="constrained")
    axes, lowest = found[0, 0], found[-1, 0]
    _lines(axes, [{**run, "kl": max(run["kl"], 1e-9)} for run in runs], "kl")
    if math.isfinite(base_kl):
        axes.axhline(base_kl, color="0.35", linestyle="--", linewidth=1, label="base (no delta)")
    bytes_axes(axes, [run["bytes"] for run in runs], [run["asked"] for run in runs], runs[0]["checkpoint_bytes"])
    axes.set_ylabel("KL(fine-tuned || compressed), nats per token")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    if shares:
        _lines(lowest, runs, ANSWERS)
        styles = zip(shares.items(), itertools.cycle(("--", ":")))
        drawn = [lowest.axhline(share, color="0.35", linestyle=line, label=name) for (name, share), line in styles]
        lowest.legend(handles=drawn, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        lowest.set_ylabel("share of right answers")
    lowest.set_xlabel("bytes on disk of the delta repository")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _lines(axes: Any, runs: Sequence[Row], name: str) -> None:
    """Draw a number of the runs against their bytes, a line per method."""
    from matplotlib import pyplot

    rows = over_seeds(runs, ("bytes", name))
    # 10 colors and 11 markers have no common divisor, so their pairs suffice for all methods
    styles = zip(itertools.cycle(pyplot.get_cmap("tab10").colors), itertools.cycle("osD^vP*Xhp<"))
    for method in dict.fromkeys(row["method"] for row in rows):
        color, marker = next(styles)
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["bytes"])
        sizes, values = [row["bytes"] for row in own], [row[name] for row in own]
        axes.plot(sizes, values, color=color, marker=marker, markersize=5, label=method)
        seeds = [r for r in runs if r["method"] == method]
        if len({r["seed"] for r in seeds}) > 1:  # each seed is a faint point
            axes.plot([r["bytes"] for r in seeds], [r[name] for r in seeds], ".", color=color, alpha=0.4)
    axes.grid(True, which="major", color="0.9")
