"""The tables, verdicts and pictures of the study of real pairs, made from its results file alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import measure
from method_sources import code_digest
from quality_curves import curve_at, in_digits, over_seeds, picture
from results_log import write_between

from impart_hf.methods import method_names

MARKERS = "real results"
OURS = "impart-rd"
_HEADLINE = (16.0, 32.0, 128.0, 400.0)  # the ratios in README
COST_AT = 32.0  # the ratio of the columns and tables of cost
# The goal: KL of impart-rd, of that of the best other method at equal bytes, from the lowest ratio on
_GOALS = {"without text": 0.67, "with text": 0.5}
_GOAL_FROM = 16.0
_NUMBERS = (
    *("bytes", "ratio", "sidecar_bytes", "reader_bytes", "kl", "kl_error", "cross_entropy", "agreement"),
    *("final_answer", "final_answer_error", "seconds", "peak", "load_seconds", "load_peak"),
)

Row = Mapping[str, Any]
Rows = dict[str, dict[float, Row]]


class Results:
    """The newest line of every run.

    Attributes:
        pairs: description of each pair, by name, in the order in which they were measured.
        runs: of each pair, as they are in the file.
        rows: by pair, method and requested ratio: means over seeds.
        failed: pair, method and ratio of runs that the method could not do.
        others: lines of generated answers and of benchmarks.
        ratios: all requested ratios.
        machines: descriptions of the machines.
        load: the largest load average at the end of a run, which tells whether other programs ran.
        stale: names of what was measured with earlier code.
    """

    def __init__(self, lines: Sequence[Row]):
        newest = {self._key(line): line for line in lines if "about" not in line}
        self.settings = lines[0]["settings"] if lines else {}
        self.pairs: dict[str, Row] = {line["pair"]: line["about"] for line in lines if "about" in line}
        self.runs = {
            name: [line for line in newest.values() if line["pair"] == name and "kl" in line] for name in self.pairs
        }
        self.rows = {name: self._by_method(runs) for name, runs in self.runs.items()}
        self.failed = {(line["pair"], line["method"], line["asked"]) for line in newest.values() if _failed_run(line)}
        self.others = [line for line in newest.values() if "method" not in line]
        self.ratios = sorted({line["asked"] for line in newest.values() if "asked" in line})
        self.machines = sorted({_machine(line["machine"]) for line in newest.values()})
        self.load = max((line["machine"]["load average"] for line in newest.values()), default=0.0)
        self.stale = sorted(" ".join(map(str, self._key(line))) for line in newest.values() if _is_stale(line))

    @staticmethod
    def _key(line: Row) -> tuple[Any, ...]:
        names = ("pair", "method", "asked", "seed", "generated", "count", "benchmark")
        return tuple(line[name] for name in names if name in line)

    @staticmethod
    def _by_method(runs: Sequence[Row]) -> Rows:
        found: Rows = {}
        for row in over_seeds(runs, _NUMBERS):
            found.setdefault(row["method"], {})[row["asked"]] = row

        def rank(item: tuple[str, Any]) -> tuple[int, bool, bool]:
            method, *steps = item[0].split("+")
            return len(steps), "distill" in steps, method != OURS

        return dict(sorted(found.items(), key=rank))


def _failed_run(line: Row) -> bool:
    return "failed" in line and "method" in line


def _is_stale(line: Row) -> bool:
    method = line["made_by"].partition("+")[0]
    return bool(method) and (method not in method_names() or line["code"] != code_digest(line["made_by"]))


def write_report(lines: Sequence[Row], checkout: Path) -> list[str]:
    """Write README's table and the results page's between their markers, and a picture for each pair.

    Returns:
        What was measured with earlier code.

    Raises:
        ValueError: if there are no runs, or the documents lack the markers.
    """
    results = Results(lines)
    measured = [pair for pair, runs in results.runs.items() if runs]
    if not measured:
        raise ValueError("no run has been measured yet")
    for pair in measured:
        runs = sorted(results.runs[pair], key=lambda run: list(results.rows[pair]).index(run["method"]))
        picture(runs, results.pairs[pair]["base"]["kl"], checkout / "docs" / _picture(pair))
    write_between(checkout / "README.md", MARKERS, headline(results, measured[0]))
    write_between(checkout / "docs" / "results.md", MARKERS, document(results, measured))
    return results.stale


def _picture(pair: str) -> str:
    return f"real-{pair}.png"


def headline(results: Results, pair: str) -> str:
    """Return README's table: every method without text on one pair."""
    about = results.pairs[pair]
    ratios = [ratio for ratio in results.ratios if ratio in _HEADLINE] or results.ratios
    rows = {method: found for method, found in results.rows[pair].items() if "+" not in method}

    def line(method: str, found: Mapping[float, Row]) -> dict[str, str]:
        values = {f"{ratio:g}": _cell(results, pair, method, ratio, _mean_kl) for ratio in ratios}
        cost = found.get(COST_AT)
        return {"method": f"`{method}`"} | values | {
            f"MB at {COST_AT:g}": _megabytes(cost["bytes"]) if cost else "–",
            f"encoding at {COST_AT:g}, s": f"{cost['seconds']:.0f}" if cost else "–",
        }  # fmt: skip

    table = measure.table([line(method, found) for method, found in rows.items()])
    parts = [
        f"KL divergence from the fine-tune, nats per token, by compression ratio, with defaults: `{OURS}` takes its "
        f"built-in text, the others none. Gemma 3 270M's fine-tune `{pair}`, {_measured_on(about, results)}; the base "
        f"is at {about['base']['kl']:.2f}. {_dashes(results) if {'–', '×'} & set(table) else ''}".strip(),
        table,
    ]
    if shares := verdict(results, pair, "without text", ratios):
        parts.append(f"KL of `{OURS}` over that of the best other at equal bytes: {shares}.")
    return "\n\n".join([*parts, _machines(results)])


