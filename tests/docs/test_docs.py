"""The documents name what exists: files, pictures, links, anchors, commands, options and messages."""

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.document_blocks import DOCUMENTS, ROOT, blocks_of

from impart_hf.cli.main import main
from impart_hf.methods import MethodConfig, method_names
from impart_hf.modeling.delta_decode import decode_record
from impart_hf.modeling.delta_record import parse_record

WRITE_A_METHOD = ROOT / "docs" / "how-to" / "write-a-method.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@every_document
def test_files_and_pictures_exist_and_nothing_is_left_to_fill_in(document: Path) -> None:
    text = document.read_text("utf-8")
    for name in re.findall(r"\b(?:docs|scripts|tests|modeling|impart_hf)/[\w/-]+\.\w+", text):
        assert (ROOT / name).exists() or name in _MADE_BY_THE_READER, name
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (document.parent / picture).exists(), picture
    assert not re.findall(r"^[A-Z]+_[A-Z]+$", text, re.MULTILINE)


@every_document
def test_links_and_anchors_resolve(document: Path) -> None:
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", _prose(document)):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (document.parent / name).resolve() if name else document
        assert linked.exists(), target
        if anchor:
            assert anchor in _anchors(linked), target


@every_document
def test_commands_and_their_options_exist(document: Path) -> None:
    for command, options in _commands(document.read_text("utf-8")):
        found = _help(*command)
        for option in [] if document == WRITE_A_METHOD else options:  # its example has options of its own
            assert re.search(rf"{option}\b(?!-)", found), f"impart-hf {' '.join(command)} {option}"


@every_document
def test_options_of_scripts_exist(document: Path) -> None:
    code = "\n".join(block.text for block in blocks_of(document)).replace("\\\n", " ")
    for script, rest in re.findall(r"python (scripts/[\w/]+\.py)(.*)", code):
        source = _with_imports(ROOT / script)
        for option in re.findall(r"--[a-z][\w-]*", rest.partition("#")[0]):
            assert f'"{option}"' in source, f"{script} {option}"


def test_every_command_is_documented() -> None:
    documented = {command for command, _ in _commands((ROOT / "docs" / "commands.md").read_text("utf-8"))}
    for parent in ((), ("prune",)):
        names = re.findall(r"^ {4}([a-z][a-z-]*)\b", _help(*parent), re.MULTILINE)
        assert len(names) >= 4
        assert {(*parent, name) for name in names} - {("prune",)} <= documented


def test_architecture_names_files_that_exist() -> None:
    names = re.findall(r"`(\w+\.py)`", (ROOT / "docs" / "ARCHITECTURE.md").read_text("utf-8"))
    assert names and set(names) <= {path.name for path in (ROOT / "impart_hf").rglob("*.py")}


def test_architecture_lists_every_file_of_the_reader() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text("utf-8")
    (table,) = re.findall(r"^\| file of `modeling/` .*?\n\n", text, re.MULTILINE | re.DOTALL)
    files = {path.name for path in (ROOT / "modeling").glob("*.py")} - {"__init__.py"}
    assert sorted(re.findall(r"`(\w+\.py)`", table)) == sorted(files)


