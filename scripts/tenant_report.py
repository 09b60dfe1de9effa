"""The table and the picture of the benchmark of tenants, made from its results file alone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import measure
from results_log import write_between
from tenant_load import PERCENTILES

MARKERS = "tenants"

Line = Mapping[str, Any]


def write_report(lines: Sequence[Line], folder: Path, into: Path | None = None) -> str:
    """Write tenants.md and tenants.png into a folder, and return the first one's text.

    Args:
        into: a document that gets the text between its markers, and the picture beside it.

    Raises:
        ValueError: if nothing has been measured yet, or the document has no markers.
    """
    if not lines:
        raise ValueError("nothing has been measured yet")
    ordered = _ordered(lines)
    text = document(ordered)
    (folder / "tenants.md").write_text(text + "\n", "utf-8")
    picture(ordered, folder / "tenants.png")
    if into is not None:
        write_between(into, MARKERS, text)
        shutil.copy(folder / "tenants.png", into.parent)
    return text


def _ordered(lines: Sequence[Line]) -> list[Line]:
    """Sort lines by tenants, rate, and the order in which the ways were measured first."""
    ways = list(dict.fromkeys(line["way"] for line in lines))
    return sorted(lines, key=lambda line: (line["tenants"], line["rate"], ways.index(line["way"])))


def document(lines: Sequence[Line]) -> str:
    """Return the table with what is needed to read it."""
    own = lines[0]["settings"]
    machines = sorted({f"{line['machine']['cpu']}, {line['machine']['cores']} cores" for line in lines})
    load = max(line["machine"]["load average"] for line in lines)
    late = max(line["client_lag"] for line in lines)
    parts = [
        f"{own['model']}, {own['dtype']}; deltas by {own['method']} at ratio {own['ratio']:g}. Open loop of "
        f"{own['seconds']:g} s: Poisson arrivals, tenants by Zipf's law with exponent {own['zipf']:g}, prompts of "
        f"{own['prompt_tokens']} tokens, streamed greedy answers of {own['tokens']}. Seconds count from when a "
        f"request was due; p50 / p90 / p99. Memory: peak resident memory of all server processes, shared pages counted "
        f"once. Client and servers share the machine: {'; '.join(machines)}. Load average at the end of a run: at most "
        f"{load:.1f}; the client sent a request at most {late:.2f} s late. "
        f"IMPART_HF_MAX_WAIT={own['max_wait']}, IMPART_HF_MIN_RESIDENCE={own['min_residence']}.",
        measure.table([_row(line) for line in lines]),
    ]
    if partial := [line for line in lines if line["served"] < line["tenants"]]:
        told = sorted({f"{line['way']}: {line['served']} of {line['tenants']}" for line in partial})
        parts.append(f"Not all tenants fit ({', '.join(told)}); requests of the others were not sent.")
    return "\n\n".join(parts)


def _row(line: Line) -> dict[str, Any]:
    served = "" if line["served"] == line["tenants"] else f" ({line['served']} served)"
    return {
        "tenants": f"{line['tenants']}{served}",
        "offered, 1/s": f"{line['rate']:g}",
        "way": line["way"],
        "requests": line["requests"],
        "failed": line["failed"],
        "requests/s": _number(line["requests_per_second"]),
        "tokens/s": _number(line["tokens_per_second"]),
        "latency, s": _percentiles(line, "latency"),
        "first token, s": _percentiles(line, "first_token"),
        "swaps": "–" if line["swaps"] is None else line["swaps"],
        "memory, GB": f"{line['peak_memory'] / 1e9:.2f}",
    }


def _percentiles(line: Line, name: str) -> str:
    return " / ".join(_number(line[f"{name}_p{percent}"]) for percent in PERCENTILES)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def picture(lines: Sequence[Line], path: Path) -> None:
    """Draw latency against tenants, for each rate: one colour per way, p50 as a line and p90 dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    rates = sorted({line["rate"] for line in lines})
    ways = list(dict.fromkeys(line["way"] for line in lines))
    tenants = sorted({line["tenants"] for line in lines})
    figure, grid = pyplot.subplots(
        1, len(rates), figsize=(3.2 + 3.2 * len(rates), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for rate, axes in zip(rates, grid[0], strict=True):
        for number, way in enumerate(ways):
            own = [line for line in lines if line["way"] == way and line["rate"] == rate and line["latency_p50"]]
            for percent, style in ((50, "-"), (90, "--")):
                axes.plot(
                    [line["tenants"] for line in own], [line[f"latency_p{percent}"] for line in own], style,
                    color=f"C{number}", marker="osD^vP*Xhp"[number % 10], markersize=5, label=f"{way}, p{percent}",
                )  # fmt: skip
        axes.set_title(f"{rate:g} requests/s", fontsize="medium")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xticks(tenants)
        axes.set_xlabel("tenants")
        axes.grid(True, which="major", color="0.9")
    grid[0][0].set_ylabel("latency, seconds")
    grid[0][-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
