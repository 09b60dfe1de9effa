"""The stages of a compression: those that a run shows, and how long they are expected to take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibrated import TEXT, run
from support.tiny_models import Pair
from support.workspaces import break_off

from impart_hf.calibration.streamed_model import streamed_model
from impart_hf.common.progress import Progress
from impart_hf.compression.pair import ModelPair
from impart_hf.compression.pipeline import CompressionRequest, Reach, planned
from impart_hf.compression.stage_times import StageTimes, stage_times
from impart_hf.distillation import DistillSettings
from impart_hf.methods import method_class
from impart_hf.modeling.model_files import HubOptions

STEPS = DistillSettings(steps=2, batch_size=4)
DISTILL = {"distill": [TEXT], "distill_settings": STEPS}
BY_BLOCKS = {"distill": [TEXT], "distill_settings": DistillSettings(steps=2, batch_size=4, blocks=1)}


def shown(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """What has begun, and what has ended, in a log."""
    lines = capsys.readouterr().err.splitlines()
    ended = [line.partition(":")[0] for line in lines if re.search(r": done in [\d.]+ s$", line)]
    return [line for line in lines if ": done in" not in line], ended


@pytest.mark.parametrize(
    ("name", "texts", "titles"),
    [
        ("dare", {}, ["Scanning", "Compressing", "Writing"]),
        ("impart-rd", {"calibration": None}, ["Scanning", "Decomposing", "Allocating", "Compressing", "Writing"]),
        ("impart-qt", {"calibration": [TEXT]}, ["Scanning", "Compressing", "Writing"]),
        pytest.param("bitdelta", DISTILL, ["Scanning", "Compressing", "Distilling", "Writing"], marks=pytest.mark.slow),
        (
            "impart-rd",
            {"calibration": [TEXT], **DISTILL},
            [
                "Scanning",
                "Decomposing",
                "Measuring sensitivity",
                "Allocating",
                "Compressing",
                "Distilling",
                "Writing",
            ],  # fmt: skip
        ),
    ],
)
def test_the_stages_of_a_run(
    tiny_pair: Pair,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    texts: dict[str, Any],
    titles: list[str],
) -> None:
    run(tiny_pair, tmp_path / "delta", method_class(name)(compression_ratio=4.0), progress=True, **texts)
    begun, ended = shown(capsys)
    assert begun == ended == [f"{number}/{len(titles)} {title}" for number, title in enumerate(titles, 1)]


@pytest.mark.slow
def test_parts_of_a_stage(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny_pair, tmp_path / "delta", method_class("bitdelta")(compression_ratio=4.0), progress=True, **BY_BLOCKS)
    begun, ended = shown(capsys)
    assert begun == ended and begun[2:] == [
        "3/4 Distilling layers 1 to 1 of 2", "3/4 Distilling layers 2 to 2 of 2", "4/4 Writing",
    ]  # fmt: skip


def test_a_resumed_run_has_no_scan(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = method_class("impart-rd")(compression_ratio=4.0)
    break_off(lambda: run(tiny_pair, tmp_path / "delta", method), tmp_path / "delta", 3)
    assert capsys.readouterr().err == ""  # no bars were asked for
    run(tiny_pair, tmp_path / "delta", method, progress=True)
    begun, ended = shown(capsys)
    # What the sensitivity is has been stored.
    assert begun == ended == ["1/5 Decomposing", "3/5 Allocating", "4/5 Compressing", "5/5 Writing"]


def times(pair: Pair, name: str, text: bool, done: frozenset[str] = frozenset(), least: float = 0.0) -> StageTimes:
    method = method_class(name)(compression_ratio=4.0)
    opened = ModelPair(
        str(pair.base), str(pair.finetuned), HubOptions(), HubOptions(),
        device=torch.device("cpu"), progress=Progress(False),
    )  # fmt: skip
    tokens = opened.tokens([TEXT], 16, 64) if text else None
    stream = None if tokens is None else streamed_model(opened.finetuned, tokens, opened.device)
    reach = Reach(frozenset() if stream is None else stream.matrices)
    _, _, plan = planned(opened, opened.tensors, CompressionRequest(method, calibration=tokens), reach)
    return stage_times(opened, plan, method, stream, tokens, tokens, STEPS, done.__contains__, least)


@pytest.mark.parametrize("text", [False, True])
def test_all_that_follows_has_a_time(tiny_pair: Pair, text: bool) -> None:
    numbers = torch.get_rng_state()
    found = times(tiny_pair, "impart-rd", text)
    assert torch.equal(torch.get_rng_state(), numbers)  # the run that follows is the same
    wanted = {"Decomposing", "Allocating", "Compressing", "Writing"}
    wanted |= {"Measuring sensitivity", "Distilling"} if text else set()
    assert found.stages.keys() == wanted
    assert all(found.stages[stage] > 0 for stage in wanted - {"Writing"})
    assert found.stages["Compressing"] == pytest.approx(sum(found.tensors.values()))
    down, key = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    assert found.tensors[down] > found.tensors[key] > 0


def test_what_is_encoded_takes_no_time(tiny_pair: Pair) -> None:
    names = frozenset(times(tiny_pair, "dare", False).tensors)
    rest = times(tiny_pair, "dare", False, names - {"model.layers.0.mlp.down_proj.weight"})
    assert len(names) > 1 and rest.tensors.keys() == {"model.layers.0.mlp.down_proj.weight"}
    left = times(tiny_pair, "impart-rd", True, frozenset(times(tiny_pair, "impart-rd", False).tensors)).stages
    assert left["Distilling"] > 0 and left["Decomposing"] == left["Allocating"] == left["Compressing"] == 0


def test_a_short_run_is_not_timed(tiny_pair: Pair) -> None:
    assert times(tiny_pair, "impart-rd", False, least=1e9) == StageTimes()
