"""A delta that several processes load together: each decodes its part, and all save one repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.loaded_models import decode_all
from support.spread_runs import KINDS
from support.tiny_models import Pair, same_files

from impart_hf import LowRankConfig, compress

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(pair_of: Callable[[str], Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes did with the deltas of two models."""
    folder = tmp_path_factory.mktemp("spread")
    for kind in KINDS:
        pair = pair_of(kind)
        compress(str(pair.base), str(pair.finetuned), folder / f"{kind}-delta", LowRankConfig(compression_ratio=3))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [*command, "-m", "support.spread_runs", str(folder)],
        env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture
def found(folder: Path, run: str) -> list[dict[str, Any]]:
    """What each process found in a run."""
    return [each[run] for each in json.loads((folder / "found.json").read_text())]


RUNS = pytest.mark.parametrize("run", [*(f"{kind} tp" for kind in KINDS), "llama fsdp"])


@RUNS
def test_it_is_the_model_of_one_process(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["off"][0] < 1e-4, rank


@RUNS
def test_each_process_decodes_its_part(folder: Path, run: str, found: list[dict[str, Any]]) -> None:
    whole = {name: tensor.numel() for name, tensor in decode_all(folder / f"{run.split()[0]}-delta").items()}
    for name, entries in whole.items():
        counts = [rank["entries"][name] for rank in found]
        split = run.endswith("fsdp") or "_proj" in name or name == "lm_head.weight"
        assert counts == [entries // 2 if split else entries] * 2, name


@pytest.mark.parametrize("run", ["sent"])
def test_what_is_dropped_is_not_decoded(folder: Path, found: list[dict[str, Any]]) -> None:
    """Under FSDP's loading that spares memory, the first process of a machine decodes for all."""
    assert [rank["read"] for rank in found] == [len(decode_all(folder / "llama-delta")), 0]
    assert [rank["off"] for rank in found] == [0, 0]


@RUNS
def test_only_a_change_is_a_change(found: list[dict[str, Any]]) -> None:
    assert [rank["changed"] for rank in found] == [[False, False, True], [False, False, False]]


@RUNS
def test_one_process_writes(folder: Path, run: str) -> None:
    kind, way = run.split()
    assert same_files(folder / f"{kind}-delta", folder / f"{kind}-{way}" / "same")


@RUNS
def test_a_change_in_one_process_is_saved_by_all(folder: Path, run: str, found: list[dict[str, Any]]) -> None:
    kind, way = run.split()
    expected = decode_all(folder / f"{kind}-delta")
    with safe_open(folder / f"{kind}-{way}" / "changed" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == expected.keys()
        for name, tensor in expected.items():
            differ = (file.get_tensor(name) != tensor.to(torch.float32)).sum().item()
            assert differ == (name == "model.layers.1.mlp.down_proj.weight"), name
    for rank in found:
        assert rank["off"][1] < 1e-4, rank
