"""Blocks of documents, their marks, and the comparison of outputs, on documents made here."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.document_blocks import Block, MarkError, blocks_of, split_commands
from support.document_ground import Ground
from support.document_output import differences, missing_values, updated
from support.document_runs import DocumentRun
from support.loopback_hub import LoopbackHub
from support.messages import naming

DOCUMENT = """# One

```sh
export X=1   # a comment
make test
```

    impart-hf inspect demo/delta

```python
print(1)
```

- In a list:

      python scripts/demo.py

<!-- docs: file a/b.yaml -->
```yaml
a: 1
```

<!-- docs: output 30% -->

    two 2

## Two

<!-- docs: skip section, takes days -->

    python scripts/long.py

### Below

<!-- docs: slow -->

    impart-hf verify demo/delta

```
a formula
```

## Three

    another formula

<!-- docs: values 2 -->
It is 1, 2 and 3.
"""


def _blocks(tmp_path: Path, text: str, marks: dict[str, str] | None = None) -> list[Block]:
    path = tmp_path / "document.md"
    path.write_text(text)
    return blocks_of(path, marks)


def test_blocks_and_marks(tmp_path: Path) -> None:
    blocks = _blocks(tmp_path, DOCUMENT)
    lines = DOCUMENT.splitlines()
    kinds = "commands commands python commands file output skip commands skip unmarked values".split()
    assert [block.kind for block in blocks] == kinds
    for block in blocks:
        assert lines[block.line - 1].strip() == block.text.splitlines()[0].strip()
    assert [block.note for block in blocks if block.note] == ["a/b.yaml", "30%", "takes days", "takes days", "2"]
    when = [[command.when for command in block.commands()] for block in blocks if block.commands()]
    assert when == [["fast", "never"], ["fast"], ["fast"], ["slow"], ["slow"]]


def test_marks_beside_a_document(tmp_path: Path) -> None:
    text = "    a table\n\nIt is 5.\n\n    python x.py\n"
    marks = {"a table": "skip, why", "It is": "values", "python x": "skip, no"}
    assert [block.kind for block in _blocks(tmp_path, text, marks)] == ["skip", "values", "skip"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("<!-- docs: skipp, x -->\n\n    a\n", "skipp"),
        ("<!-- docs: skip -->\n\n    a\n", "skip"),
        ("<!-- docs: file -->\n\n    a\n", "file"),
        ("<!-- docs: slow, x -->\n\n    make demo\n", "slow"),
        ("<!-- docs: slow -->\n\n    a formula\n", "slow"),
        ("<!-- docs: output -->\n\nprose\n", "output"),
        ("<!-- docs: values -->\n\n    a\n", "values"),
        ("<!-- docs: output -->\n\n<!-- docs: output -->\n\n    a\n", "document.md:3"),
        ("prose\n\n<!-- docs: output -->\n", "output"),
    ],
)
def test_marks_that_are_wrong(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(MarkError, match=naming(named)):
        _blocks(tmp_path, text)


def test_mark_beside_a_document_that_marks_nothing(tmp_path: Path) -> None:
    with pytest.raises(MarkError, match=naming("gone")):
        _blocks(tmp_path, "    python x.py\n", {"gone": "slow"})


def test_commands_of_a_block() -> None:
    block = "# first\na \\\n  b\n\ncat > f <<'END'\nx 'y\n\nEND\npython -c \"\n1\n2\"\nlast\n"
    assert split_commands(block) == ["a \\\n  b", "cat > f <<'END'\nx 'y\n\nEND", 'python -c "\n1\n2"', "last"]


SHOWN = """demo/x: 430.44 kB of 6.96 MB, in 6 s
…
base     330.1   0.7697
from /a/b and more …
"""
PRINTED = """demo/x: 440.10 kB of 7.1 MB, in 99 s
something else
base  |  not this
base    329.0   0.7712
from /c/d/e and more of it
"""


def test_shown_outputs() -> None:
    assert not differences(SHOWN, PRINTED)
    assert not differences("about 1.2 MB", "about 1200 kB")
    assert not differences("base 1000.1 0.7\n", PRINTED, None)
    assert not differences("in 0.0011\n", "in 0.00114\n", 0.0)  # rounded
    for shown in ("base 400.0 0.7697", "base 330.1 0.9", "fine 330.1 0.7", SHOWN + "base 330.1 0.7697"):
        assert len(differences(shown, PRINTED)) == 1, shown


def test_new_numbers_are_written_into_shown_outputs() -> None:
    shown = updated(SHOWN.replace("330.1", "500.1") + "no such line\n", PRINTED)
    assert shown.splitlines() == [
        PRINTED.splitlines()[0],
        "…",
        "base    329.0   0.7712",
        "from /a/b and more …",
        "no such line",
    ]


def test_values_in_tables_and_text() -> None:
    table = "| model | a | b |\n|---|---|---|\n| `base` | 1,000 | 2.5 |\n| other | 7 | 8 |"
    printed = "| base | 1000.0 | x | 2.51 |\n| other | 7 | 9 |\n8"
    assert missing_values(table, printed) == ["other: 8"]
    assert missing_values("It is 330 for one, 114 for the other.", "a 329.8\nb 170.2") == ["114"]
    assert missing_values("It is 330 for one, 114 for the other.", "a 329.8\nb 170.2", 1) == []


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    for name in ("checkout", "hub"):
        (tmp_path / name).mkdir()
    return Ground(tmp_path / "checkout", tmp_path / "hub", "demo 12\n")


@pytest.mark.process
def test_a_run_carries_on_variables_and_reports_what_fails(tmp_path: Path, ground: Ground) -> None:
    text = """
```sh
export X=5
mkdir sub && cd sub
```

```sh
cat "$PWD/missing" || echo "X is $X" && false
```

<!-- docs: output -->
```
X is 6
```

```sh
python -c "print(3); assert __import__('os').path.basename(__import__('os').getcwd()) == 'sub'"
```

<!-- docs: values -->
It is 4.

```sh
curl -s "$HF_ENDPOINT/api/whoami-v2?nobody"
```

<!-- docs: skip, why -->

    something

<!-- docs: output -->
```
nothing
```
"""
    path = tmp_path / "document.md"
    path.write_text(text)
    with LoopbackHub(ground.store) as hub, DocumentRun(ground, hub) as run:
        run.run(blocks_of(path, {}))
        places = [failure.split(": ")[0].rpartition(":")[2] for failure in run.failures]
        lines = text.splitlines()
        assert [lines[int(place) - 1].split()[0] for place in places] == ["cat", "X", "It", "curl", "nothing"]
        run.failures.clear()
        run.run(blocks_of(path, {})[1:3], update=True)
    assert "\nX is 5\n" in path.read_text()
    assert len(run.failures) == 1
