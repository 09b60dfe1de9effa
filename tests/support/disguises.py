"""One model in other files: names and tensors that transformers' loader takes for the same model.

save_model(model, folder, **SAVED.get(disguise, {}))
DISGUISES[disguise](folder)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.tiny_models import edit_tensors

_PREFIXES = {"gpt2": "transformer.", "bloom": "transformer.", "gpt_neox": "gpt_neox.", "biogpt": "biogpt."}


def model_type(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    """Rename all tensors of a checkpoint that has one safetensors file."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {new_name(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    edit_tensors(folder, edit)


def without_prefix(folder: Path) -> None:
    """As saved by the class without a language model's head; a head keeps its name."""
    prefix = _PREFIXES.get(model_type(folder), "model.")
    rename(folder, lambda name: name.removeprefix(prefix))


def with_prefix(prefix: str) -> Callable[[Path], None]:
    """As saved from inside a wrapper."""
    return lambda folder: rename(folder, prefix.__add__)


def with_buffers(folder: Path) -> None:
    """With what models stored of old: masks and frequencies."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for layer in {name.rpartition(".")[0] for name in tensors if ".0." in name and "norm" in name}:
            tensors[f"{layer}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
            tensors[f"{layer}.attn.masked_bias"] = torch.tensor(-float("inf"))
            tensors[f"{layer}.attn.rotary_emb.inv_freq"] = torch.rand(8)

    edit_tensors(folder, add)


def in_shards(folder: Path) -> None:
    """In three files; the index names each tensor's, and a tied output projection that none holds."""
    tensors = load_file(folder / "model.safetensors")
    names, index = sorted(tensors), {}
    if json.loads((folder / "config.json").read_text()).get("tie_word_embeddings"):
        index["lm_head.weight"] = "model-00002-of-00003.safetensors"
    for number in range(3):
        filename = f"model-{number + 1:05}-of-00003.safetensors"
        index.update(dict.fromkeys(names[number::3], filename))
        save_file({n: tensors[n] for n in names[number::3]}, folder / filename, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def unchanged(folder: Path) -> None:
    pass


DISGUISES: dict[str, Callable[[Path], None]] = {
    "as saved": unchanged,
    "without prefix": without_prefix,
    "as in memory": unchanged,
    "compiled": with_prefix("_orig_mod."),
    "distributed": with_prefix("module."),
    "PEFT": with_prefix("base_model.model."),
    "buffers": with_buffers,
    "shards": in_shards,
}
SAVED: dict[str, dict[str, Any]] = {"as in memory": {"save_original_format": False}}
