"""A tiny LLaMA, a text, and a recipe for them with a stage of every kind but `push`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import make_model, save_model, tiny_config


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of four layers; not to be written to."""
    return save_model(make_model(tiny_config(num_hidden_layers=4)), tmp_path_factory.mktemp("recipes") / "llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "train.txt"
    path.write_text(Path(str(textwrap.__file__)).read_text("utf-8"), "utf-8")
    return path


@pytest.fixture
def recipe(llama: Path, text: Path) -> dict[str, Any]:
    """The content of a recipe, for a test to change."""
    return {
        "model": str(llama),
        "data": str(text),
        "eval": {"text": str(text), "samples": 4, "length": 32},
        "stages": [
            {"importance": {"steps": 2, "length": 32, "batch_size": 2}},
            {"layers": {"drop": 1}},
            {"importance": {"steps": 2, "length": 32, "batch_size": 2, "masks": False}},
            {"width": {"ratio": 0.2}},
            {"recover": {"lora": False, "steps": 3, "length": 32, "batch_size": 2, "learning_rate": 0.001}},
            {"compress": {"method": "lowrank", "ratio": 3}},
        ],
    }
