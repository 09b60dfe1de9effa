"""Chains of deltas, each the base of the next.

    models = checkpoints(tmp_path, 3)
    deltas = chain_of(tmp_path, models)

Long ones are made of two exact deltas, one from a base to its fine-tune and one back, whose copies rest on each other.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedModel

from impart_hf import ExactConfig, compress
from support.tiny_models import Pair, edit_json, edit_tensors, make_model, save_model, tiny_config

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
_READER = shutil.ignore_patterns("*.py")


def checkpoints(folder: Path, count: int, base: PreTrainedModel | None = None) -> list[Path]:
    """A tiny LLaMA and checkpoints of its training: each changes a norm, and some rows of one of two matrices."""
    models = [save_model(base or make_model(tiny_config("llama")), folder / "base")]
    for number in range(1, count + 1):
        models.append(Path(shutil.copytree(models[-1], folder / f"step-{number}")))

        def train(tensors: dict, number: int = number) -> None:
            tensors["model.norm.weight"] += 0.25
            tensors[(UP, DOWN)[number % 2]][number : number + 8] *= 1.5

        edit_tensors(models[-1], train)
    return models


def chain_of(folder: Path, models: list[Path]) -> list[Path]:
    """The exact deltas of checkpoints, each against the one before, and the first against the first model."""
    base, deltas = models[0], []
    for number, model in enumerate(models[1:], 1):
        deltas.append(folder / f"delta-{number}")
        compress(str(base), str(model), deltas[-1], ExactConfig())
        base = deltas[-1]
    return deltas


def there_and_back(folder: Path, pair: Pair) -> tuple[Path, Path]:
    """The exact delta from a base to its fine-tune, and the one from there back to the base."""
    there, back = folder / "there", folder / "back"
    compress(str(pair.base), str(pair.finetuned), there, ExactConfig())
    compress(str(there), str(pair.base), back, ExactConfig())
    return there, back


def long_chain(folder: Path, two: tuple[Path, Path], length: int) -> list[Path]:
    """A chain of so many deltas: the odd ones stand for the fine-tune, the even ones for the base."""
    deltas: list[Path] = []
    for number in range(length):
        deltas.append(Path(shutil.copytree(two[number % 2], folder / f"link-{number + 1}", ignore=_READER)))
        if number:
            edit_json(deltas[-1] / "config.json", base_model_name_or_path=str(deltas[-2]), base_is_delta=True)
    return deltas
