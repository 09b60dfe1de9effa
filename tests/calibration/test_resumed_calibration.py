"""A calibration that was broken off goes on where it stopped: finished layers are not run again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibrated import TEXT, run
from support.tiny_models import Pair, save_pair, tiny_config
from support.workspaces import differing, hidden

from impart_hf.calibration import layer_stream
from impart_hf.calibration.hidden_states import HiddenStates
from impart_hf.methods import ImPartQtConfig
from impart_hf.storage.workspace import Workspace

LAYERS = 4
METHOD = ImPartQtConfig(compression_ratio=4.0)


class Stop(Exception):
    """The end of a run from outside."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("pair"), tiny_config("llama", num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def unbroken(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "delta"
    run(pair, output, METHOD, calibration=[TEXT])
    return output


def layers_run(monkeypatch: pytest.MonkeyPatch, stop: Any = None) -> Counter[int]:
    """Count how often each layer is run on a batch; `stop` may raise, given a layer's number and these counts."""
    counts: Counter[int] = Counter()
    output = layer_stream._LayerRun.output

    def counted(self: Any, index: int) -> torch.Tensor:
        counts[self.number] += 1
        if stop is not None:
            stop(self.number, counts)
        return output(self, index)

    monkeypatch.setattr(layer_stream._LayerRun, "output", counted)
    return counts


# In the first layer; in the third, as its inputs are seen; as its outputs are computed for the next layer.
@pytest.mark.parametrize(("layer", "runs"), [(0, 3), (2, 2), (2, 17)])
def test_finished_layers_are_not_run_again(
    pair: Pair, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int, runs: int
) -> None:
    def stop(number: int, counts: Counter[int]) -> None:
        if number == layer and counts[number] == runs:
            raise Stop

    output = tmp_path / "delta"
    with monkeypatch.context() as patch:
        before = layers_run(patch, stop)
        with pytest.raises(Stop):
            run(pair, output, METHOD, calibration=[TEXT])
    assert before.keys() == set(range(layer + 1))
    after = layers_run(monkeypatch)
    run(pair, output, METHOD, calibration=[TEXT])
    assert after.keys() == set(range(layer, LAYERS))
    assert differing(output, unbroken) == []
    assert not hidden(output).exists()


def test_what_comes_after_the_layers_does_not_repeat_them(
    pair: Pair, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise Stop

    output = tmp_path / "delta"
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr("impart_hf.compression.pipeline.write_repository", stop)
        run(pair, output, METHOD, calibration=[TEXT])
    assert [path.name for path in (hidden(output) / "states").iterdir()] == [f"layer-{LAYERS}"]
    after = layers_run(monkeypatch)
    run(pair, output, METHOD, calibration=[TEXT])
    assert not after and differing(output, unbroken) == []


def test_room_for_hidden_states_is_asked_for(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def begin(self: Workspace, fingerprint: str, expected_bytes: int, kept_bytes: int = 0) -> bool:
        asked.append(kept_bytes)
        raise Stop

    monkeypatch.setattr(Workspace, "begin", begin)
    for text in (None, [TEXT]):
        with pytest.raises(Stop):
            run(pair, tmp_path / "delta", METHOD, calibration=text)
    # Two files of bfloat16 hidden states: of the layer that is run, and of the next one.
    assert asked[1] - asked[0] == 2 * 16 * 64 * 64 * 2


def test_states_are_replaced_whole(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path, (3, 5, 4), torch.bfloat16)
    assert states.layer() is None
    first, second = (torch.randn(3, 5, 4).bfloat16() for _ in range(2))
    with states.replace(0) as write:
        for start in (2, 0):  # processes write in any order
            write(start, first[start : start + 2])
    assert states.layer() == 0 and torch.equal(states.read(), first)
    with pytest.raises(Stop), states.replace(1) as write:
        write(0, second[:1])
        raise Stop
    assert HiddenStates(tmp_path, (3, 5, 4), torch.bfloat16).layer() == 0 and torch.equal(states.read(), first)
    with states.replace(1) as write:
        write(0, second)
    assert states.layer() == 1 and torch.equal(states.read(), second)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ""] == ["layer-1"]
