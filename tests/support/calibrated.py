"""Compressions with texts, and what they leave behind."""

from __future__ import annotations

import importlib
import json
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from impart_hf import compress
from impart_hf.calibration.text import calibration_tokens
from impart_hf.evaluation.metrics import evaluate, load
from impart_hf.methods import MethodConfig
from support import refusals
from support.tiny_models import Pair, tiny_tokenizer
from support.workspaces import hidden

# Text that comes with Python; of the tiny tokenizer's 320 tokens, nearly one for each byte.
TEXT, HELD_OUT = (Path(str(module.__file__)).read_text("utf-8") for module in (textwrap, shlex))
SIZE = {"calibration_samples": 16, "calibration_length": 64}
RATIO = 4.0
MATRICES = 12  # that are encoded of the tiny LLaMA; keys and values are too small for it


def run(pair: Pair, output: Path, method: MethodConfig, **kwargs: Any) -> Any:
    return compress(str(pair.base), str(pair.finetuned), output, method, **{**SIZE, **kwargs})


def method_of(repository: Path) -> dict[str, Any]:
    return json.loads((repository / "config.json").read_text("utf-8"))["method"]


def divergence(repository: Path, finetuned: Path) -> float:
    """KL(fine-tune || what is loaded) on text that no compression has seen."""
    tokens = calibration_tokens([HELD_OUT], tiny_tokenizer(), samples=24, length=64)
    models = [load(str(folder), torch.float32, "cpu") for folder in (repository, finetuned)]
    return evaluate(models[0], models[1], tokens, 24)[1]


def take_up(pair: Pair, output: Path, method: MethodConfig, **kwargs: Any) -> list[str]:
    """Run to the end; the tensors that were encoded."""
    pipeline = importlib.import_module("impart_hf.compression.encoding")
    encode, redone = pipeline.tasks_of, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "tasks_of", lambda t, *args: redone.append(t.name) or encode(t, *args))
        run(pair, output, method, **kwargs)
    assert not hidden(output).exists()
    return redone


def refuses(pair: Pair, root: Path, error: type[Exception], match: str, method: MethodConfig, **kwargs: Any) -> None:
    """See that there is one clear error, and that the run leaves everything in `root` as it was."""
    refusals.refuses(pair, error, match, root / "delta", root=root, method=method, **{**SIZE, **kwargs})
