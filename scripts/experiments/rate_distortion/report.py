"""The study's tables, verdict and chart, made from its results file alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import measure
from quality_curves import bytes_axes, curve_at, in_digits, over_seeds
from results_log import write_between
from variants import CALIBRATION, CODES, DEFAULT, LONG, LONGER, OURS, PARTS, PEERS, SCALES, Variant

MARKERS = "study"
DOCUMENT, PICTURE = "rate-distortion.md", "rate-distortion.png"
# The effort that is spent on a row, by the last step of its variant
_EFFORTS = {
    "": "none",
    CALIBRATION: CALIBRATION,
    SCALES: "scales distilled",
    CODES: "values distilled",
    LONG: f"{LONGER} times as long",
}
_GOAL = f"impart-qt+{CALIBRATION}", 32.0  # the quality that impart-rd should reach with fewer bytes
_NUMBERS = ("bytes", "ratio", "perplexity", "kl", "seconds")

Row = Mapping[str, Any]


class Results:
    """The results as means over seeds.

    Attributes:
        pairs: description of each pair, by name.
        ratios: all requested ratios.
        rows: by pair, variant and requested ratio.
    """

    def __init__(self, lines: Sequence[Row]):
        self.lines = lines
        self.pairs: dict[str, Row] = {line["pair"]: line["about"] for line in lines if "about" in line}
        self.rows: dict[str, dict[str, dict[float, Row]]] = {}
        for pair in self.pairs:
            done = [line for line in lines if line["pair"] == pair and "kl" in line]
            names = _NUMBERS + (("other_kl",) if "other_kl" in self.pairs[pair]["base"] else ())
            found = {(row["method"], row["asked"]): row for row in over_seeds(done, names)}
            order = sorted({name for name, _ in found}, key=_place)
            self.rows[pair] = {name: {r: row for (n, r), row in found.items() if n == name} for name in order}
        self.ratios = sorted({line["asked"] for line in lines if "asked" in line})

    def level(self, pair: str, efforts: Sequence[str], *, ours: bool) -> dict[str, dict[float, Row]]:
        """Return impart-rd's rows, or the peers', whose last step is one of `efforts`."""
        methods = (OURS,) if ours else PEERS
        found = {name: Variant.named(name) for name in self.rows[pair]}
        return {
            name: self.rows[pair][name]
            for name, variant in found.items()
            if variant.method in methods and not variant.part and variant.effort in efforts
        }


def _place(name: str) -> tuple[int, int, int]:
    """Return the sort key of a row: impart-rd, the peers, then variants with a replaced part; each by effort."""
    variant = Variant.named(name)
    methods = [OURS, *PEERS]
    method = methods.index(variant.method) if variant.method in methods else len(methods)
    part = 1 + list(PARTS).index(variant.part) if variant.part else 0
    return part, method, (CALIBRATION in variant.steps) + 2 * list(_EFFORTS).index(variant.effort)


def write_report(lines: Sequence[Row], folder: Path) -> None:
    """Write the report between the document's markers, and the chart next to it."""
    results = Results(lines)
    if not any(results.rows.values()):
        raise ValueError("there are no results yet")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / DOCUMENT
    if not path.exists():
        path.write_text(f"<!-- {MARKERS}: begin --><!-- {MARKERS}: end -->\n", encoding="utf-8")
    write_between(path, MARKERS, markdown(results))
    _picture(results, folder / PICTURE)


def markdown(results: Results) -> str:
    settings = results.lines[0]["settings"]
    parts = [
        f"KL(fine-tune ‖ compressed), nats per token, on {settings['tokens']:,} tokens in sequences of "
        f"{settings['length']}; calibrated and distilled on {settings['samples']} such sequences, distilled for "
        f"{settings['steps']} steps. Mean over seeds ± half the range; without ± for a single seed.",
        f"![KL against bytes]({PICTURE})",
        _pairs(results),
        "### Verdict",
        _verdict(results),
        "### Parts of impart-rd\n\nChange of the KL when a part is replaced, or a step is taken.",
        *(f"`{pair}`\n\n{table}" for pair in results.pairs if (table := _parts(results, pair))),
    ]
    for pair in results.pairs:
        parts += [f"### {pair}, text of the task", _numbers(results, pair, "kl")]
        if "other_kl" in results.pairs[pair]["base"]:
            parts += [f"### {pair}, text of the base's kind", _numbers(results, pair, "other_kl")]
    return "\n\n".join([*parts, "### What is missing", _missing(results), _machines(results)])


