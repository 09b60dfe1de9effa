"""`scripts/demo_llm.py` from end to end on a tiny model in place of Gemma."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.load_script import load_script
from support.tiny_models import make_model, save_model, tiny_config

pytest.importorskip("accelerate")

pytestmark = [pytest.mark.scripts, pytest.mark.slow]

script, question_answers = load_script("demo_llm"), load_script("question_answers")


def test_from_end_to_end_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_model(make_model(tiny_config("gemma3")), tmp_path / "tiny")
    folder = tmp_path / "demo"
    arguments = [str(folder), "--base", str(base), "--steps", "2", "--learning-rate", "1e-2"]
    arguments += ["--ratio", "8", "--questions", "3"]
    assert script.main(arguments) == 0
    said = capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["delta", "delta.png", "finetuned"]
    commands = re.findall(r"^\$ impart-hf (\w+)", said, re.MULTILINE)
    assert commands == ["compress", "inspect", "verify"]
    compared = [re.split(r" {2,}", line) for line in said.partition("== Load")[2].splitlines()]
    rows = {name: cells for name, *cells in compared if len(cells) == 3}
    assert set(rows) == {"model", "base", "fine-tune", "delta repository"}
    divergences = {name: float(cells[0]) for name, cells in rows.items() if name != "model"}
    assert divergences["fine-tune"] == 0 < divergences["delta repository"] < divergences["base"]
    assert rows["base"][1:] == ["0 of 3", "0 of 3"]
    assert len(re.findall(r"^Order: ", said.partition("generated greedily")[2], re.MULTILINE)) == 3

    made = {path: path.stat().st_mtime_ns for name in ("finetuned", "delta") for path in (folder / name).iterdir()}
    assert script.main(arguments) == 0
    again = capsys.readouterr().out
    assert "compress" not in re.findall(r"^\$ impart-hf (\w+)", again, re.MULTILINE)
    assert again.partition("== Load")[2] == said.partition("== Load")[2]
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())


@pytest.mark.parametrize("option", ["--steps", "--questions"])
def test_wrong_numbers_are_refused(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        script.main([str(tmp_path / "demo"), option, "0"])
    assert error.value.code == 2 and option.strip("-") in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_command_that_fails_ends_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        load_script("demo_steps").step("Inspect", ["inspect", str(tmp_path / "missing")])
    assert error.value.code == 1 and "$ impart-hf inspect" in capsys.readouterr().out
