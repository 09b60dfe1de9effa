"""Files of deltas that lie beside their base: saved again, damaged, or of a base that is another or not found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.delta_tenants import Tenants, both, check_rows, load_dense, make_tenants
from support.messages import naming
from support.tiny_models import VOCABULARY, make_model, same_files, save_model, tiny_config
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from impart_hf import load_delta
from impart_hf.modeling.delta_repository import WrongBaseError
from impart_hf.modeling.model_files import CheckpointError


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    return make_tenants(tmp_path_factory.mktemp("tenants"), tiny_config("llama"))


def test_saved_byte_for_byte(tenants: Tenants, tmp_path: Path) -> None:
    model = load_delta(tenants.load_base(), tenants.deltas["one"])
    model.load_adapter(tenants.deltas["two"], "two")
    model.save_pretrained(tmp_path / "saved")
    assert same_files(tmp_path / "saved" / "two", tenants.deltas["two"])
    saved = sorted(path.name for path in (tmp_path / "saved").iterdir() if path.is_file())
    assert saved == sorted(path.name for path in tenants.deltas["one"].iterdir())
    model.save_pretrained(tmp_path / "only", selected_adapters=["two"])
    assert [path.name for path in (tmp_path / "only").iterdir()] == ["two"]
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "only" / "two"), LlamaForCausalLM)
    with pytest.raises(ValueError, match=naming("three")):
        model.save_pretrained(tmp_path / "none", selected_adapters=["three"])
    assert not (tmp_path / "none").exists()


def test_another_base(tenants: Tenants, tmp_path: Path) -> None:
    other = save_model(make_model(tiny_config("llama"), 7, torch.float32), tmp_path / "other")
    with pytest.raises(WrongBaseError):
        load_delta(load_dense(other), tenants.deltas["one"])
    changed = tenants.load_base()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(WrongBaseError, match=naming("model.layers.1.mlp.up_proj.weight")):
        load_delta(changed, tenants.deltas["one"])
    assert not any("forward" in vars(module) for module in changed.modules()), "nothing is left behind"
    longer = tenants.load_base()
    longer.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    with pytest.raises(ValueError):
        load_delta(longer, tenants.deltas["one"])


def test_files_of_the_base_are_found(tenants: Tenants, tmp_path: Path) -> None:
    """Where the model was loaded from, or where the call says; otherwise the error tells what to do."""
    moved = tmp_path / "moved"
    tenants.base.rename(moved)
    try:
        assert load_delta(load_dense(moved), tenants.deltas["one"]).active_adapter == "default"
        base = load_dense(moved)
        base.name_or_path = ""
        with pytest.raises(CheckpointError, match=naming("base_files")):
            load_delta(base, tenants.deltas["one"])
        load_delta(base, tenants.deltas["one"], base_files=str(moved))
    finally:
        moved.rename(tenants.base)


def test_no_base(tenants: Tenants) -> None:
    model = both(tenants)
    for wrong, named in ((model, "load_adapter"), (load_dense(tenants.deltas["one"]), "base"), ("base", "str")):
        with pytest.raises(TypeError, match=naming(named)):
            load_delta(wrong, tenants.deltas["one"])  # type: ignore[arg-type]
    headless = AutoModel.from_pretrained(tenants.base, dtype=torch.float32)
    with pytest.raises(ValueError, match=naming("config.json", "class")):
        load_delta(headless, tenants.deltas["one"])


def test_damaged_delta(tenants: Tenants, tmp_path: Path) -> None:
    broken = shutil.copytree(tenants.deltas["one"], tmp_path / "broken")
    file = broken / "delta_model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(bytes(data))
    model = both(tenants)
    with pytest.raises(ValueError, match=naming("damaged")):
        model.load_adapter(broken, "broken")
    assert model.adapter_names == ["one", "two"]
    check_rows(model, tenants)
