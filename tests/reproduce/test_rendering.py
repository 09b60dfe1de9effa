"""Tables as Markdown, from results written here."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from impart_hf.evaluation.journal import Journal
from impart_hf.reproduce.planning import Conditions, Entry, entries_of
from impart_hf.reproduce.rendering import rendered
from impart_hf.reproduce.tables import Table, read_table

MACHINE = {"cpu": "a processor", "cores": 2, "torch": "2.0"}


def row(line: str, task: str, published: float | None) -> dict:
    return {"line": line, "model": "wizardmath-13b", "task": task, "published": published, "reason": "not printed"}


@pytest.fixture
def table(tmp_path: Path) -> Table:
    content = {
        "title": "A table",
        "paper": "arXiv 1",
        "place": "table 9",
        "unit": "percent",
        "columns": ["task"],
        "lines": {
            "base": {"label": "Base", "make": "base"},
            "dare": {"label": "DARE", "make": "compress", "method": {"name": "dare"}},
        },
        "rows": [row("base", "gsm8k", 10.0), row("base", "ifeval", None), row("dare", "gsm8k", 50.0),
                 row("dare", "ifeval", 60.0)],
        "means": [{"id": "dare/mean", "of": "dare/*", "published": 55.0},
                  {"id": "all", "of": "*", "published": 40.0}],
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content), "utf-8")
    return read_table(tmp_path / "mine.yaml")


@pytest.fixture
def entries(table: Table, tmp_path: Path) -> list[Entry]:
    return entries_of(table, [], Conditions(tmp_path))


def result(entry: Entry, value: float, stderr: float | None = 0.03, **model: object) -> dict:
    return {
        "key": entry.key, "row": entry.row.id, "value": value, "stderr": stderr, "model": model,
        "machine": MACHINE, "identity": {"limit": None, "impart_hf": "1.2"},
    }  # fmt: skip


def kept(*results: dict) -> Journal:
    journal = Journal(None)
    for one in results:
        journal.add(one["key"], one)
    return journal


def test_measured_stands_beside_published(table: Table, entries: list[Entry]) -> None:
    results = kept(*(result(e, v, ratio=32.44) for e, v in zip(entries[2:], (0.48, 0.64), strict=True)))
    text = rendered(table, entries, results, {})
    lines = [" ".join(line.split()) for line in text.splitlines()]  # columns are aligned
    assert lines[0] == "## A table"
    assert [lines[2], *lines[4:6]] == [
        "| | GSM8K | IFEval | mean | ratio on disk |",
        "| Base | – (10.00) | – | | |",
        "| DARE | 48.00 ± 3.00 (50.00, -2.00) | 64.00 ± 3.00 (60.00, +4.00) | 56.00 ± 2.12 (55.00, +1.00) | 32.4 |",
    ]
    assert "| all | – (40.00) |" in lines
    assert "- `base/*`: not run yet" in lines
    assert "- `base/wizardmath-13b/ifeval`: not printed" in lines
    assert lines[-1] == "Measured on: a processor, 2 cores, torch 2.0, impart-hf 1.2."


def test_why_a_row_was_not_measured(table: Table, entries: list[Entry]) -> None:
    text = rendered(table, entries, kept(), {entries[0].key: "no room on the disk"})
    assert "- `base/wizardmath-13b/gsm8k`: no room on the disk" in text
    assert "- `base/wizardmath-13b/ifeval`, `dare/*`: not run yet" in text


def test_a_missed_ratio_is_said(table: Table, entries: list[Entry]) -> None:
    text = rendered(table, entries, kept(result(entries[2], 0.5, ratio=20.0, shortfall="too small")), {})
    assert "Ratio missed:\n\n- `dare/wizardmath-13b/gsm8k`: too small" in text


def test_numbers_that_cannot_be_compared_have_no_difference(table: Table, entries: list[Entry]) -> None:
    text = rendered(table, entries, kept(result(entries[2], 0.48)), {}, "A remark.", compares=False)
    assert "| 48.00 ± 3.00 (50.00) |" in text
    assert text.splitlines()[2] == "A remark."


def test_one_result_of_two_rows_is_no_less_certain_in_their_mean(table: Table, entries: list[Entry]) -> None:
    results = Journal(None)
    for entry in entries[2:]:
        results.add(entry.key, {**result(entry, 0.5), "key": "one"})
    text = rendered(table, entries, results, {})
    assert "| 50.00 ± 3.00 (55.00, -5.00) |" in text


def test_a_score_without_standard_error(table: Table, entries: list[Entry]) -> None:
    results = kept(*(result(entry, 0.5, None) for entry in entries[2:]))
    assert "| DARE | 50.00 (50.00, +0.00) | 50.00 (60.00, -10.00) | 50.00 (55.00, -5.00) |" in rendered(
        table, entries, results, {}
    )
