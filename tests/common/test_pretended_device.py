"""What would fail or be slow on an accelerator, found on a pretended one (tests/support/pretended_device.py).

Everything runs once, in a process of its own (tests/support/pretended_runs.py); the tests judge what it found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.xdist_group("pretended")]

# The most launches and waits (`Counts`) of an encode of a 192 x 256 matrix at ratio 8, and of the decode of its record:
# today's numbers and a tenth. Without its kernel, GPTQ's launches grow with the columns. Lower them when you can.
CEILINGS = {
    "bitdelta": ((100, 21), (16, 3)),
    "dare": ((141, 31), (47, 8)),
    "dare-qt": ((282, 33), (47, 9)),
    "dare-qt calibrated": ((1760, 39), (47, 9)),
    "delta-come": ((522, 44), (64, 4)),
    "delta-come calibrated": ((2850, 57), (64, 4)),
    "impart": ((230, 44), (113, 17)),
    "impart-qt": ((549, 54), (64, 4)),
    "impart-qt calibrated": ((2890, 66), (64, 4)),
    "impart-rd": ((4870, 143), (126, 4)),
    "impart-rd calibrated": ((4840, 140), (126, 4)),
    "lowrank": ((146, 34), (42, 6)),
}
FIRST, SECOND = "pretended:0", "pretended:1"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, "-m", "support.pretended_runs", str(tmp_path_factory.mktemp("pretended"))]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def run(found: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the run found that a test is named after."""
    result = found[request.node.originalname.removeprefix("test_")]
    assert "raised" not in result, result["raised"]
    return result


def test_methods(run: dict[str, Any]) -> None:
    assert run.keys() == CEILINGS.keys()
    for name, result in run.items():
        assert result["same bytes"] and result["same values"] and result["device"] == SECOND, name
        assert result["part"] <= 2**-7, f"{name}: a part rounds as the whole does, to bfloat16"
        for work, (launches, waits) in zip(("encode", "decode"), CEILINGS[name], strict=True):
            counts = result[work]
            assert counts["launches"][0] == 0 and 0 < counts["launches"][1] <= launches, (name, work, counts)
            assert counts["waits"] <= waits, (name, work, counts)
            # A matrix of 192 x 256 in float32 is 196,608 bytes: neither it nor the base comes back or goes over again.
            assert counts["to_host"] < 50_000 and counts["to_device"] < 150_000, (name, work, counts)


def test_kernels(run: dict[str, Any]) -> None:
    """With GPTQ's kernel, launches grow with the blocks of 128 columns, and with the segments that are packed."""
    if not run:
        pytest.skip("Triton is not installed")
    narrow, wide = run.values()
    for result in (narrow, wide):
        assert result["launches"][0] == 0 and result["error"] == pytest.approx(result["error on the CPU"], rel=1e-3)
    assert wide["launches"][1] <= 1950 and wide["waits"] <= 130, wide
    assert wide["launches"][1] - narrow["launches"][1] <= 250, (narrow, wide)


def test_stacks(run: dict[str, Any]) -> None:
    """32 matrices encoded together take at most some more launches than one, and no more waits."""
    for name, (one, together) in run.items():
        assert together["launches"][0] == 0 and together["launches"][1] <= 2.5 * one["launches"][1], (name, run[name])
        assert together["waits"] <= one["waits"], (name, run[name])


def test_faults(run: dict[str, Any]) -> None:
    """The pretended device finds what it is for."""
    for name in ("cpu_tensor", "other_index", "generator"):
        assert run[name]["refused"].startswith("MixedDevices"), run
    assert run["numpy_of_it"]["refused"].startswith("TypeError"), run
    assert run["number_by_number"]["waits"] > 5 * CEILINGS["impart"][1][1], run


def test_compression(run: dict[str, Any]) -> None:
    for name, device in {"rounded": SECOND, "calibrated": FIRST}.items():
        assert run[name] == [], f"{name}: these entries are not the CPU's"
        assert run[f"{name} errors"] < 1e-3
        assert run[f"{name} on cpu"] == 0 and run[f"{name} on pretended"] > 10_000
        assert run[f"{name} decodes on {device}"] == [device] and run[f"{name} decodes on cpu"] == ["cpu"]


