"""scripts/gpu_check.py on tiny sizes: every section succeeds, and what it says is sane. No time is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.load_script import SCRIPTS

from impart_hf.methods import method_names

pytestmark = [pytest.mark.scripts, pytest.mark.slow]

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="it is about the check without a GPU")


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: it changes the environment and the import path, as a script may."""
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


def check(out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    done = gpu_check("--small", "--seconds", "300", "--out", str(out), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text()), done.stdout


def test_every_section_succeeds(tmp_path: Path) -> None:
    results, said = check(tmp_path / "check.json")
    assert list(results["sections"]) == ["checks", "decode", "encode", "load", "apply", "more"]
    assert results["machine"]["torch"] == torch.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["check.json"]
    for name, section in results["sections"].items():
        assert section["succeeded"] and not section["failures"], name
        assert section["tables"] and all(section["tables"].values())
        for title in section["tables"]:
            assert f"\n{name}: {title}\n" in said
    tables = {name: section["tables"] for name, section in results["sections"].items()}
    assert [row["method"] for row in tables["checks"]["methods"]] == method_names()
    for row in tables["checks"]["methods"]:
        assert row["torch against CPU"] <= 1e-5 and row.get("kernels against CPU", 0) <= 1e-5
    assert {row["record"] for row in tables["checks"]["errors against float64"]} >= {"levels", "masked float16"}
    assert all(row["error"] <= 1e-5 for row in tables["checks"]["errors against float64"])
    assert all(row["share of weights that differ"] == 0 for row in tables["checks"]["loading"])
    assert {row["by"] for row in tables["encode"]["encode"]} >= {"torch.linalg.svd", "impart-rd", "dare-qt"}
    assert [row["matrices"] for row in tables["encode"]["experts"]] == ["4 of 32x48"]
    assert {row["tenants"] for row in tables["apply"]["apply"]} == {1, 4, 16}
    assert all(row["error"] <= 1e-5 for row in tables["apply"]["apply"])
    if find_spec("triton"):
        assert any(row["by"].startswith("kernels") for row in tables["decode"]["decode"])
    else:
        assert {"what": "kernels", "why": "Triton is not installed"} in results["sections"]["decode"]["left_out"]


@on_cpu
def test_sections_apart_with_little_time(tmp_path: Path) -> None:
    """For the first there is not enough; the second has a process of its own. Times of a CPU are no results."""
    arguments = ["--seconds", "60", "--sections", "checks,encode", "--apart"]
    results, said = check(tmp_path / "check.json", *arguments)
    sections = results["sections"]
    assert sections["checks"]["left_out"] == [{"what": "checks", "why": "no time left"}] and "no time left" in said
    assert sections["encode"]["succeeded"] and not sections["encode"]["goals"]
    assert all(set(row) == {"matrix", "by"} for row in sections["encode"]["tables"]["encode"])


@on_cpu
def test_without_a_gpu_it_must_be_small(tmp_path: Path) -> None:
    done = gpu_check("--out", str(tmp_path / "check.json"))
    assert done.returncode == 2 and "--small" in done.stderr and not list(tmp_path.iterdir())
