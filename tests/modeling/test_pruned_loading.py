"""Pruned models saved and loaded: by the Auto classes, by remote code, on devices; and what cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pruned_models import IDS, assert_same, greedy, load_pruned, logits, run_without_impart_hf
from support.tiny_models import edit_json, edit_tensors
from transformers import LlamaForCausalLM, PreTrainedModel

from impart_hf import PrunedLlamaForCausalLM
from impart_hf.repository.reader_files import pruned_reader_files

pytestmark = pytest.mark.usefixtures("seeded")
READER = {path.name for path in pruned_reader_files()}


OFFLOAD = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
OFFLOAD |= {"model.layers.3": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}


def test_save_and_load(saved: Path, models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path) -> None:
    pruned, _ = models
    assert {p.name for p in saved.iterdir()} >= READER
    for path in pruned_reader_files():
        assert (saved / path.name).read_bytes() == path.read_bytes()
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["PrunedLlamaForCausalLM"] and set(config["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
    }
    model = load_pruned(saved)
    assert type(model) is PrunedLlamaForCausalLM and isinstance(model, LlamaForCausalLM)
    model.save_pretrained(tmp_path / "again")
    load_pruned(tmp_path / "again").save_pretrained(tmp_path / "again")  # over itself
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder in (tmp_path / "again", tmp_path / "shards"):
        state = load_pruned(folder).state_dict()
        assert state.keys() == pruned.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in pruned.state_dict().items())
    for name in ("config.json", "model.safetensors", *READER):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


REMOTE_CODE = """
import copy, json, pickle
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, pipeline

repo, other, ids = sys.argv[1:]
ids = torch.tensor(json.loads(ids))
try:
    AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=False)
    raise SystemExit("loaded without trust_remote_code")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
assert AutoConfig.from_pretrained(repo, trust_remote_code=True).widths[1] == (1, 1, 7)
backbone = AutoModel.from_pretrained(repo, trust_remote_code=True)
assert type(backbone).__name__ == "PrunedLlamaModel" and not hasattr(backbone, "lm_head")
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
assert isinstance(model, LlamaForCausalLM) and type(model).__name__ == "PrunedLlamaForCausalLM"
with torch.no_grad():
    logits = model(ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, logits)
for _ in range(2):
    model.save_pretrained(other)
    model = AutoModelForCausalLM.from_pretrained(other, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(model(ids).logits, logits)
pipe = pipeline("text-generation", model=repo, trust_remote_code=True)
assert len(pipe("A fine", max_new_tokens=3, do_sample=False)[0]["generated_text"]) > 6
assert not any(name.split(".")[0] == "impart_hf" for name in sys.modules)
torch.save(logits, other + "/logits.pt")
"""


@pytest.mark.process
def test_trust_remote_code_without_impart_hf(saved: Path, models: tuple, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run_without_impart_hf(REMOTE_CODE, tmp_path / "modules", str(saved), str(other), json.dumps(IDS.tolist()))
    assert torch.equal(torch.load(other / "logits.pt"), logits(models[0]))
    for name in ("config.json", "model.safetensors", *READER):
        assert (other / name).read_bytes() == (saved / name).read_bytes()
    again = load_pruned(other, trust_remote_code=True)  # with impart_hf there as well
    assert torch.equal(logits(again), logits(models[0]))


ALL_BY_REMOTE_CODE = """
import json
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

ids = torch.tensor(json.loads(sys.argv[1]))
for repo in sys.argv[2:]:
    assert AutoConfig.from_pretrained(repo, trust_remote_code=True).widths[1] == (1, 1, 7)
    AutoModel.from_pretrained(repo, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
    with torch.no_grad():
        logits = model(ids).logits
    model.save_pretrained(repo + "/again")
    model = AutoModelForCausalLM.from_pretrained(repo + "/again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    torch.save(logits, repo + "/logits.pt")
assert not any(name.split(".")[0] == "impart_hf" for name in sys.modules)
"""


@pytest.mark.process
def test_every_family_by_remote_code(models_by_family: dict, tmp_path: Path) -> None:
    for family, (pruned, _) in models_by_family.items():
        pruned.save_pretrained(tmp_path / family)
    folders = [str(tmp_path / family) for family in models_by_family]
    run_without_impart_hf(ALL_BY_REMOTE_CODE, tmp_path / "modules", json.dumps(IDS.tolist()), *folders)
    for family, (pruned, _) in models_by_family.items():
        assert torch.equal(torch.load(tmp_path / family / "logits.pt"), logits(pruned)), family
        for name in ("config.json", *READER):
            again = (tmp_path / family / "again" / name).read_bytes()
            assert again == (tmp_path / family / name).read_bytes(), (family, name)


def test_device_maps_of_every_family(family_models: tuple, tmp_path: Path) -> None:
    pruned, dense = family_models
    pruned.save_pretrained(tmp_path / "model")
    device_map = {**OFFLOAD, "lm_head": "cpu"}  # as the embeddings, which two families tie it to
    model = load_pruned(tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload"))
    assert_same(logits(model), logits(dense))
    half = load_pruned(tmp_path / "model", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert_same(logits(half).float(), logits(pruned), 0.5)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, OFFLOAD], ids=["cpu", "auto", "all", "disk"])
def test_device_map(device_map: Any, saved: Path, models: tuple, tmp_path: Path) -> None:
    offload = {"offload_folder": str(tmp_path)} if device_map is OFFLOAD else {}
    model = load_pruned(saved, device_map=device_map, **offload)
    assert_same(logits(model), logits(models[1]))
    assert greedy(model) == greedy(models[1])


@pytest.mark.parametrize("name", ["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj"])
def test_weights_of_other_widths(name: str, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(saved, tmp_path / "pruned")
    tensor = f"model.layers.1.{name}.weight"
    edit_tensors(folder, lambda tensors: tensors.update({tensor: torch.zeros(16, 16)}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load_pruned(folder)
    assert tensor in caplog.text and "size mismatch - ckpt: torch.Size([16, 16])" in caplog.text


def test_dense_weights_under_a_pruned_config(models: tuple, tmp_path: Path) -> None:
    models[1].save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **json.loads(models[0].config.to_json_string()))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load_pruned(tmp_path)
