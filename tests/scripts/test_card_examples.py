"""scripts/card_examples.py, and that the examples of cards look as cards do now."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from support.document_ground import small_ground
from support.load_script import load_script

pytest.importorskip("matplotlib")
pytestmark = [pytest.mark.scripts, pytest.mark.slow]


def _structure(card: Path) -> tuple[list[str], list[str], list[str], list[str]]:
    """What does not depend on the model: keys of the metadata, headings, first cells of tables, blocks of code."""
    _, metadata, text = card.read_text().split("---\n", 2)
    cells = [re.sub(r"\d+", "0", cell) for cell in re.findall(r"^\| (.*?) \|", text, re.MULTILINE)]
    return (
        sorted(yaml.safe_load(metadata)),
        re.findall(r"^#+ .*", text, re.MULTILINE),
        list(dict.fromkeys(cells)),  # as many layers as the model has
        re.findall(r"^```python\n.*?^```", text, re.MULTILINE | re.DOTALL),
    )


def test_examples_are_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("card_examples")
    demo, output = small_ground(tmp_path / "ground").checkout / "demo", tmp_path / "examples"
    monkeypatch.setattr(sys, "argv", ["card_examples.py", str(demo), "--output", str(output)])
    for name in script.COMMANDS:
        monkeypatch.setitem(script.COMMANDS, name, script.COMMANDS[name].replace("--steps 40", "--steps 2"))
    before = Path.cwd()
    assert script.main() == 0 and Path.cwd() == before
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in script.EXAMPLES.iterdir())
    for example in script.EXAMPLES.iterdir():
        made = output / example.name
        assert _structure(made / "README.md") == _structure(example / "README.md"), "run scripts/card_examples.py"
        assert sorted(path.name for path in made.iterdir()) == sorted(path.name for path in example.iterdir())


def test_a_folder_without_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("card_examples")
    monkeypatch.setattr(sys, "argv", ["card_examples.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        script.main()
