"""A table with its measured numbers beside the published ones, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .planning import Entry
from .tables import Mean, Row, Table

_NOTHING = "–"


def rendered(
    table: Table, entries: Sequence[Entry], results: Mapping[str, Mapping[str, Any]], why_not: Mapping[str, str],
    remarks: Iterable[str] = (),
) -> str:  # fmt: skip
    """Return a table in Markdown.

    A cell is "measured ± standard error (published, difference)"; a dash stands for what there is not.

    Args:
        entries: the rows that are shown.
        results: lines of results, by the keys of entries.
        why_not: why an entry has no result, by its key, for those for which something is known.
        remarks: what is said before the table.
    """
    found = {entry.row.id: results[entry.key] for entry in entries if entry.key in results}
    reasons = {
        entry.row.id: entry.needs and f"needs {entry.needs}" or why_not.get(entry.key, "not run yet")
        for entry in entries
        if entry.key not in results
    }
    rows = {entry.row.id: entry.row for entry in entries}
    columns = list(dict.fromkeys(_column(row, table) for row in rows.values()))
    means = [mean for mean in table.means if not mean.rows or any(row in rows for row in mean.rows)]
    headings = ["", *columns, *(["mean"] if any(_of_line(mean) for mean in means) else []), "ratio on disk"]
    lines = [headings]
    for line in dict.fromkeys(row.line for row in rows.values()):
        own = [row for row in rows.values() if row.line == line]
        cells = {_column(row, table): _cell(row, found.get(row.id), table.factor) for row in own}
        if mean := next((mean for mean in means if _of_line(mean) == line.name), None):
            cells["mean"] = _mean_cell(mean, found, table.factor)
        cells["ratio on disk"] = _ratios(found[row.id] for row in own if row.id in found)
        lines.append([line.label, *(cells.get(column, "") for column in headings[1:])])
    parts = [f"## {table.title}", *remarks, markdown(lines)]
    others = [mean for mean in means if _of_line(mean) is None]
    if others:
        parts.append(markdown([["mean", "score"], *([m.id, _mean_cell(m, found, table.factor)] for m in others)]))
    parts.append(
        f"Measured ± standard error (published, difference), in {'percent' if table.factor == 100 else 'shares'}. "
        f"Published: {table.paper}, {table.place}. Ratios on disk count all bytes of the repository, embeddings and "
        "norms included; the papers' count kept parameters of linear layers."
    )
    if differs := dict.fromkeys(f"{e.task.label}: {e.task.differs}" for e in entries if e.task.differs):
        parts.append("Asked otherwise than in the paper: " + "; ".join(differs) + ".")
    if reasons:
        parts.append("Not measured:\n\n" + "\n".join(_grouped(reasons)))
    unpublished = {row.id: row.reason for row in rows.values() if row.published is None}
    unpublished |= {mean.id: mean.reason for mean in means if mean.published is None}
    if unpublished:
        parts.append("Without a published number:\n\n" + "\n".join(_grouped(unpublished)))
    if machines := dict.fromkeys(_machine(line) for line in found.values()):
        parts.append("Measured on: " + "; ".join(machines) + ".")
    return "\n\n".join(parts) + "\n"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row has the headings."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _column(row: Row, table: Table) -> str:
    parts = {"model": row.model.name, "task": row.task.label}
    return " ".join(parts[name] for name in table.columns)


def _of_line(mean: Mean) -> str | None:
    """Return the line whose mean it is; None if it is over several lines, or over one of several models of a line."""
    line, _, rest = mean.id.partition("/")
    return line if rest == "mean" else None


def _cell(row: Row, result: Mapping[str, Any] | None, factor: float) -> str:
    value = None if result is None else factor * result["value"]
    error = None if result is None or result["stderr"] is None else factor * result["stderr"]
    return _text(value, error, row.published, factor)


def _mean_cell(mean: Mean, found: Mapping[str, Mapping[str, Any]], factor: float) -> str:
    lines = [found[row] for row in mean.rows if row in found]
    value = error = None
    if lines and len(lines) == len(mean.rows):
        value = factor * sum(line["value"] for line in lines) / len(lines)
        if all(line["stderr"] is not None for line in lines):  # of independent questions
            error = factor * math.sqrt(sum(line["stderr"] ** 2 for line in lines)) / len(lines)
    return _text(value, error, mean.published, factor)


def _text(value: float | None, error: float | None, published: float | None, factor: float) -> str:
    digits = 2 if factor == 100 else 3
    measured = _NOTHING if value is None else f"{value:.{digits}f}"
    if error is not None:
        measured += f" ± {error:.{digits}f}"
    if published is None:
        return measured
    difference = "" if value is None else f", {value - published:+.{digits}f}"
    return f"{measured} ({published:.{digits}f}{difference})"


def _ratios(lines: Iterable[Mapping[str, Any]]) -> str:
    """Return the ratio of a line's repositories, or the smallest and largest of them."""
    ratios = sorted({round(line["model"]["ratio"], 1) for line in lines if "ratio" in line["model"]})
    if not ratios:
        return ""
    return f"{ratios[0]:g}" if len(ratios) == 1 else f"{ratios[0]:g} to {ratios[-1]:g}"


def _grouped(reasons: Mapping[str, str]) -> list[str]:
    """Return a line for each reason, with the rows that have it."""
    by_reason: dict[str, list[str]] = {}
    for row, reason in reasons.items():
        by_reason.setdefault(reason, []).append(row)
    return [f"- {', '.join(f'`{row}`' for row in rows)}: {reason}" for reason, rows in by_reason.items()]


def _machine(line: Mapping[str, Any]) -> str:
    machine, limit = line["machine"], line["identity"]["limit"]
    parts = [f"{machine['cpu']}, {machine['cores']} cores", *([machine["gpu"]] if "gpu" in machine else [])]
    parts += [f"torch {machine['torch']}", f"impart-hf {line['identity']['impart_hf']}"]
    return ", ".join([*parts, *([f"limit {limit}"] if limit is not None else [])])
