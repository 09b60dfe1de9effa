"""The command `impart-hf-reproduce`: lists, forecasts and errors; test_small.py runs the tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.messages import naming
from support.reproduced import make_small_pair, run

from impart_hf.reproduce.tables import load_table, table_names


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default output folders are in the working folder."""
    monkeypatch.chdir(tmp_path)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("impart-hf-reproduce: error: ")
    return line


def test_tables_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == table_names()


def test_rows_are_listed_with_what_they_need(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = run(capsys, "impart-sparsification", "--list", "--rows", "impart/*13b/*", "--rows", "backbone")
    assert status == 0
    title, *rows = out.splitlines()
    assert load_table("impart-sparsification").title in title
    assert len(rows) == 16
    by_id = {line.split()[0]: " ".join(line.split()[1:]) for line in rows}
    assert by_id["impart/wizardmath-13b/gsm8k"] == "60.2 to run"
    assert by_id["impart/wizardcoder-13b/humaneval"].startswith("59.76 needs --allow-code")
    assert list(tmp_path.iterdir()) == []  # nothing is written


def test_tables_without_a_row_that_is_asked_for_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "all", "--list", "--rows", "impart-32/*", "--rows", "laco")
    assert status == 1 and not out  # the second is the name of no line
    status, out, _ = run(capsys, "all", "--list", "--rows", "impart-32/*")
    assert status == 0
    assert [line.split(":")[0] for line in out.splitlines() if not line.startswith(" ")] == ["impart-ratios"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "impart-ratios"),
        (["no-such-table"], ("no-such-table", "impart-ratios")),
        (["impart-ratios", "--rows", "no/such/row"], ("--rows", "no/such/row")),
        (["--list", "--rows", "dare"], "--rows"),
        (["impart-ratios", "--list", "--dry-run"], ("--dry-run", "--list")),
        (["impart-ratios", "--list", "--keep"], "--keep"),
        (["impart-ratios", "--dry-run", "--keep"], "--keep"),
        (["impart-ratios", "--pair", "demo"], ("--pair", "--small")),
        (["impart-ratios", "--small", "--pair", "nowhere"], ("--pair", "nowhere", "base/config.json")),
        (["impart-ratios", "--small", "--texts", "folder"], ("--texts", "--small")),
        (["impart-ratios", "--small", "--allow-code", "isolated"], ("--allow-code", "--small")),
        (["impart-ratios", "--small", "--judge", "http://localhost"], ("--judge", "--small")),
        (["impart-ratios", "--judge", "http://localhost"], ("--judge-model", "--instructions")),
        (["impart-ratios", "--model", "wizardmath-13b"], ("--model", "wizardmath-13b")),
        (["impart-ratios", "--model", "wizard=folder"], ("--model", "wizard")),
        (["impart-ratios", "--model", "wizardcoder-13b=folder", "--rows", "*/wizardmath-13b/*"], ("--model", "rows")),
        (["impart-ratios", "--texts", "nowhere"], ("--texts", "nowhere")),
        (["impart-ratios", "--limit", "0"], ("limit", 0)),
        (["impart-ratios", "--limit", "2.5"], ("limit", 2.5)),
        (["impart-ratios", "--device", "nothing"], "nothing"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_no_work(
    arguments: Sequence[str], named: object, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert re.search(naming(named), failure(capsys, *arguments))
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_a_file_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert re.search(naming("--output", "file"), failure(capsys, "impart-ratios", "--output", "file"))


@pytest.mark.slow
def test_a_dry_run_of_models_that_are_not_here_goes_by_their_shapes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, _ = run(capsys, "impart-sparsification", "--dry-run", "--rows", "dare/wizardmath-13b/gsm8k")
    assert status == 0
    heading, _, line, _, downloads = out.splitlines()
    cells = dict(zip(*([cell.strip() for cell in text.split("|")] for text in (heading, line)), strict=True))
    assert cells["model"] == "wizardmath-13b" and cells["from"] == "shapes"
    # 13 billion parameters in 16 bits, by 32.
    assert float(cells["result"].removesuffix(" MB")) == pytest.approx(13.0e9 * 2 / 32 / 1e6, rel=0.1)
    assert "vanillaOVO/WizardMath-13B-V1.0@main" in downloads and "meta-llama/Llama-2-13b-hf@main" in downloads
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_dry_run_of_models_that_are_here_goes_by_their_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pair = make_small_pair(tmp_path / "pair")
    rows = ["--rows", "backbone/wizardmath-13b/gsm8k", "--rows", "dare/wizardmath-13b/*"]
    status, out, err = run(capsys, "impart-sparsification", "--small", "--pair", pair, "--dry-run", *rows)
    assert status == 0
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert [line[1] for line in cells[2:]] == ["Backbone", "DARE"]  # one model for both tasks
    assert cells[3][-1] == "headers" and "–" not in cells[3]
    assert "downloaded" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]


def test_what_cannot_be_run_needs_no_forecast(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "impart-sparsification", "--dry-run", "--rows", "dare/llama2-chat-13b/alpacaeval")
    assert status == 0 and re.search(naming("need something", "--list"), out)