def test_use(run: dict[str, Any]) -> None:
    """Verifying, reconstructing, exporting and evaluating a delta."""
    assert run["reconstruct"] == run["export"] == []
    assert run["perplexity on pretended"] == pytest.approx(run["perplexity on cpu"], rel=1e-4)
    for name in ("verify", "reconstruct on pretended", "export on pretended"):
        assert run[name][0] == 0 and run[name][1] > 300, (name, run[name])
    # The model is loaded by other threads, which are not counted.
    assert run["evaluate on pretended"][0] == 0 and run["evaluate on pretended"][1] > 100
    for name in ("reconstruct", "export", "evaluate"):
        assert run[f"{name} on pretended decodes on"] == [SECOND] and run[f"{name} on cpu decodes on"] == ["cpu"], name
    assert run["verify decodes on"] == [SECOND]
    for name in ("reconstruct on cpu", "export on cpu", "evaluate on cpu"):
        assert run[name] == [0, 0], name


def test_tuning(run: dict[str, Any]) -> None:
    assert run["decodes on"] == [SECOND] and len(run["scores"]) == 2 and all(0 < score < 5 for score in run["scores"])
    assert run["launches"][0] == 0 and run["launches"][1] > 1000, run["launches"]


def test_differences(run: dict[str, Any]) -> None:
    on_cpu, on_device = (run[kind] for kind in ("cpu", "pretended"))
    for one, other in zip(on_device["tensors"], on_cpu["tensors"], strict=True):
        assert one.pop("stable_rank") == pytest.approx(other.pop("stable_rank"), rel=1e-3)
        assert one.pop("leading") == pytest.approx(other.pop("leading"), rel=1e-3)
        assert one == other
    assert on_cpu["launches"][1] == 0 and on_device["launches"][1] > 500, on_device["launches"]


def test_merging(run: dict[str, Any]) -> None:
    for method, result in run.items():
        assert result["decodes on"] == [SECOND], method
        assert result["differs"] == 0 and result["launches"][0] == 0 and result["launches"][1] > 1000, (method, result)


def test_loading(run: dict[str, Any]) -> None:
    """Every tensor is decoded on the device where it ends, with its index."""
    for kind, tensors in run.items():
        assert sum(made["records"] for made in tensors.values()) > 10
        for name, made in tensors.items():
            first = kind == "name" or (kind == "split" and name.startswith(("model.embed_tokens", "model.layers.0")))
            device = 0 if first else 1
            places = {made["asked"], made["on"], made["ends on"]}
            assert places == {f"pretended:{device}"} and made["same"], (kind, name, made)
            assert made["launches"][1 - device] == 0, (kind, name, made)
            assert made["launches"][device] >= (10 if made["records"] else 1), (kind, name, made)


def test_offloading(run: dict[str, Any]) -> None:
    """What stays on the CPU is decoded there, and goes over for each call (accelerate's hooks)."""
    for name, place in run["decoded on"].items():
        assert place == ("cpu" if name == "lm_head.weight" else SECOND), name
        assert run["weights are on"][name] == ("meta" if name == "lm_head.weight" else SECOND), name
    assert run["changed"] == [False, False] and run["moved to"] == [SECOND]


def test_threads(run: dict[str, Any]) -> None:
    """A device without an index is that of the caller's thread, although another thread reads the base."""
    assert len(run) > 10 and set(run.values()) == {SECOND}


def test_distillation(run: dict[str, Any]) -> None:
    for name, result in run.items():
        assert result["launches"][0] > 1000 and result["launches"][1] == 0, (name, result)
        assert result["decodes on"] == ["pretended:0"], name
        assert result["losses"] == pytest.approx(result["losses on the CPU"], rel=1e-3), (name, result)
        assert result["losses"][1] < result["losses"][0]