def document(results: Results, pairs: Sequence[str]) -> str:
    """Return the results page's part."""
    settings = results.settings
    parts = [
        f"Measured on {_measured_on(results.pairs[pairs[0]], results)}. Calibrated and distilled on "
        f"{settings['samples']} sequences of {settings['length']} tokens, distilled for {settings['steps']} steps. KL "
        f"is KL(fine-tune ‖ compressed), nats per token. {_dashes(results)} {_machines(results)} Load average "
        f"after a run: at most {results.load:.1f}.",
        _pairs(results, pairs),
    ]
    if results.stale:
        parts.append(f"Measured with earlier code: {'; '.join(results.stale)}.")
    tables: list[tuple[str, str, Callable[[Row], str]]] = [
        ("KL", "", _kl),
        ("Agreement", "Share of tokens for which the most likely token is the fine-tune's, per cent.", _agreement),
        (
            "Final answer",
            "Share of records whose number after `####` is predicted exactly, given the steps before it, per cent ± "
            "standard error.",
            lambda row: _per_cent(row, "final_answer"),
        ),
        ("Cross-entropy", "Nats per token.", lambda row: f"{row['cross_entropy']:.4f}"),
        ("Bytes", "Megabytes of delta file, config.json and card.", lambda row: _megabytes(row["bytes"])),
    ]
    for pair in pairs:
        parts += [f"### The pair {pair}", f"![KL against bytes on disk, {pair}]({_picture(pair)})"]
        parts += [goals(results, pair)]
        errors = [run["kl_error"] / run["kl"] for run in results.runs[pair]]
        parts.append(f"The standard error of a KL over records is {min(errors):.0%} to {max(errors):.0%} of it.")
        for title, text, cell in tables:
            parts.append(f"**{title}.** {text}".strip() + f"\n\n{_table(results, pair, cell)}")
        if cost := _cost(results, pair):
            parts.append(
                f"**Cost at {COST_AT:g}.** The tokenizer's bytes, and the loading code's, come on top. Memory is the "
                "peak of anonymous memory, of loading beyond the model itself; files are in the page cache.\n\n" + cost
            )
        parts += _others(results, pair)
    return "\n\n".join(parts)