def test_architecture_lists_every_module_of_the_writers_packages() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text("utf-8")
    stages = text.partition("## How data moves")[2].partition("\n## ")[0]
    (serving,) = re.findall(r"^\| file of `serving/` .*?(?=\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    elsewhere = {"compression": stages, "serving": serving}
    commands = {command[-1] for command, _ in _commands((ROOT / "docs" / "commands.md").read_text("utf-8"))}
    by_name = {name.replace("-", "_") for name in (*commands, *method_names())}  # "one file per command", "per method"
    for package in sorted(path.parent for path in (ROOT / "impart_hf").glob("*/__init__.py")):
        if package.name in ("modeling", "model_cards"):
            continue
        (row,) = re.findall(rf"^\| \d+ \| `{package.name}/` .*$", text, re.MULTILINE)
        modules = {path.stem for path in package.rglob("*.py") if not path.stem.startswith("__")}
        assert _modules_in(row) <= modules, package.name
        listed = _modules_in(row + elsewhere.get(package.name, ""))
        assert modules - (by_name if package.name in ("cli", "methods") else set()) <= listed, package.name


def test_the_table_of_a_method_names_its_members() -> None:
    (table,) = re.findall(r"^\| member .*?\n\n", WRITE_A_METHOD.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    cells = [row.split("|")[1] for row in table.splitlines()[2:] if row]
    members = {name for cell in cells for name in re.findall(r"`(\w+)", cell)} - {"setting"}
    public = {name for name in vars(MethodConfig) if not name.startswith("_")} | {"name", "_encode", "_encode_stack"}
    settings = {field.name for field in dataclasses.fields(MethodConfig)}
    assert members == public - settings - {"encode", "encode_all", "to_dict"}  # which a method leaves as they are


def test_the_example_of_a_method_works(tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```", WRITE_A_METHOD.read_text("utf-8"), re.DOTALL)
    assert example and len(example[1].splitlines()) < 50
    path = tmp_path / "row_signs.py"
    # Without its public name, so that the methods which other tests go through stay the same
    path.write_text(example[1].replace('name: ClassVar[str] = "row-signs"', ""), "utf-8")
    spec = importlib.util.spec_from_file_location("impart_hf.methods.row_signs", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    method = module.RowSignsConfig(shrink=0.9)
    delta = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    for budget in (400, 800):
        data = method.encode(delta, budget, 1).data
        assert 0.9 * budget < len(data) <= budget
        record, _ = parse_record(np.frombuffer(data, np.uint8), (96, 64), "delta")
        assert (decode_record(record, "delta") * delta).sum() > 0


def test_readme_is_short() -> None:
    words = [
        word for word in (ROOT / "README.md").read_text("utf-8").split() if word != "|"
    ]  # tables' borders are none
    assert len(words) < 1000


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    messages = _messages()
    for row in re.findall(r"^\| (.*?) \|", TROUBLESHOOTING.read_text("utf-8"), re.MULTILINE):
        if "transformers" in row or not row.startswith("`"):
            continue
        for part in re.findall(r"`([^`]+)`", row):
            assert any(part in message for message in messages), part


_MADE_BY_THE_READER = {"impart_hf/methods/row_signs.py"}  # the example of docs/how-to/write-a-method.md


def _prose(document: Path) -> str:
    """A document without its blocks of code."""
    text = re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def _anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#{1,6} (.+)$", _prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _modules_in(text: str) -> set[str]:
    """The modules that a text names as files."""
    return set(re.findall(r"`(?:\w+/)*(\w+)\.py`", text))


def _commands(text: str) -> list[tuple[tuple[str, ...], list[str]]]:
    """The commands of impart-hf in a document's code, and the options that each is given."""
    text = text.replace("\\\n", " ")
    fenced = "\n".join(re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE))
    indented = re.findall(r"^    +(.*)$", text, re.MULTILINE)
    found = []
    for line in [*fenced.splitlines(), *indented, *re.findall(r"`([^`\n]+)`", text)]:
        if not (match := re.match(r" *(?:accelerate launch -m impart_hf\.cli|impart-hf) ([a-z].*)", line)):
            continue
        words = match[1].split()
        depth = 2 if words[0] == "prune" and len(words) > 1 and words[1].isalpha() else 1
        found.append((tuple(words[:depth]), [word.partition("=")[0] for word in words if word.startswith("--")]))
    return found


@functools.cache
def _help(*command: str) -> str:
    """What a command's --help prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0, f"impart-hf {' '.join(command)}"
    return printed.getvalue()


@functools.cache
def _with_imports(script: Path) -> str:
    """The source of a script, and of the modules beside it that it imports."""
    source = script.read_text("utf-8")
    names = re.findall(r"^\s*(?:from|import) (\w+)", source, re.MULTILINE)
    beside = [script.with_name(f"{name}.py") for name in names]
    return source + "".join(_with_imports(path) for path in beside if path.exists())


def _messages() -> list[str]:
    """Every string of the package, … for what is formatted into it."""
    found = []
    for path in [*(ROOT / "impart_hf").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found
