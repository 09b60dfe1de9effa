"""Exact deltas in a running engine: swaps load what differs, and the tokens are those of the fine-tunes themselves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forged_files import forge_record
from support.messages import naming
from support.tiny_models import Pair, fine_tune, make_model, save_model, tiny_config
from support.vllm_engines import HEADS, LONG, PROMPTS, EngineError, EngineProcess, delta_of, tokens_of

from impart_hf import ExactConfig, LowRankConfig

pytestmark = pytest.mark.vllm
ALL = [*PROMPTS, LONG]
KEY, DOWN = "model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"


def make_family(folder: Path, kind: str = "llama", **fields: int) -> dict[str, list[list[int]]]:
    """A base, three exact deltas and a lossy one, and what each says, the dense fine-tunes for the exact ones.

    `one` changes all tensors, `two` is `one` with two other tensors, `three` changes embeddings and norms.
    """
    base = make_model(tiny_config(kind, **fields), dtype=torch.float32)
    one = fine_tune(base, 1, 1.0)  # strong: with tied embeddings, a random model says little but its last token
    models = {
        "one": one,
        "two": fine_tune(one, 2, 1.0, only=lambda name: name in (KEY, DOWN)),
        "three": fine_tune(base, 3, 1.0, only=lambda name: "embed" in name or "norm" in name),
    }
    said = {"base": tokens_of(save_model(base, folder / "base"), ALL)}
    for name, model in models.items():
        dense = save_model(model, folder / f"{name}-dense")
        delta_of(Pair(folder / "base", dense), folder / name, ExactConfig())
        said[name] = tokens_of(dense, ALL)
    lossy = delta_of(Pair(folder / "base", folder / "one-dense"), folder / "lossy", LowRankConfig(compression_ratio=12))
    said["lossy"] = tokens_of(lossy, ALL)
    assert len({str(tokens) for tokens in said.values()}) == len(said)
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exact")


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, list[list[int]]]:
    return make_family(folder, **HEADS)


@pytest.fixture(scope="module")
def process(folder: Path, said: dict[str, list[list[int]]]) -> Iterator[EngineProcess]:
    """After the family was made: what is written later is not taken for what an engine has read."""
    with EngineProcess() as process:
        yield process


@pytest.fixture
def engine(process: EngineProcess, folder: Path) -> EngineProcess:
    process.start(folder / "base")
    return process


def swap(holder: Any, repo: Path | None) -> int:
    """Swap to a delta; how many tensors were loaded."""
    from impart_hf.serving import DeltaSwitch

    if holder.deltas is None:
        holder.deltas = DeltaSwitch(holder.llm)
    return holder.deltas.load(repo if repo is None else str(repo)).tensors


def check(engine: EngineProcess, folder: Path, said: dict[str, list[list[int]]], name: str, loaded: int) -> None:
    """Swap, and compare the number of tensors that were loaded, and the tokens."""
    assert engine.run(swap, None if name == "base" else folder / name) == loaded, name
    assert engine.tokens(ALL) == said[name], name


def test_only_what_differs_is_loaded(engine: EngineProcess, folder: Path, said: dict[str, list[list[int]]]) -> None:
    """Key projections go with query and value; embeddings and the five norms alone; records never equal tensors."""
    steps = {"one": 21, "two": 4, "base": 21, "three": 6, "lossy": 21}
    for name, loaded in steps.items():
        check(engine, folder, said, name, loaded)
    for name, loaded in (("one", 21), ("one", 0), ("two", 4), ("one", 4), ("base", 21), ("three", 6), ("base", 6)):
        check(engine, folder, said, name, loaded)


def test_started_on_an_exact_delta(process: EngineProcess, folder: Path, said: dict[str, list[list[int]]]) -> None:
    process.start(folder / "two")
    assert process.tokens(ALL) == said["two"]
    for name, loaded in (("one", 4), ("base", 21), ("three", 6)):
        check(process, folder, said, name, loaded)


def test_the_old_values_come_back(engine: EngineProcess, folder: Path, said: dict[str, list[list[int]]]) -> None:
    """A record whose damage only decoding tells: what was loaded before it is loaded from the old delta again."""
    broken = Path(shutil.copytree(folder / "two", folder / "broken"))
    forge_record(broken, lambda data: data[:-1], KEY, "exact")
    check(engine, folder, said, "one", 21)
    with pytest.raises(EngineError, match=naming("SwapError", "DeltaFormatError", KEY)):
        engine.run(swap, broken)
    assert engine.tokens(ALL) == said["one"]
    check(engine, folder, said, "two", 4)


def test_folders_that_are_written_again(engine: EngineProcess, folder: Path, said: dict[str, list[list[int]]]) -> None:
    """A trainer may use one folder for all steps. Only a failure then leaves an engine without weights."""
    step = folder / "step"

    def put(name: str) -> None:
        shutil.rmtree(step, ignore_errors=True)
        shutil.copytree(folder / name, step)

    for name, loaded in (("one", 21), ("two", 4), ("one", 4)):
        put(name)
        assert engine.run(swap, step) == loaded
        assert engine.tokens(ALL) == said[name]
    put("two")
    forge_record(step, lambda data: data[:-1], KEY, "exact")
    with pytest.raises(EngineError, match=naming("EngineUnsoundError", KEY, step)):
        engine.run(swap, step)
    check(engine, folder, said, "three", 21)


def test_base_that_is_written_after_the_start(
    process: EngineProcess, folder: Path, said: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """What the engine has read then is not known, so that all is loaded once."""
    base = Path(shutil.copytree(folder / "base", tmp_path / "base"))
    process.start(base)
    check(process, folder, said, "three", 21)
    check(process, folder, said, "base", 6)


def test_models_that_do_not_tell_what_goes_where(
    engine: EngineProcess, folder: Path, said: dict[str, list[list[int]]]
) -> None:
    """If loading one tensor alone fails, the model is left as it was, and all tensors are loaded."""
    check(engine, folder, said, "one", 21)
    assert engine.run(swap_without_places, folder / "two") == 21
    assert engine.tokens(ALL) == said["two"]
    check(engine, folder, said, "one", 21)


def swap_without_places(holder: Any, repo: Path) -> int:
    from unittest.mock import patch

    from impart_hf.serving.partial_reload import _Recorder

    ask = _Recorder.modules_of

    def fails(recorder: Any, name: str, empty: Any) -> Any:
        if name == KEY:
            raise KeyError(name)
        return ask(recorder, name, empty)

    with patch.object(_Recorder, "modules_of", fails):
        return swap(holder, repo)


@pytest.mark.parametrize(
    ("kind", "fields", "numbers"),
    # Tied embeddings and norms of heads; biases of joined layers.
    [("gemma3", HEADS, (28, 4, 14)), ("qwen2", {"num_attention_heads": 2}, (27, 7, 6))],
)
def test_architectures(
    process: EngineProcess, tmp_path: Path, kind: str, fields: dict[str, int], numbers: tuple[int, int, int]
) -> None:
    everything, few, third = numbers
    said = make_family(tmp_path, kind, **fields)
    process.start(tmp_path / "base")
    steps = {"one": everything, "two": few, "base": everything, "three": third}
    for name, loaded in steps.items():
        check(process, tmp_path, said, name, loaded)
