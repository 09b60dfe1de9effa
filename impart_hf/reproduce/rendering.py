"""A table with its measured numbers beside the published ones, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.journal import Journal
from ..evaluation.tables import markdown_table
from .planning import Entry
from .tables import Mean, Row, Table

_NOTHING = "–"
_MEAN, _RATIO = "mean", "ratio on disk"


def rendered(
    table: Table,
    entries: Sequence[Entry],
    results: Journal,
    why_not: Mapping[str, str],
    remark: str = "",
    *,
    compares: bool = True,
) -> str:
    """Return a table in Markdown.

    Args:
        entries: the rows that are shown.
        results: the results, by the keys of entries.
        why_not: why an entry has no result, by its key, for those for which something is known.
        remark: what is said before the table; empty for nothing.
        compares: whether measured and published numbers can be compared, so that differences are shown.
    """
    rows = [entry.row for entry in entries]
    found = {entry.row.id: results[entry.key] for entry in entries if entry.key in results}
    numbers = _Numbers(found, table.factor, compares)
    means = [mean for mean in table.means if not mean.rows or any(row.id in mean.rows for row in rows)]
    parts = [f"## {table.title}", *([remark] if remark else []), _lines(table, rows, means, numbers)]
    if others := [mean for mean in means if _line_of(mean) is None]:
        parts.append(markdown_table([{"mean of several": mean.id, "score": numbers.mean(mean)} for mean in others]))
    parts.append(
        f"Measured ± standard error (published{', difference' if compares else ''}), in "
        f"{'percent' if table.factor == 100 else 'shares of 1'}. Published: {table.paper}, {table.place}. The ratio on "
        "disk counts all bytes of a repository, embeddings and norms included; the papers' ratios count parameters of "
        "linear layers."
    )
    if differs := dict.fromkeys(f"{e.task.label}: {e.task.differs}" for e in entries if e.task.differs):
        parts.append(f"Asked otherwise than in the paper: {'; '.join(differs)}.")
    missing = {
        entry.row: f"needs {entry.needs}" if entry.needs else why_not.get(entry.key, "not run yet")
        for entry in entries
        if entry.key not in results
    }
    for title, reasons in (
        ("Not measured", missing),
        ("Ratio missed", numbers.shortfalls(rows)),
        ("Without a published number", {row: row.reason for row in rows if row.published is None}),
    ):
        if reasons:
            parts.append(f"{title}:\n\n" + "\n".join(_grouped(reasons, rows)))
    parts += [f"`{mean.id}` has no published number: {mean.reason}." for mean in means if mean.published is None]
    if machines := dict.fromkeys(map(_machine, found.values())):
        parts.append(f"Measured on: {'; '.join(machines)}.")
    return "\n\n".join(parts) + "\n"


def _lines(table: Table, rows: Sequence[Row], means: Sequence[Mean], numbers: _Numbers) -> str:
    """Return a line for each line of the table, and a column for each model and task."""
    columns = list(dict.fromkeys(_column(row, table) for row in rows))
    by_line = {line: mean for mean in means if (line := _line_of(mean)) is not None}
    headings = ["", *columns, *([_MEAN] if by_line else []), _RATIO]
    lines = []
    for kind in dict.fromkeys(row.line for row in rows):
        own = [row for row in rows if row.line is kind]
        cells = {"": kind.label} | {_column(row, table): numbers.row(row) for row in own}
        if kind.name in by_line:
            cells[_MEAN] = numbers.mean(by_line[kind.name])
        cells[_RATIO] = numbers.ratios(own)
        lines.append({heading: cells.get(heading, "") for heading in headings})
    return markdown_table(lines)


def _column(row: Row, table: Table) -> str:
    parts = {"model": row.model.name, "task": row.task.label}
    return " ".join(parts[name] for name in table.columns)


def _line_of(mean: Mean) -> str | None:
    """Return the line whose mean it is; None if it is of several lines, or of one of several models."""
    line, _, rest = mean.id.partition("/")
    return line if rest == "mean" else None


@dataclass(frozen=True)
class _Numbers:
    """Measured numbers with the published ones, as text.

    Attributes:
        found: lines of results, by rows' ids.
        factor: of the table.
        compares: whether differences are shown.
    """

    found: Mapping[str, Mapping[str, Any]]
    factor: float
    compares: bool

    def row(self, row: Row) -> str:
        line = self.found.get(row.id)
        return self._text(row.published, *((None, None) if line is None else (line["value"], line["stderr"])))

    def mean(self, mean: Mean) -> str:
        lines = [self.found[row] for row in mean.rows if row in self.found]
        if not lines or len(lines) < len(mean.rows):
            return self._text(mean.published, None, None)
        value, error = sum(line["value"] for line in lines) / len(lines), None
        if all(line["stderr"] is not None for line in lines):
            # Results are independent of each other, but rows may have one result in common.
            counts = {line["key"]: sum(other["key"] == line["key"] for other in lines) for line in lines}
            errors = {line["key"]: line["stderr"] for line in lines}
            error = math.hypot(*(errors[key] * count for key, count in counts.items())) / len(lines)
        return self._text(mean.published, value, error)

    def shortfalls(self, rows: Sequence[Row]) -> dict[Row, str]:
        """Return why the ratio of a repository was missed, by row."""
        models = {row: self.found[row.id]["model"] for row in rows if row.id in self.found}
        return {row: model["shortfall"] for row, model in models.items() if "shortfall" in model}

    def ratios(self, rows: Sequence[Row]) -> str:
        """Return the ratio of the rows' repositories, or the smallest and the largest."""
        models = [self.found[row.id]["model"] for row in rows if row.id in self.found]
        ratios = sorted({round(model["ratio"], 1) for model in models if "ratio" in model})
        return " to ".join(f"{ratio:g}" for ratio in dict.fromkeys([*ratios[:1], *ratios[-1:]]))

    def _text(self, published: float | None, value: float | None, error: float | None) -> str:
        digits = 2 if self.factor == 100 else 3
        measured = _NOTHING if value is None else f"{self.factor * value:.{digits}f}"
        if error is not None:
            measured += f" ± {self.factor * error:.{digits}f}"
        if published is None:
            return measured
        difference = ""
        if value is not None and self.compares:
            difference = f", {self.factor * value - published:+.{digits}f}"
        return f"{measured} ({published:.{digits}f}{difference})"


def _grouped(reasons: Mapping[Row, str], rows: Iterable[Row]) -> list[str]:
    """Return a line for each reason, with the rows that have it; LINE/* for all of a line's."""
    shown, lines = list(rows), []
    for reason in dict.fromkeys(reasons.values()):
        names = []
        for line in dict.fromkeys(row.line for row in reasons):
            own = [row for row in shown if row.line is line]
            having = [row.id for row in own if reasons.get(row) == reason]
            names += [f"{line.name}/*"] if len(having) == len(own) > 1 else having
        lines.append(f"- {', '.join(f'`{name}`' for name in names)}: {reason}")
    return lines


def _machine(line: Mapping[str, Any]) -> str:
    machine, limit = line["machine"], line["identity"]["limit"]
    parts = [machine["cpu"], f"{machine['cores']} cores", *([machine["gpu"]] if "gpu" in machine else [])]
    parts += [f"torch {machine['torch']}", f"impart-hf {line['identity']['impart_hf']}"]
    return ", ".join([*parts, *([f"at most {limit} questions of a task"] if limit is not None else [])])
