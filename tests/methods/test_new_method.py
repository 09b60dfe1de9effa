"""A method that someone else wrote: one file in the folder of the methods, and no other edit."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_models import Pair

import impart_hf

METHOD = '''
"""Stranger: the delta's leading components at so many bits."""

from dataclasses import dataclass
from typing import ClassVar

from .delta_come import DeltaComeConfig
from .settings import setting


def _double(text: str) -> int:
    if text == "many":
        raise ValueError("many is no number")
    return 2 * int(text)


@dataclass
class StrangerConfig(DeltaComeConfig):
    name: ClassVar[str] = "stranger"

    groups: tuple[int, ...] = (5, 20)
    its_number: int = setting(1, "what a stranger counts, 100 % of it", _double, option="its-option")
'''


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the stranger's file."""
    folder = tmp_path_factory.mktemp("stranger")
    shutil.copytree(Path(impart_hf.__file__).parent, folder / "impart_hf", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "impart_hf" / "methods" / "stranger.py").write_text(METHOD)
    return folder


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Python with the copied package."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=checkout)


def test_it_is_in_the_help(checkout: Path) -> None:
    help = " ".join(run(checkout, "-m", "impart_hf.cli", "compress", "--help").stdout.split())
    assert "lowrank,stranger,exact}" in help
    assert "--its-option ITS_OPTION what a stranger counts, 100 % of it; for stranger (default: 1)" in help
    assert "for delta-come, impart-qt, stranger (default: 2,32, 5,20 for stranger)" in help


def test_it_compresses_and_loads(checkout: Path, tiny_pair: Pair, tmp_path: Path) -> None:
    command = ["-m", "impart_hf.cli", "compress", str(tiny_pair.base), str(tiny_pair.finetuned), str(tmp_path / "out")]
    command += ["--method", "stranger", "--ratio", "4", "--quiet"]
    done = run(checkout, *command, "--its-option", "3", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["method"]["name"] == "stranger" and report["method"]["its_number"] == 6
    assert report["method"]["groups"] == [5, 20] and report["ratio"] == pytest.approx(4, rel=0.05)
    refused = run(checkout, *command, "--its-option", "many")
    assert refused.returncode == 1 and refused.stderr == "impart-hf: error: --its-option: many is no number\n"
    belongs = run(checkout, *command[:6], "--its-option", "3")
    assert belongs.returncode == 1 and "--its-option belongs to stranger" in belongs.stderr
    program = (
        "import sys, impart_hf\nfrom transformers import AutoModelForCausalLM\nfrom impart_hf import StrangerConfig\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert 'StrangerConfig' in dir(impart_hf)\n"
        "print(type(model).__name__, StrangerConfig(its_number=4).its_number, 'StrangerConfig' in impart_hf.__all__)"
    )
    loaded = run(checkout, "-c", program, str(tmp_path / "out"))
    assert loaded.stdout.split()[-2:] == ["4", "True"], loaded.stderr


@pytest.fixture
def broken_checkout(checkout: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The checkout with one more file, `broken.py`, with the test's changes of the stranger's method."""
    changed = METHOD.replace("stranger", "broken").replace("Stranger", "Broken")
    for old, new in request.param.items():
        assert old in changed
        changed = changed.replace(old, new)
    file = checkout / "impart_hf" / "methods" / "broken.py"
    file.write_text(changed)
    yield checkout
    file.unlink()


@pytest.mark.parametrize(
    ("broken_checkout", "named"),
    [
        ({"from .settings": "from .no_settings"}, "broken.py"),
        ({"@dataclass\n": "@dataclass(\n"}, "broken.py"),
        ({"@dataclass\n": ""}, "BrokenConfig"),
        ({'"broken"': '"dare"'}, "dare_qt|dare"),
        ({"BrokenConfig": "DareConfig"}, "DareConfig"),
        ({"BrokenConfig": "BrokenMethod"}, "BrokenMethod"),
        ({'option="its-option"': 'option="steps"'}, "--steps"),
    ],
    indirect=["broken_checkout"],
    ids=["import", "syntax", "dataclass", "name", "class", "suffix", "option"],
)
@pytest.mark.process
def test_a_file_that_cannot_be_a_method(broken_checkout: Path, named: str) -> None:
    """One line names the file, the class or the option, before anything is done."""
    done = run(broken_checkout, "-m", "impart_hf.cli", "compress", "base", "finetuned", "out")
    assert done.returncode == 1 and done.stderr.startswith("impart-hf: error: ")
    assert len(done.stderr.splitlines()) == 1 and re.search(named, done.stderr), done.stderr


@pytest.mark.parametrize(
    "broken_checkout", [{"return 2 * int(text)": "return {}[text]"}], indirect=True, ids=["parser"]
)
@pytest.mark.process
def test_a_parser_that_fails(broken_checkout: Path) -> None:
    command = ["compress", "base", "finetuned", "out", "--method", "broken", "--its-option", "3"]
    done = run(broken_checkout, "-m", "impart_hf.cli", *command)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "--its-option" in done.stderr and "'3'" in done.stderr, done.stderr