def _pairs(results: Results) -> str:
    def line(name: str, about: Row) -> dict[str, str]:
        base, finetuned = about["base"], about["finetuned"]
        return {
            "pair": name,
            "parameters": f"{about['parameters'] / 1e6:.2f} M",
            "hidden × layers": f"{about['hidden']} × {about['layers']}",
            "mean ‖ΔW‖/‖W‖": f"{about['relative_delta']:.3f}",
            "perplexity, base": f"{base['perplexity']:.2f}",
            "fine-tune": f"{finetuned['perplexity']:.2f}",
            "KL of the base": f"{base['kl']:.3f}",
            "on the base's kind of text": f"{base['other_kl']:.3f}" if "other_kl" in base else "",
        }

    return measure.table([line(name, about) for name, about in results.pairs.items()])


def _numbers(results: Results, pair: str, number: str) -> str:
    def cell(row: Row | None) -> str:
        if row is None:
            return "–"
        return in_digits(row, number)

    return measure.table(
        [
            {"method": name} | {f"{ratio:g}": cell(found.get(ratio)) for ratio in results.ratios}
            for name, found in results.rows[pair].items()
        ]
    )


def _parts(results: Results, pair: str) -> str:
    """Return a table of what each part of impart-rd does, in per cent of KL."""
    rows, table = results.rows[pair], []
    for steps in ("", f"+{CODES}"):
        whole = rows.get(OURS + steps)
        if not whole:
            continue
        others = [name for name in rows if name.startswith(f"{OURS}/") and Variant.named(name).effort == steps[1:]]
        if not steps:
            others += [name for name in rows if name.startswith(f"{OURS}+")]
        table.append(
            {"": f"**{OURS}{steps}**"} | {f"{r:g}": _short(whole[r]["kl"]) for r in results.ratios if r in whole}
        )
        for name in others:
            both = [ratio for ratio in results.ratios if ratio in whole and ratio in rows[name]]
            changes = {f"{r:g}": f"{100 * (rows[name][r]['kl'] / whole[r]['kl'] - 1):+.0f} %" for r in both}
            table.append({"": name} | changes)
    return measure.table([{"": ""} | {f"{r:g}": "" for r in results.ratios} | line for line in table]) if table else ""


def _short(value: float) -> str:
    return f"{value:.3g}"


def reached(rows: Iterable[Row], target: float) -> float | None:
    """Return the highest ratio at which the KL is at most `target`; None if there is none.

    Interpolated logarithmically between rows; not extrapolated beyond the last one.
    """
    points = sorted((row["ratio"], row["kl"]) for row in rows)
    best = None
    for number, (ratio, value) in enumerate(points):
        if value <= target:
            best = ratio
            if number + 1 < len(points) and (after := points[number + 1])[1] > target:
                share = math.log(target / value) / math.log(after[1] / value)
                best = math.exp(math.log(ratio) + share * math.log(after[0] / ratio))
    return best


def _verdict(results: Results) -> str:
    """Compare impart-rd with the best peer at equal bytes, and give its ratio at ImPart-Qt's quality at 32."""
    table, goals = [], []
    counts = {title: [0, 0] for title in _EFFORTS.values()}  # how many are won, and how many compared
    for pair in results.pairs:
        for number, (effort, title) in enumerate(_EFFORTS.items(), 1):
            allowed = list(_EFFORTS)[:number]
            ours, peers = (results.level(pair, allowed, ours=is_ours) for is_ours in (True, False))
            line = {"pair": pair, "effort": title} | {f"{ratio:g}": "–" for ratio in results.ratios}
            for ratio in results.ratios:
                if not any(ratio in rows for rows in results.level(pair, [effort], ours=True).values()):
                    continue
                own = min((rows[ratio] for rows in ours.values() if ratio in rows), key=lambda row: row["kl"])
                at = {name: curve_at(rows.values(), own["bytes"]) for name, rows in peers.items()}
                best, name = min(((kl, name) for name, kl in at.items() if kl is not None), default=(None, ""))
                less = "" if Variant.named(own["method"]).effort == effort else f" {own['method']}"
                if best is None:
                    line[f"{ratio:g}"] = f"{_short(own['kl'])}{less} / none"
                    continue
                counts[title] = [counts[title][0] + (own["kl"] < best), counts[title][1] + 1]
                mark = "**" if own["kl"] < best else ""
                line[f"{ratio:g}"] = f"{mark}{_short(own['kl'])}{mark}{less} / {_short(best)} {name}"
            table.append(line)
        goals.append(f"* `{pair}`: {_goal(results, pair)}")
    by_effort = ", ".join(f"{title} {won} of {all_}" for title, (won, all_) in counts.items() if all_)
    won, compared = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    long = sorted({Variant.named(name).method for name in DEFAULT if name.endswith(LONG)} - {OURS})
    return (
        "KL of impart-rd / KL of the best peer at equal bytes, each with this effort or less. Bold: it is lower; "
        f"none: no peer has such a small file, and nothing is compared. impart-rd is lower in {won} of {compared}: "
        f"{by_effort}. (Of the peers, only {' and '.join(long)} are distilled {_EFFORTS[LONG]}.)\n\n"
        f"{measure.table(table)}\n\n"
        f"The highest ratio at which impart-rd is no worse than {_GOAL[0]} at {_GOAL[1]:g} (wanted: 128 on every pair, "
        "200 on one), interpolated between the measured ratios on logarithmic scales:\n\n" + "\n".join(goals)
    )


