"""Gemma 2 is evaluated, calibrated, distilled and pruned with the attention that it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_model, save_model, tiny_config
from transformers import AutoModelForCausalLM

from impart_hf.calibration.streamed_model import streamed_model
from impart_hf.distillation.student import finetuned_tensors
from impart_hf.distillation.student import load_model as load_student
from impart_hf.evaluation.metrics import load
from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.modeling.model_files import HubOptions
from impart_hf.pruning.lora import load_model as load_for_pruning

IDS = torch.arange(4, 44)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config("gemma2", attn_logit_softcapping=0.05)
    return save_model(make_model(config, dtype=torch.float32), tmp_path_factory.mktemp("gemma2"))


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(str(folder), HubOptions())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def with_attention(folder: Path, implementation: str) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation))


def test_scores_are_capped(folder: Path, checkpoint: Checkpoint) -> None:
    capped = with_attention(folder, "eager")
    assert (with_attention(folder, "sdpa") - capped).abs().max() > 0.01  # what transformers does by itself
    for model in (
        load(str(folder), torch.float32, "cpu"),
        load_student(checkpoint, finetuned_tensors(checkpoint), torch.float32, torch.device("cpu")),
        load_for_pruning(checkpoint, torch.float32),
    ):
        torch.testing.assert_close(logits(model), capped)
    streamed = streamed_model(checkpoint, IDS, "cpu", dtype=torch.float32)
    assert streamed.model.config._attn_implementation == "eager"


def test_who_asks_for_another_attention_gets_it(folder: Path) -> None:
    model = load(str(folder), torch.float32, "cpu", attn_implementation="sdpa")
    torch.testing.assert_close(logits(model), with_attention(folder, "sdpa"))
