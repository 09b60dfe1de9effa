"""Chains of deltas in vLLM: an engine that is started on a link, and swaps from link to link."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.chains import chain_of, checkpoints
from support.messages import naming
from support.tiny_models import fine_tune, make_model, save_model, tiny_config
from support.vllm_engines import HEADS, LONG, PROMPTS, EngineError, EngineProcess, swap_to, tokens_of

from impart_hf import ExactConfig, compress

pytestmark = pytest.mark.vllm


def test_started_on_a_link_and_swapped(tmp_path: Path) -> None:
    base = make_model(tiny_config("llama", **HEADS), dtype=torch.float32)
    models = checkpoints(tmp_path, 1, base)
    models.append(save_model(fine_tune(base, 7), tmp_path / "last"))
    deltas = chain_of(tmp_path, models)
    expected = [tokens_of(model, [*PROMPTS, LONG]) for model in models]
    assert expected[0] != expected[2]
    other = save_model(make_model(tiny_config("llama", **HEADS), seed=9, dtype=torch.float32), tmp_path / "other")
    compress(str(other), str(models[1]), tmp_path / "first", ExactConfig())
    compress(str(tmp_path / "first"), str(models[2]), tmp_path / "second", ExactConfig())
    with EngineProcess() as engine:
        for start in (2, 0):
            engine.start(deltas[1] if start else models[0])
            assert engine.tokens([*PROMPTS, LONG]) == expected[start]
            for number in (1, 2, 0, 2):
                engine.run(swap_to, deltas[number - 1] if number else None)
                assert engine.tokens([*PROMPTS, LONG]) == expected[number]
        with pytest.raises(EngineError, match=naming(str(tmp_path / "second"), str(other))):
            engine.run(swap_to, tmp_path / "second")
