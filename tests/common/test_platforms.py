"""The package imports nothing that only some platforms have."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.loaded_models import logits
from support.tiny_models import same_files
from transformers import AutoModelForCausalLM

import impart_hf

POSIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
LINUX_PROGRAMS = {"sandbox_launcher.py"}  # run as a program, where the system has its namespaces; no module imports it


def test_no_module_of_one_platform_is_imported() -> None:
    for path in Path(impart_hf.__file__).parent.rglob("*.py"):
        if path.name in LINUX_PROGRAMS:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(str(node.module))
            assert not POSIX_ONLY & {name.partition(".")[0] for name in names}, path


WITHOUT = """
import json, sys

for name in NAMES:
    sys.modules[name] = None  # an import of it raises

from transformers import AutoModelForCausalLM
import impart_hf
from support.loaded_models import logits

source, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source)
model.save_pretrained(target)
assert not model.weights_changed() and isinstance(model, impart_hf.DeltaCompressedForCausalLM)
print(json.dumps(logits(model).float().tolist()))
"""


@pytest.mark.process
def test_a_delta_loads_and_is_saved_without_them(tiny_repository: Path, tmp_path: Path) -> None:
    blocked = sorted(POSIX_ONLY - {"posix", "resource"})  # Python and transformers import these two here
    code = WITHOUT.replace("NAMES", str(blocked))
    path = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{code}"]
    command += [str(tiny_repository), str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = logits(AutoModelForCausalLM.from_pretrained(tiny_repository)).float()
    assert torch.equal(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected)
    assert same_files(tiny_repository, tmp_path / "again")
