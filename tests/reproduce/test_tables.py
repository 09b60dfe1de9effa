"""The files of the papers' tables: what they say fits together, and with impart-hf."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.messages import naming

from impart_hf.methods import MethodConfig
from impart_hf.reproduce.makes import Compressed, Stored
from impart_hf.reproduce.planning import Conditions, entries_of
from impart_hf.reproduce.tables import Table, load_table, models, read_table, table_names, tasks

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "reproduce"
FILES = sorted(FOLDER.glob("*.yaml"))
EXACT = 0.0051  # a mean is rounded to two digits


@pytest.fixture(scope="module", params=table_names())
def table(request: pytest.FixtureRequest) -> Table:
    return load_table(request.param)


def test_scripts_show_the_tables_of_the_package() -> None:
    assert FOLDER.resolve() == ROOT / "impart_hf" / "reproduce" / "tables"
    assert sorted(file.stem for file in FILES) == table_names()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_says_first_where_its_numbers_come_from(file: Path) -> None:
    text = file.read_text("utf-8")
    assert text.startswith("# ") and "# Numbers: " in text


def test_every_row_can_be_made(table: Table, tmp_path: Path) -> None:
    entries = entries_of(table, [], Conditions(tmp_path))
    assert len(entries) == len(table.rows) > 0
    for entry in entries:
        if isinstance(entry.making, Compressed):
            assert isinstance(entry.making.method, MethodConfig)
        assert len(entry.key) == 20 and entry.row.line.label


def test_published_means_are_those_of_their_rows(table: Table) -> None:
    published = {row.id: row.published for row in table.rows}
    for mean in table.means:
        numbers = [published[row] for row in mean.rows]
        known = [number for number in numbers if number is not None]
        if mean.published is not None and known and len(known) == len(numbers):
            digits = 1 if table.name == "delta-come" else 2  # its numbers have one digit
            assert sum(known) / len(known) == pytest.approx(mean.published, abs=EXACT * 10 ** (2 - digits)), mean.id


def test_of_means_without_a_number_the_file_says_why() -> None:
    odd = [mean for name in table_names() for mean in load_table(name).means if mean.published is None]
    assert [mean.id for mean in odd] == ["fine-tuned/mean"] * 2
    assert all(any(number in mean.reason for mean in odd) for number in ("53.5", "63.81"))


def test_every_model_and_task_is_used() -> None:
    rows = [row for name in table_names() for row in load_table(name).rows]
    used = {row.model.name for row in rows} | {part.name for row in rows for part in row.model.merges}
    assert used == set(models())
    assert {row.task.name for row in rows} == set(tasks())


def test_models_have_revisions() -> None:
    for model in models().values():
        assert all(name is None or "@" in name for name in (model.base, model.finetuned))


def test_what_the_paper_chose_for_a_model_replaces_the_method_s_settings(tmp_path: Path) -> None:
    entries = entries_of(load_table("impart-sparsification"), ["impart"], Conditions(tmp_path))
    chosen = {e.row.model.name: e.making.method for e in entries if isinstance(e.making, Compressed)}
    assert [chosen["wizardmath-13b"].beta, chosen["wizardmath-13b"].c] == [0.6, 1.0]  # type: ignore[attr-defined]
    assert [chosen["llama2-chat-13b"].beta, chosen["llama2-chat-13b"].c] == [0.8, 0.5]  # type: ignore[attr-defined]


def test_the_base_of_a_line_is_its_model_s(tmp_path: Path) -> None:
    (entry, *_) = entries_of(load_table("impart-sparsification"), ["backbone/wizardmath-13b/*"], Conditions(tmp_path))
    assert isinstance(entry.making, Stored) and entry.making.stored == "meta-llama/Llama-2-13b-hf@main"


GOOD = {
    "title": "T",
    "paper": "P",
    "place": "table 1",
    "unit": "percent",
    "lines": {"dare": {"label": "DARE", "make": "compress", "method": {"name": "dare"}}},
    "rows": [{"line": "dare", "model": "wizardmath-13b", "task": "gsm8k", "published": 1.0}],
}
ROW = GOOD["rows"][0]  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows": [{**ROW, "line": "dari"}]}, ("line", "dari")),
        ({"rows": [{**ROW, "model": "wizard"}]}, ("model", "wizard")),
        ({"rows": [{**ROW, "task": "gsm"}]}, ("task", "gsm")),
        ({"rows": [ROW, ROW]}, "dare/wizardmath-13b/gsm8k"),
        ({"rows": [{**ROW, "published": None}]}, "reason"),
        ({"unit": "points"}, "points"),
        ({"lines": {"dare": {"make": "compress"}}}, "label"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(change: dict, named: object, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**GOOD, **change}), "utf-8")
    with pytest.raises(ValueError, match=naming("mine.yaml", named)):
        read_table(file)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ({"method": {"name": "dare", "beta": 1}}, "beta"),
        ({"method": {"name": "dare", "compression_ratio": 0.5}}, "compression_ratio"),
        ({"method": {"name": "daring"}}, "daring"),
        ({"make": "bake"}, "bake"),
        ({"make": "merge", "merge_method": "ties"}, "wizardmath-13b"),
        ({"make": "base", "method": None, "drop": 1}, "drop"),
    ],
)
def test_a_setting_that_a_line_cannot_have_is_named(line: dict, named: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**GOOD, "lines": {"dare": {**GOOD["lines"]["dare"], **line}}}), "utf-8")  # type: ignore[index]
    with pytest.raises(ValueError, match=naming("dare/wizardmath-13b/gsm8k", named)):
        entries_of(read_table(file), [], Conditions(tmp_path))