def _measured_on(about: Row, results: Results) -> str:
    found = about["finetuned"]
    return f"{found['tokens']:,} answer tokens of {found['records']} records of {results.settings['text']}"


def _dashes(results: Results) -> str:
    return "–: not run." + (" ×: out of the method's reach." if results.failed else "")


def _machines(results: Results) -> str:
    return f"Machine: {'; '.join(results.machines)}."


def _machine(own: Row) -> str:
    """Describe a machine, without what changes from run to run."""
    name = own.get("gpu", f"{own['cpu']}, {own['threads']} of {own['cores']} cores")
    return f"{name}, torch {own['torch']}"


def _kl(row: Row) -> str:
    return in_digits(row, "kl")


def _mean_kl(row: Row) -> str:
    return in_digits({**row, "seeds": 1}, "kl")


def _agreement(row: Row) -> str:
    return f"{100 * row['agreement']:.2f}"


def _per_cent(row: Row, name: str) -> str:
    return "–" if math.isnan(row[name]) else f"{100 * row[name]:.1f} ± {100 * row[f'{name}_error']:.1f}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f}"


def _cell(results: Results, pair: str, method: str, ratio: float, cell: Callable[[Row], str]) -> str:
    row = results.rows[pair].get(method, {}).get(ratio)
    if row is not None:
        return cell(row)
    return "×" if (pair, method, ratio) in results.failed else "–"


def _table(results: Results, pair: str, cell: Callable[[Row], str]) -> str:
    return measure.table(
        [
            {"method": method} | {f"{ratio:g}": _cell(results, pair, method, ratio, cell) for ratio in results.ratios}
            for method in results.rows[pair]
        ]
    )


def _pairs(results: Results, pairs: Sequence[str]) -> str:
    def line(name: str) -> dict[str, str]:
        about = results.pairs[name]
        base, finetuned = about["base"], about["finetuned"]
        return {
            "pair": name,
            "parameters": f"{about['parameters'] / 1e6:.0f} M",
            "in changed tensors": f"{about['changed'] / 1e6:.0f} M",
            "mean ‖ΔW‖/‖W‖": f"{about['relative_delta']:.4f}",
            "KL of the base": f"{base['kl']:.3f} ± {base['kl_error']:.3f}",
            "cross-entropy, base": f"{base['cross_entropy']:.3f}",
            "fine-tune": f"{finetuned['cross_entropy']:.3f}",
            "final answer, base": _per_cent(base, "final_answer"),
            "of the fine-tune": _per_cent(finetuned, "final_answer"),
            "dense load": f"{finetuned['load_seconds']:.2f} s",
        }

    return measure.table([line(name) for name in pairs])


def _cost(results: Results, pair: str) -> str:
    found = {method: rows[COST_AT] for method, rows in results.rows[pair].items() if COST_AT in rows}
    lines = [
        {
            "method": method,
            "MB": _megabytes(row["bytes"]),
            "tokenizer's MB": _megabytes(row["sidecar_bytes"]),
            "loading code's MB": _megabytes(row["reader_bytes"]),
            "encoding, s": f"{row['seconds']:.0f}",
            "its memory, MB": f"{row['peak'] / 1e6:.0f}",
            "loading, s": f"{row['load_seconds']:.2f}",
            "its peak, MB": f"{row['load_peak'] / 1e6:.0f}",
        }
        for method, row in found.items()
    ]
    return measure.table(lines) if lines else ""