def _goal(results: Results, pair: str) -> str:
    target = results.rows[pair].get(_GOAL[0], {}).get(_GOAL[1])
    if target is None:
        return f"{_GOAL[0]} at {_GOAL[1]:g} has not been run"
    found = []
    for effort, title in _EFFORTS.items():
        for name, rows in results.level(pair, [effort], ours=True).items():
            ratio = reached(rows.values(), target["kl"])
            at = "none of the measured" if ratio is None else f"{ratio:.0f}"
            missed = [f"{rows[r]['kl'] / target['kl']:.2f} times at {r:g}" for r in (128.0, 200.0) if r in rows]
            found.append(f"{name} ({title}) {at}" + (f" (its KL: {', '.join(missed)})" if missed else ""))
    return f"KL {_short(target['kl'])} at {target['ratio']:.1f}. " + "; ".join(found)


def _missing(results: Results) -> str:
    done: dict[tuple[str, str], int] = {}
    for line in results.lines:
        if "asked" in line:
            variant, key = Variant.named(line["method"]), (line["pair"], line["method"])
            done[key] = done.get(key, 0) + (line["asked"] in variant.ratios and line["seed"] in variant.seeds)
    texts = []
    for pair in results.pairs:
        wanted = {name: len(Variant.named(name).ratios) * len(Variant.named(name).seeds) for name in DEFAULT}
        lacking = [
            f"{name} {done.get((pair, name), 0)} of {n}" for name, n in wanted.items() if done.get((pair, name), 0) < n
        ]
        texts.append(f"* `{pair}`: {', '.join(lacking)}" if lacking else f"* `{pair}`: nothing")
    failed = sorted({(line["pair"], line["method"], line["asked"]) for line in results.lines if "failed" in line})
    if failed:
        texts.append("* out of reach: " + ", ".join(f"{pair} {name} at {ratio:g}" for pair, name, ratio in failed))
    return "Runs that a whole study has and that are missing:\n\n" + "\n".join(texts)


def _machines(results: Results) -> str:
    machines = {
        ", ".join(f"{name} {value}" for name, value in line["machine"].items() if name != "load average")
        for line in results.lines
        if "machine" in line
    }
    hours = sum(line.get("seconds", 0.0) for line in results.lines) / 3600
    return f"Machine: {'; '.join(sorted(machines))}. Compressing alone took {hours:.1f} hours."


def _picture(results: Results, path: Path) -> None:
    """Draw KL against bytes: one column per pair, without distillation above and with it below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs = [pair for pair in results.pairs if results.rows[pair]]
    figure, panels = pyplot.subplots(
        2, len(pairs), figsize=(1.8 + 4.6 * len(pairs), 8.4), layout="constrained", squeeze=False
    )
    colors = dict(zip(PEERS, pyplot.get_cmap("Set2").colors, strict=False)) | {OURS: "crimson"}
    styles_above, styles_below = {"": "-", CALIBRATION: "--"}, {SCALES: ":", CODES: "-", LONG: "--"}
    legends: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for column, pair in enumerate(pairs):
        everything = [row for rows in results.rows[pair].values() for row in rows.values()]
        whole = next(line["checkpoint_bytes"] for line in results.lines if line["pair"] == pair and "kl" in line)
        for axes, styles, legend in zip(panels[:, column], (styles_above, styles_below), legends, strict=True):
            for name, rows in results.rows[pair].items():
                variant = Variant.named(name)
                if (
                    variant.part
                    or variant.effort not in styles
                    or len(variant.steps) > 1
                    or variant.method not in colors
                ):
                    continue
                own = sorted(rows.values(), key=lambda row: row["bytes"])
                ours = variant.method == OURS
                (legend[name],) = axes.plot(
                    [row["bytes"] for row in own], [max(row["kl"], 1e-9) for row in own], styles[variant.effort],
                    color=colors[variant.method], linewidth=2.6 if ours else 1.2, marker="o", zorder=3 if ours else 2,
                    markersize=4, label=name,
                )  # fmt: skip
            bytes_axes(axes, [r["bytes"] for r in everything], results.ratios, whole)
            axes.set_ylim(min(r["kl"] for r in everything) / 1.3, max(r["kl"] for r in everything) * 1.3)
            axes.grid(True, which="major", color="0.9")
        panels[0, column].set_title(pair, fontweight="bold")
        panels[1, column].set_xlabel("bytes on disk of the delta repository")
    for axes, title, legend, last in zip(panels[:, 0], ("not", ""), legends, panels[:, -1], strict=True):
        axes.set_ylabel(f"{title} distilled: KL, nats a token".strip())
        last.legend(legend.values(), legend.keys(), frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
