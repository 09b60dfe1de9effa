"""vLLM's weight transfer with exact deltas: after each step the engine says what the trainer's own model says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.forged_files import forge_record
from support.messages import naming
from support.tiny_models import Pair, fine_tune, make_model, save_model, tiny_config
from support.vllm_engines import HEADS, LONG, PROMPTS, EngineError, EngineProcess, delta_of, tokens_of
from support.vllm_server import Server

from impart_hf import ExactConfig

pytestmark = pytest.mark.vllm
ALL = [*PROMPTS, LONG]
BACKEND = {"backend": "impart_hf"}
VALUE = "model.layers.0.self_attn.v_proj.weight"
# What each step of the trainer changes.
STEPS = ("mlp", "layers.1", "", "norm", "v_proj")


class Trained:
    """A base, and the exact delta of each of a trainer's steps.

    Attributes:
        folder: its folders are `base` and the steps' numbers.
        said: what the base and then each step's model says.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        model = make_model(tiny_config("llama", **HEADS), dtype=torch.float32)
        self.said = [tokens_of(save_model(model, folder / "base"), ALL)]
        for number, part in enumerate(STEPS, 1):
            model = fine_tune(model, number, only=lambda name, part=part: part in name)
            dense = save_model(model, folder / f"dense{number}")
            delta_of(Pair(folder / "base", dense), self.step(number), ExactConfig())
            self.said.append(tokens_of(dense, ALL))
        assert len({str(tokens) for tokens in self.said}) == len(self.said)

    def step(self, number: int) -> Path:
        return self.folder / str(number)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def engine(trained: Trained) -> Iterator[EngineProcess]:
    with EngineProcess() as engine:
        engine.start(trained.folder / "base", weight_transfer_config=BACKEND)
        yield engine


def update(holder: Any, **info: Any) -> list[str]:
    """Do what a trainer does; the names of the tensors that were decoded."""
    from unittest.mock import patch

    from impart_hf.serving import worker

    decoded, decode = [], worker.decoded_tensors

    def noting(repository: Any, device: Any, names: list[str]) -> Any:
        decoded.extend(names)
        return decode(repository, device, names)

    holder.llm.init_weight_transfer_engine({"init_info": {}})
    with patch.object(worker, "decoded_tensors", noting):
        holder.llm.start_weight_update()
        holder.llm.update_weights({"update_info": info})
        holder.llm.finish_weight_update()
    holder.llm.reset_prefix_cache()
    return decoded


def test_successive_steps(engine: EngineProcess, trained: Trained) -> None:
    counts = []
    for number in (*range(1, len(STEPS) + 1), 1):
        counts.append(len(engine.run(update, delta=str(trained.step(number)))))
        assert engine.tokens(ALL) == trained.said[number], number
    # A step loads what it changes; against the base, it is all that has changed since.
    assert counts == [6, 9, 21, 5, 6, 21]
    engine.run(update, delta=None)
    assert engine.tokens(ALL) == trained.said[0]


def test_a_delta_of_the_last_step(engine: EngineProcess, trained: Trained, tmp_path: Path) -> None:
    """It may rest on the delta of the step before, and what only that one changed is not loaded again."""
    engine.run(update, delta=str(trained.step(4)))
    link = delta_of(Pair(trained.step(4), trained.folder / "dense5"), tmp_path / "link", ExactConfig())
    assert len(engine.run(update, delta=str(link))) == 6
    assert engine.tokens(ALL) == trained.said[5]


def test_wrong_deltas_change_nothing(engine: EngineProcess, trained: Trained, tmp_path: Path) -> None:
    engine.run(update, delta=str(trained.step(3)))
    other = save_model(make_model(tiny_config("llama", **HEADS), 9, dtype=torch.float32), tmp_path / "base")
    elsewhere = delta_of(Pair(other, trained.folder / "dense1"), tmp_path / "elsewhere", ExactConfig())
    broken = Path(shutil.copytree(trained.step(5), tmp_path / "broken"))
    forge_record(broken, lambda data: data[:-1], VALUE, "exact")
    flipped = Path(shutil.copytree(trained.step(5), tmp_path / "flipped"))
    data = bytearray((flipped / "delta_model.safetensors").read_bytes())
    data[-50] ^= 1
    (flipped / "delta_model.safetensors").write_bytes(data)
    for info, names in (
        ({"delta": str(elsewhere)}, ("WrongBaseError",)),
        ({"delta": str(flipped)}, ("DeltaFormatError", "CRC-32")),
        ({"delta": str(broken)}, ("WeightUpdateError", VALUE, "old weights are back")),
        ({"delta": str(tmp_path / "none")}, ("CheckpointError", tmp_path / "none")),
        ({"names": []}, ("ValueError", "names")),
    ):
        with pytest.raises(EngineError, match=naming(names)):
            engine.run(update, **info)
        assert engine.tokens(ALL) == trained.said[3], names
    assert len(engine.run(update, delta=str(trained.step(4)))) == 5
    assert engine.tokens(ALL) == trained.said[4]


def test_swaps_know_what_was_transferred(engine: EngineProcess, trained: Trained) -> None:
    """Both load into the same engine, and each knows what the other has loaded."""
    engine.run(update, delta=str(trained.step(3)))
    assert engine.run(swap, trained.step(4)) == 5
    assert len(engine.run(update, delta=str(trained.step(5)))) == 6
    assert engine.tokens(ALL) == trained.said[5]


def swap(holder: Any, repo: Path) -> int:
    from impart_hf.serving import DeltaSwitch

    return DeltaSwitch(holder.llm).load(str(repo)).tensors


def test_one_worker_only() -> None:
    from impart_hf.serving.weight_transfer import DeltaTransferEngine

    config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=2), model_config=None)
    with pytest.raises(ValueError, match=naming("one worker")):
        DeltaTransferEngine(None, config, torch.device("cpu"), torch.nn.Module())  # type: ignore[arg-type]


def test_over_http(trained: Trained) -> None:
    """With vLLM's own client for trainers, and requests between the updates."""
    from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient

    options = ("--weight-transfer-config", '{"backend": "impart_hf"}')
    with Server(trained.folder / "base", *options, env={"VLLM_SERVER_DEV_MODE": "1"}) as server:
        client = HTTPVLLMWeightSyncClient(server.url)
        client.init_weight_transfer_engine({})
        for number in (1, 2, 5):
            server.request("/pause?mode=wait", b"")
            client.start_weight_update()
            client.update_weights({"delta": str(trained.step(number))})
            client.finish_weight_update(weight_version=str(number))
            server.request("/resume", b"")
            assert server.all_tokens(ALL, 8) == trained.said[number]
            assert server.request("/weight_info")[1] == {"weight_version": str(number)}
        client.start_weight_update()
        assert server.request("/update_weights", {"update_info": {"delta": str(trained.folder)}})[0] == 500
        assert server.all_tokens(ALL, 8) == trained.said[5]
