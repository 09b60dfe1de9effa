"""Of importance reports, only a sound one of the very model is read."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.messages import naming
from support.pruning_reports import made_up_importance
from support.tiny_models import edit_json, fine_tune, make_model, save_model, tiny_config

import impart_hf  # noqa: F401  # registers the pruned model's classes
from impart_hf.pruning.checks import open_decoder
from impart_hf.pruning.importance_report import Importance

SHAPE = {"family": "llama", "hidden_size": 64, "head_dim": 16, "vocab_size": 320, "tied": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model(tiny_config("llama")), tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def report(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    folder = tmp_path_factory.mktemp("report")
    made_up_importance(model).save(folder)
    return folder


def copied(report: Path, target: Path) -> Path:
    target.mkdir()
    for path in report.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"format_version": 1}, ("format", "version 1")),
        ({"format_version": None}, ("format", "version None")),
        ({"fingerprint": 5}, ("fingerprint", 5)),
        ({"model": ""}, ("model", "''")),
        ({"shape": [1]}, ("importance.json", "shape")),
        ({"shape": {"hidden_size": 64}}, ("family", "None")),
        ({"shape": {"family": "mixtral"}}, ("family", "'mixtral'", "qwen2")),
        ({"shape": {"family": "llama", "hidden_size": "64"}}, ("hidden_size", "'64'")),
        ({"shape": {"family": "llama", "hidden_size": 64, "head_dim": -16}}, ("head_dim", -16)),
        ({"shape": {**SHAPE, "biased": ["mlp.gate_up_proj"]}}, ("biased", "mlp.gate_up_proj")),
        ({"shape": {**SHAPE, "biased": [["mlp.up_proj"]]}}, "biased"),
        ({"shape": {**SHAPE, "biased": False}}, ("biased", "False")),
        ({"layers": []}, ("importance.json", "layers")),
        ({"layers": [3]}, "layers"),
        ({"layers": [{"layer": 0}]}, ("num_attention_heads", "None")),
        ({"losses": ["low"]}, ("loss", "'low'")),
        ({"losses": [10**400]}, "loss"),
        ({"losses": []}, "losses"),
        ({"top_percent": 101}, ("top_percent", 101.0)),
        ({"top_percent": True}, ("top_percent", "True")),
        ({"masks": 1}, "masks"),
        ({"settings": 4}, "settings"),
    ],
)
def test_a_hostile_report(report: Path, tmp_path: Path, changes: dict[str, Any], names: Any) -> None:
    folder = copied(report, tmp_path / "report")
    edit_json(folder / "importance.json", **changes)
    with pytest.raises(ValueError, match=naming(folder, "impart-hf prune importance", names)):
        Importance.load(folder)


@pytest.mark.parametrize(
    ("name", "value", "names"),
    [
        ("igia", math.nan, ("igia", "nan")),
        ("gradient_norm", -1.0, ("gradient_norm", -1.0)),
        ("num_attention_heads", 10**12, 10**12),
        ("num_attention_heads", 3, ("layer 1", "heads", "KV heads")),
        ("num_attention_heads", 2**30, "importance.safetensors"),
        ("intermediate_size", 127, "importance.safetensors"),
        ("intermediate_size", True, ("intermediate_size", "True")),
    ],
)
def test_a_hostile_layer(report: Path, tmp_path: Path, name: str, value: Any, names: Any) -> None:
    folder = copied(report, tmp_path / "report")
    content = json.loads((folder / "importance.json").read_text())
    content["layers"][1][name] = value
    (folder / "importance.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=naming(folder, names)):
        Importance.load(folder)


def edited(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        tensors.pop(key)
        if tensor is not None:
            tensors[key] = tensor
    save_file(tensors, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"heads__igia": None}, ("importance.safetensors", "entries")),
        ({"heads__igia": torch.ones(9)}, ("heads.igia", "F32", "[9]")),
        ({"heads__igia": torch.ones(8, dtype=torch.float64)}, ("heads.igia", "F64")),
        ({"heads__igia": torch.full((8,), math.nan)}, ("score", "finite")),
        ({"groups__gradient_norm": torch.full((4,), math.inf)}, ("score", "finite")),
        ({"channels__igia": torch.full((256,), -1e-9)}, ("score", "negative")),
    ],
)
def test_hostile_unit_scores(report: Path, tmp_path: Path, change: dict[str, Any], names: Any) -> None:
    folder = copied(report, tmp_path / "report")
    edited(folder / "importance.safetensors", **change)
    with pytest.raises(ValueError, match=naming(names)):
        Importance.load(folder)


def test_hostile_masks(report: Path, tmp_path: Path) -> None:
    folder, name = copied(report, tmp_path / "report"), "model.layers.0.mlp.up_proj"
    edited(folder / "masks.safetensors", **{name.replace(".", "__"): torch.zeros(1024, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=naming(name, "mask")):
        Importance.load(folder).mask(0, "mlp.up_proj")
    edited(folder / "masks.safetensors", **{name.replace(".", "__"): torch.zeros(1023, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=naming(1023, name)):
        Importance.load(folder)
    (folder / "masks.safetensors").unlink()
    with pytest.raises(ValueError, match=naming("masks.safetensors")):
        Importance.load(folder)


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"format_version": 2}', "\udcff"])
def test_no_json_of_ours(report: Path, tmp_path: Path, content: str) -> None:
    folder = copied(report, tmp_path / "report")
    (folder / "importance.json").write_text(content, "utf-8", "surrogateescape")
    with pytest.raises(ValueError, match=naming(folder)):
        Importance.load(folder)
    (folder / "importance.json").unlink()
    with pytest.raises(FileNotFoundError, match=naming(folder, "importance.json")):
        Importance.load(folder)


def test_a_report_with_another_shape(report: Path, model: Path, tmp_path: Path) -> None:
    folder = copied(report, tmp_path / "report")
    content = json.loads((folder / "importance.json").read_text())
    content["shape"]["vocab_size"] += 1
    (folder / "importance.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=naming("importance report", "fingerprint", model)):
        Importance.load(folder).check_model(*open_decoder(str(model)))


def test_a_report_of_another_model(report: Path, model: Path, tmp_path: Path) -> None:
    found = Importance.load(report)
    found.check_model(*open_decoder(str(model)))
    trained = save_model(fine_tune(make_model(tiny_config("llama")), seed=9), tmp_path / "trained")
    wider = save_model(make_model(tiny_config("llama", intermediate_size=136)), tmp_path / "wider")
    for other in (trained, wider):
        with pytest.raises(ValueError, match=naming("importance report", "fingerprint", other)):
            found.check_model(*open_decoder(str(other)))
    found.channels["igia"][1][3] = math.nan
    with pytest.raises(ValueError, match=naming("score", "finite")):
        found.check_model(*open_decoder(str(model)))
