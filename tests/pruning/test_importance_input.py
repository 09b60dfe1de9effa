"""Importance: settings, texts, models and folders that will not do, each with one error and nothing left behind."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import naming
from support.tiny_models import edit_tensors, make_model, save_model, tiny_config

from impart_hf.common.files import OutputError
from impart_hf.modeling.model_files import CheckpointError
from impart_hf.pruning.gradient_sums import MatrixSums
from impart_hf.pruning.importance import compute_importance

pytest.importorskip("peft")
pytest.importorskip("accelerate")

TEXTS = [f"{n} is the number, {n * n} is its square, and {n} texts come before this one. " * 2 for n in range(60)]
SETTINGS: dict[str, Any] = {"steps": 7, "batch_size": 2, "length": 24, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return save_model(make_model(tiny_config("llama")), tmp_path_factory.mktemp("model") / "tiny")


BAD = [
    ({"steps": 1}, ("steps", 2, 1)),
    ({"batch_size": 1.5}, "batch_size"),
    ({"length": 1}, "length"),
    ({"rank": True}, "rank"),
    ({"alpha": 0}, "alpha"),
    ({"learning_rate": math.nan}, "learning_rate"),
    ({"seed": -1}, "seed"),
    ({"seed": 1 << 32}, "seed"),
    ({"top_percent": 0}, "top_percent"),
    ({"top_percent": 100.5}, "top_percent"),
    ({"device": "cuda:99"}, ("device", "'cuda:99'")),
    ({"device": "nothing"}, ("device", "'nothing'")),
    ({"training": {"learning_speed": 1}}, "'learning_speed'"),
    ({"training": {"max_grad_norm": 1.0}}, "'max_grad_norm'"),
    ({"training": {"fsdp": "full_shard"}}, "'fsdp'"),
    ({"training": {"output_dir": "there"}}, "'output_dir'"),
    ({"training": {"optim": "nothing"}}, "nothing"),
    ({"training": {"per_device_train_batch_size": 0}}, "per_device_train_batch_size"),
    ({"training": {"learning_rate": "fast"}}, "learning_rate"),
    ({"training": "fast"}, "training"),
]


@pytest.mark.parametrize(("changes", "names"), BAD)
def test_bad_settings(model: Path, tmp_path: Path, changes: dict[str, Any], names: Any) -> None:
    with pytest.raises(ValueError, match=naming(names)):
        compute_importance(str(model), tmp_path / "out", TEXTS, **{**SETTINGS, **changes})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "error", "names"),
    [
        ([], ValueError, ("list", "no text")),
        (["", " \n"], ValueError, ("list", "no text")),
        (["short"], ValueError, ("text", "tokens", SETTINGS["length"])),
        ("nowhere.txt", FileNotFoundError, "'nowhere.txt'"),
        ([5], ValueError, ("entry 0", "list", 5)),
    ],
)
def test_data_without_text(model: Path, tmp_path: Path, data: Any, error: type[Exception], names: Any) -> None:
    with pytest.raises(error, match=naming(names)):
        compute_importance(str(model), tmp_path / "out", data, **SETTINGS)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["gemma", "gpt-neox", "mixtral"])
def test_models_of_other_families(kind: str, tmp_path: Path) -> None:
    folder = save_model(make_model(tiny_config(kind)), tmp_path / "model")
    with pytest.raises(ValueError, match=naming(folder, f"'{kind.replace('-', '_')}'")):
        compute_importance(str(folder), tmp_path / "out", TEXTS, **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_model_without_tokenizer(model: Path, tmp_path: Path) -> None:
    make_model(tiny_config("llama")).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=naming("tokenizer", tmp_path / "model")):
        compute_importance(str(tmp_path / "model"), tmp_path / "out", TEXTS, **SETTINGS)
    with pytest.raises(CheckpointError, match=naming(tmp_path / "nowhere")):
        compute_importance(str(tmp_path / "nowhere"), tmp_path / "out", TEXTS, **SETTINGS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    folder = save_model(make_model(tiny_config("llama")), tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(value))
    with pytest.raises(ValueError, match=naming("step 1", "gradient", "finite") + r".*model\.layers\.\d\.\S+"):
        compute_importance(str(folder), tmp_path / "out", TEXTS, **SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_interrupted_run_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added = MatrixSums.add

    def interrupted(self: MatrixSums, a: torch.Tensor, b: torch.Tensor) -> bool:
        if self.steps == 3:
            raise KeyboardInterrupt
        return added(self, a, b)

    monkeypatch.setattr(MatrixSums, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compute_importance(str(model), tmp_path / "out", TEXTS, **SETTINGS)
    assert not any(tmp_path.iterdir())


def test_an_output_folder_that_is_not_free(model: Path, tmp_path: Path) -> None:
    (tmp_path / "importance.json").write_text("mine")
    with pytest.raises(OutputError, match=naming(tmp_path)):
        compute_importance(str(model), tmp_path, TEXTS, **SETTINGS)
    assert (tmp_path / "importance.json").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_without_peft(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=naming("PEFT", "impart-hf[pruning]")):
        compute_importance(str(model), tmp_path / "out", TEXTS, **SETTINGS)
