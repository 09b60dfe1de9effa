"""The package as it is installed, as it lies in a checkout, and as the type checker sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mypy import api

from impart_hf.registration import is_command_line

ROOT = Path(__file__).parents[2]


def test_every_package_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="in the standard library since Python 3.11")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "impart_hf").rglob("__init__.py")]
    assert sorted(listed) == sorted([*(".".join(folder.parts) for folder in folders), "optimum.commands.register"])


def test_the_reader_and_the_cards_are_visible_at_the_top_level() -> None:
    for name in ("modeling", "model_cards"):
        assert (ROOT / name).resolve() == ROOT / "impart_hf" / name


def test_every_file_that_is_no_module_is_installed_but_examples() -> None:
    tomllib = pytest.importorskip("tomllib", reason="in the standard library since Python 3.11")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    installed = {
        path for package, patterns in listed.items() for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }  # fmt: skip
    there = {path for path in (ROOT / "impart_hf").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    examples = {path for path in there if path.is_relative_to(ROOT / "impart_hf" / "model_cards" / "examples")}
    assert examples and there - examples == installed


@pytest.mark.process
def test_a_checkout_is_importable_from_its_own_folder() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import impart_hf, impart_hf.modeling; print(impart_hf.__file__, impart_hf.modeling.__file__, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package = ROOT / "impart_hf"
    assert done.stdout.splitlines() == [str(package / "__init__.py"), str(package / "modeling" / "__init__.py")]


@pytest.mark.slow
def test_types_are_checked_across_the_boundary_to_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "calls.py"
    file.write_text(
        "from impart_hf.modeling.checkpoints import Checkpoint, HubOptions\n"
        'Checkpoint("folder", HubOptions())\n'
        "Checkpoint(1, 2, 3, 4, 5)\n"
    )
    said, trouble, status = api.run([str(file)])
    assert status == 1, said + trouble
    errors = [line for line in said.splitlines() if ": error: " in line]
    assert errors and all(f"{file.name}:3: " in line and "Checkpoint" in line for line in errors)


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["/bin/impart-hf", "--help"], [], True),
        (["C:/Scripts/impart-hf.exe"], [], True),
        (["/bin/optimum-cli", "impart"], [], True),
        (["/bin/impart-hf-reproduce", "--list"], [], True),
        (["/home/impart-hf.py"], [], False),
        (["-m", "compress"], ["python", "-m", "impart_hf.cli", "compress"], True),
        (["-m"], ["python", "-Bm", "impart_hf.cli"], True),
        (["-m", "--list"], ["python", "-m", "impart_hf.reproduce", "--list"], True),
        (["-m", "impart_hf.cli"], ["python", "-m", "pytest", "impart_hf.cli"], False),
        ([""], ["python"], False),
    ],
)
def test_the_command_line_is_told_from_other_programs(
    argv: list[str], orig_argv: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr("sys.orig_argv", orig_argv)
    assert is_command_line() is expected