def _compared(results: Results, pair: str, effort: str) -> dict[float, tuple[Row, float, str]]:
    """Return impart-rd's row, the best other method's KL at equal bytes, and that method, by ratio."""
    rows, found = results.rows[pair], {}
    with_text = effort == "with text"
    own = {name: r for name, r in rows.items() if name.partition("+")[0] == OURS and ("+" in name) == with_text}
    peers = {n: r for n, r in rows.items() if n.partition("+")[0] != OURS and (with_text or "+" not in n)}
    for ratio in results.ratios:
        ours = min((r[ratio] for r in own.values() if ratio in r), key=lambda row: row["kl"], default=None)
        if ours is not None:
            at = {name: curve_at(r.values(), ours["bytes"]) for name, r in peers.items()}
            best, name = min(((kl, name) for name, kl in at.items() if kl is not None), default=(math.nan, "none"))
            found[ratio] = (ours, best, name)
    return found


def verdict(results: Results, pair: str, effort: str, ratios: Sequence[float]) -> str:
    """Return impart-rd's share of the best other method's KL at equal bytes, for each of these ratios."""
    compared = _compared(results, pair, effort)
    shares = {ratio: ours["kl"] / best for ratio, (ours, best, _) in compared.items() if ratio in ratios}
    return ", ".join(f"{_share(share)} at {ratio:g}" for ratio, share in shares.items() if not math.isnan(share))


def goals(results: Results, pair: str) -> str:
    """Compare impart-rd with the best other method at equal bytes, and with the goal."""
    lines, told = [], []
    for effort, goal in _GOALS.items():
        compared = _compared(results, pair, effort)
        cells = {ratio: _cell_of_goal(*found) for ratio, found in compared.items()}
        lines.append({"": effort} | {f"{ratio:g}": cells.get(ratio, "–") for ratio in results.ratios})
        told.append(f"* {effort}, at most {goal} from {_GOAL_FROM:g} on: {_reached(compared, goal)}")
    return (
        f"**`{OURS}` against the best other method at equal bytes**: its share of that method's KL. With text, either "
        f"may be calibrated or distilled.\n\n{measure.table(lines)}\n\nThe goals:\n\n" + "\n".join(told)
    )


def _share(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def _cell_of_goal(ours: Row, best: float, name: str) -> str:
    own = "" if ours["method"] == OURS else f"{ours['method'].partition('+')[2]} "
    if math.isnan(best):
        return f"{own}{ours['kl']:.3g}; no other measured at so few bytes"
    return f"{_share(ours['kl'] / best)} ({own}{ours['kl']:.3g} of {best:.3g}, {name})"


def _reached(compared: Mapping[float, tuple[Row, float, str]], goal: float) -> str:
    shares = {
        ratio: ours["kl"] / best
        for ratio, (ours, best, _) in compared.items()
        if ratio >= _GOAL_FROM and not math.isnan(best)
    }
    met = [f"{ratio:g}" for ratio, share in shares.items() if share <= goal]
    missed = [f"{ratio:g} by {share - goal:.2f}" for ratio, share in shares.items() if share > goal]
    parts = [f"met at {', '.join(met)}"] if met else []
    parts += [f"missed at {', '.join(missed)}"] if missed else []
    return "; ".join(parts) or "not measured"


def _others(results: Results, pair: str) -> Iterable[str]:
    """Yield tables of generated answers, and of the other benchmarks."""
    own = [line for line in results.others if line["pair"] == pair and "failed" not in line]
    generated = [line for line in own if "generated" in line]
    if generated:
        rows = [
            {"model": line["generated"], "records": line["count"], "exact match": _per_cent(line, "exact_match")}
            for line in generated
        ]
        title = "**Generated answers.** Right numbers of greedy answers, per cent ± standard error."
        yield f"{title}\n\n{measure.table(rows)}"
    benchmarks = {
        "load": ("loads", f"**Loading at {COST_AT:g}**, against the dense fine-tune"),
        "serving": ("starts", f"**vLLM's start at {COST_AT:g}**"),
    }
    for line in (line for line in own if "benchmark" in line):
        rows, title = benchmarks[line["benchmark"]]
        script = f"`scripts/benchmark_{line['benchmark']}.py --pair`"
        yield f"{title} ({script}).\n\n{measure.table(line['found'][rows])}"
