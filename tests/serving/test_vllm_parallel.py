"""Tensor parallel: an engine of two workers, each a process of its own."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forged_files import forge_record
from support.messages import naming
from support.tiny_models import Pair, fine_tune, make_model, save_model, tiny_config
from support.vllm_engines import HEADS, LONG, PROMPTS, EngineError, EngineProcess, delta_of, swap_to, tokens_of
from transformers import AutoModelForCausalLM

from impart_hf import ExactConfig, PrunedLlamaConfig

pytestmark = pytest.mark.vllm
TWO_ON_ONE_NODE = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # it would want a NUMA node for each
KEY = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with EngineProcess(**TWO_ON_ONE_NODE) as process:
        yield process


def save_pruned(folder: Path, widths: dict[str, list[int]]) -> Path:
    llama = tiny_config("llama", num_attention_heads=8, num_key_value_heads=4, **HEADS)
    return save_model(make_model(PrunedLlamaConfig.with_widths(llama, **widths), dtype=torch.float32), folder)


def test_swaps_on_two_workers(
    engine: EngineProcess, family: Path, family_tokens: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    engine.start(family / "one", tensor_parallel_size=2)
    assert engine.tokens([*PROMPTS, LONG]) == family_tokens["one"]
    engine.run(swap_to, family / "two")
    assert engine.tokens([*PROMPTS, LONG]) == family_tokens["two"]
    broken = Path(shutil.copytree(family / "three", tmp_path / "broken"))
    forge_record(broken, lambda data: data[:-1])
    for _ in range(2):  # twice: an answer that a worker left behind would be taken for the next one
        with pytest.raises(EngineError, match=naming("SwapError", "DeltaFormatError")):
            engine.run(swap_to, broken)
        assert engine.tokens([*PROMPTS, LONG]) == family_tokens["two"]
    engine.run(swap_to, None)
    assert engine.tokens([*PROMPTS, LONG]) == family_tokens["base"]


def test_swaps_of_some_tensors_on_two_workers(
    engine: EngineProcess, family: Path, family_tokens: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    """After the test above, which has started the engine; it serves the base again."""
    base = AutoModelForCausalLM.from_pretrained(family / "base")
    few = save_model(fine_tune(base, 7, only=lambda name: name == KEY), tmp_path / "few")
    exact = delta_of(Pair(family / "base", few), tmp_path / "exact", ExactConfig())
    assert engine.run(count_loaded, exact) == 3
    assert engine.tokens([*PROMPTS, LONG]) == tokens_of(few, [*PROMPTS, LONG])
    assert engine.run(count_loaded, None) == 3
    forge_record(exact, lambda data: data[:-1], KEY, "exact")
    with pytest.raises(EngineError, match=naming("SwapError", "DeltaFormatError")):
        engine.run(count_loaded, exact)
    assert engine.tokens([*PROMPTS, LONG]) == family_tokens["base"]


def count_loaded(holder: Any, repo: Path | None) -> int:
    """Swap to a delta; how many tensors were loaded."""
    return holder.deltas.load(repo if repo is None else str(repo)).tensors


def test_pruned(engine: EngineProcess, tmp_path: Path) -> None:
    widths = {"num_attention_heads": [4, 6], "num_key_value_heads": [4, 1], "intermediate_size": [72, 34]}
    model = save_pruned(tmp_path / "model", widths)
    engine.start(model, tensor_parallel_size=2)
    assert engine.tokens() == tokens_of(model)


def test_pruned_that_cannot_be_divided(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    widths = {"num_attention_heads": [4, 3], "num_key_value_heads": [4, 3], "intermediate_size": [72, 33]}
    model = save_pruned(tmp_path / "model", widths)
    with EngineProcess(**TWO_ON_ONE_NODE) as engine, pytest.raises(EngineError):
        engine.start(model, tensor_parallel_size=2)
    said = capfd.readouterr()
    assert re.search(naming("layer 1", "3 attention heads", "3 KV heads", "33 channels"), said.err + said.out)
