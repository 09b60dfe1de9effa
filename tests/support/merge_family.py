"""A base and fine-tunes of it that are merged, and what the tests of merging look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from impart_hf import LowRankConfig, compress
from support.tiny_models import fine_tune, load_tensors, make_model, save_model, tiny_config, tiny_tokenizer

TOKENS = len(tiny_tokenizer())
LINEAR = "model.layers.0.mlp.up_proj.weight"


def make_family(folder: Path) -> Path:
    """Make `base`, its fine-tunes `a`, `b`, `c` in float32, and `c-delta`, nearly c."""
    base = make_model(tiny_config("llama", num_hidden_layers=3, vocab_size=TOKENS), dtype=torch.float32)
    save_model(base, folder / "base")
    for seed, name in enumerate("abc", 1):
        save_model(fine_tune(base, seed), folder / name)
    compress(str(folder / "base"), str(folder / "c"), folder / "c-delta", LowRankConfig(compression_ratio=1.5))
    return folder


def config(family: Path, method: str, models: dict[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A merge's configuration, of models of the family with their parameters."""
    listed = [{"model": str(family / name), "parameters": parameters} for name, parameters in models.items()]
    return {"merge_method": method, "base_model": str(family / "base"), "models": listed, **more}


def deltas_of(family: Path, *names: str) -> list[dict[str, torch.Tensor]]:
    """float64 deltas of models of the family, by tensor."""
    base = load_tensors(family / "base")
    return [
        {name: tensor.double() - base[name].double() for name, tensor in load_tensors(family / model).items()}
        for model in names
    ]


def merged_deltas(family: Path, folder: Path) -> dict[str, torch.Tensor]:
    base = load_tensors(family / "base")
    return {name: tensor.double() - base[name].double() for name, tensor in load_tensors(folder).items()}
