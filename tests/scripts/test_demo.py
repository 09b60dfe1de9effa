"""What `scripts/demo.py` prints of models; the commands before it have tests of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.load_script import load_script
from support.own_answers import write_own_answers
from support.tiny_models import Pair

pytestmark = pytest.mark.scripts

demo, exact_answers = load_script("demo"), load_script("exact_answers")


def test_comparison(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "heldout.txt"
    text.write_text("A fine-tuned model is its base model and a small difference. " * 200, encoding="utf-8")
    records = exact_answers.read_tasks(write_own_answers(tiny_pair.finetuned, tmp_path / "tasks"))
    demo.compare({"base": tiny_pair.base, "fine-tune": tiny_pair.finetuned}, text, records)
    table, _, answers = capsys.readouterr().out.partition("\n== ")
    rows = {name: cells for name, *cells in (re.split(r" {2,}", line) for line in table.splitlines())}
    assert rows["fine-tune"][1:] == ["0.0000", "10 of 10", "100.0% ± 0.0%"]
    perplexity, divergence, right, share = rows["base"]
    assert float(perplexity) > 1 and float(divergence) > 0.01
    assert re.fullmatch(r"\d of 10", right) and re.fullmatch(r"\d+\.\d% ± \d+\.\d%", share)
    for record in records[:5]:
        assert sum(line.startswith(f"{record.prompt} ") for line in answers.splitlines()) == 1


def test_an_older_pair_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["demo.py", str(tmp_path)])
    monkeypatch.setattr("subprocess.run", lambda *_, **__: None)
    assert demo.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "pair") in line and "tasks" in line
