"""Pruned models on the Hub: their cards, and the real clients against the loopback Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from support.hub_client import run_client
from support.loopback_hub import LoopbackHub, hub_env
from support.messages import naming
from support.pruned_models import FAMILIES, KEPT, KEPT_MHA, dense_config, pruned_and_dense, pruned_config
from support.tiny_models import edit_json, edit_tensors, make_model, save_model, tiny_config
from support.without_impart_hf import WITHOUT_IMPART_HF

from impart_hf import PrunedLlamaForCausalLM
from impart_hf.hub import push
from impart_hf.modeling.pruned_card import pruned_model_card
from impart_hf.pruning.decoder_shape import DecoderShape
from impart_hf.repository.reader_files import pruned_reader_files

HISTORY = {
    "base_model": "tester/base",
    "base_parameters": 200_000,
    "steps": [
        {
            "kind": "layers",
            "removed": [5, 6],
            "merged_into": {"5": 4, "6": 4},
            "score": "igia",
            "top_percent": 20.0,
        },
        {
            "kind": "width",
            "ratio": 0.25,
            "score": "gradient_norm",
            "removed_parameters": 36_608,
            "heads_removed": [2, 7, 4, 0],
            "key_value_heads_removed": [1, 3, 0, 0],
            "channels_removed": [32, 57, 11, 0],
            "corrected": True,
        },
        {"kind": "recovery", "method": "lora", "steps": 1200, "learning_rate": 0.0001, "data": "train.txt"},
    ],
}
READER = {path.name for path in pruned_reader_files()}


# The card ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [KEPT, KEPT_MHA], ids=["grouped", "multi-head"])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"vocab_size": 333}]
)
def test_parameters_are_counted_from_the_configuration(kept: tuple, changes: dict[str, Any]) -> None:
    for model in (PrunedLlamaForCausalLM(pruned_config(kept, **changes)), make_model(dense_config(kept, **changes))):
        count = model.num_parameters()
        assert DecoderShape.of(model.config.to_dict()).parameters == count
        card = pruned_model_card({**model.config.to_dict(), "pruning": HISTORY}, "tester/pruned", count)
        assert re.search(naming(f"{count:,}", "200,000", f"{1 - count / 200_000:.1%}"), card)


@pytest.mark.parametrize("family", list(FAMILIES)[1:])
def test_parameters_and_card_of_every_family(family: str) -> None:
    for model in (make_model(pruned_config(family=family)), make_model(dense_config(family=family))):
        count = model.num_parameters()
        assert DecoderShape.of(model.config.to_dict()).parameters == count
        card = pruned_model_card({**model.config.to_dict(), "pruning": HISTORY}, "tester/pruned", count)
        pruned = model.config.model_type.startswith("pruned_")
        assert ("| 1 | 1 | 1 | 7 |" in card) == ("trust_remote_code=True" in card) == pruned


def test_card_of_a_width_pruned_model() -> None:
    config = {**pruned_config().to_dict(), "pruning": HISTORY}
    card = pruned_model_card(
        config, "tester/pruned", 5000, {"license": "mit", "tags": ["mine", "pruned"], "language": "en"}
    )
    data = ModelCard(card).data
    assert (data.base_model, data.base_model_relation) == ("tester/base", "finetune")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert (data.license, data.language, data.tags) == ("mit", "en", ["pruned", "impart-hf", "mine"])
    assert 'from_pretrained("tester/pruned", trust_remote_code=True)' in card
    for row in ("before | 8 | 4 | 64", "0 | 6 | 3 | 32", "1 | 1 | 1 | 7", "2 | 4 | 4 | 53"):
        assert f"| {row} |\n" in card
    assert "| 3 |" not in card.replace("| 6 | 3 |", ""), "the last layer is as it was"
    steps = re.findall(r"^\d\. .*$", card, re.MULTILINE)
    for step, names in zip(
        steps,
        (
            ("1.", "layers 5, 6", "igia", "5 into 4", "6 into 4"),
            ("2.", "heads", "channels", "gradient_norm", "36,608", 0.25),
            ("3.", "LoRA", "1,200", 0.0001, "train.txt"),
        ),
        strict=True,
    ):
        assert re.search(naming(names), step)


def test_card_of_a_model_that_lost_layers() -> None:
    history = {**HISTORY, "base_model": "llama-folder", "steps": HISTORY["steps"][:1]}  # type: ignore[index]
    card = pruned_model_card({**tiny_config().to_dict(), "pruning": history}, "some folder", 5000)
    assert "trust_remote_code" not in card and "## Layers" not in card and "2. " not in card
    assert 'from_pretrained("REPO_ID")' in card and "# some folder\n" in card and "`llama-folder`" in card
    assert ModelCard(card).data.base_model is None


@pytest.mark.parametrize(
    "history",
    [
        None, [], "layers", {}, {"steps": None}, {"steps": {"kind": "layers"}}, {"base_model": ["a/b"], "steps": [1]},
        {"base_model": "../b", "base_parameters": "many", "steps": [{"kind": ["layers"]}, {"kind": "other"}]},
        {"base_model": "a/b/c", "base_parameters": -5, "steps": []}, {"base_model": "/home/x", "base_parameters": True},
    ],
)  # fmt: skip
def test_card_without_a_readable_history(history: Any) -> None:
    config = {**pruned_config().to_dict(), "pruning": history}
    card = pruned_model_card(config, "tester/pruned", 5000)
    assert not re.search(r"^\d\. ", card, re.MULTILINE) and "200,000" not in card
    assert "| 1 | 1 | 1 | 7 |" in card and ModelCard(card).data.base_model is None


def test_card_of_a_hostile_history() -> None:
    text = "x\n---\n# `Owned` <script>{{ 7 * 7 }}</script>" + "y" * 10_000
    steps = [
        {"kind": "layers", "removed": text, "merged_into": [text], "score": [text]},
        {"kind": "layers", "removed": [text, None, {}], "merged_into": {text: text}, "score": text},
        {"kind": "width", "ratio": {}, "removed_parameters": "1", "corrected": "yes"},
        {"kind": "recovery", "method": 3, "steps": None, "learning_rate": text, "data": text},
    ]
    config = {**pruned_config().to_dict(), "pruning": {"base_model": text, "base_parameters": 10**30, "steps": steps}}
    card = pruned_model_card(config, "tester/pruned", 5000)
    assert len(card) < 5000 and "<script" not in card and "\n# `Owned`" not in card and "\n---\n# 'Owned" not in card
    assert "{{ 7 * 7 }}" in card and [f"\n{n}. " in card for n in range(1, 6)] == [True] * 4 + [False]
    steps = re.findall(r"^\d\. .*$", card, re.MULTILINE)
    assert re.search(naming("ratio", "unknown"), steps[2]) and steps[3].count("unknown") > 1


def test_card_of_something_else() -> None:
    with pytest.raises(ValueError, match="num_attention_heads"):
        pruned_model_card({**tiny_config().to_dict(), "num_attention_heads": "4"}, "tester/pruned", 5000)


# Pushing and loading -------------------------------------------------------------------------------------------------

PUBLISH = """
import json, sys
import impart_hf
from huggingface_hub import HfApi
from impart_hf.hub import push
from transformers import AutoModelForCausalLM

pruned, layers, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(pruned)
HfApi().create_repo("tester/known")
readme = b"---\\nlicense: mit\\ntags: [old]\\nlanguage: [en]\\n---\\n# By hand\\n"
HfApi().upload_file(repo_id="tester/known", path_in_repo="README.md", path_or_fileobj=readme)
urls = [str(model.push_to_hub("tester/known", tags=["mine"], commit_message="First"))]
model.push_to_hub("tester/new", private=True, max_shard_size="60KB", revision="dev")
model.save_pretrained(out + "/saved", push_to_hub=True, repo_id="tester/saved")
model.push_to_hub("tester/folder", max_shard_size="60KB")  # whose shards the next push is to replace
urls += [str(push(pruned, "tester/folder")), str(push(layers, "tester/layers", commit_message="Fewer layers"))]
print(json.dumps(urls))
"""

LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

out, ids = sys.argv[1:]
ids = torch.tensor(json.loads(ids))
for name, arguments in (("known", {}), ("new", {"revision": "dev"}), ("saved", {}), ("folder", {})):
    model = AutoModelForCausalLM.from_pretrained(f"tester/{name}", trust_remote_code=True, **arguments)
    with torch.no_grad():
        torch.save(model(ids).logits, f"{out}/{name}.pt")
model.push_to_hub("tester/from-remote-code")
AutoTokenizer.from_pretrained("tester/folder", trust_remote_code=True)
torch.save(AutoModelForCausalLM.from_pretrained("tester/layers").state_dict(), f"{out}/layers.pt")
assert not any(name.split(".")[0] == "impart_hf" for name in sys.modules)
print(json.dumps(type(model).__name__))
"""

IDS = torch.arange(5, 25).view(2, 10)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A Hub with pruned models, pushed by a process with impart_hf and loaded and pushed by one without."""
    root = tmp_path_factory.mktemp("world")
    pruned, _ = pruned_and_dense()
    pruned.config.pruning = HISTORY
    save_model(pruned, root / "pruned")
    (root / "pruned" / "README.md").write_text(pruned_model_card(pruned.config.to_dict(), "pruned", 5000))
    layers = make_model(tiny_config(pruning={**HISTORY, "steps": HISTORY["steps"][:1]}))  # type: ignore[index]
    save_model(layers, root / "layers")
    (root / "out").mkdir()
    with LoopbackHub(root / "hub_root", lfs_threshold=50_000) as hub:
        folders = [str(root / name) for name in ("pruned", "layers", "out")]
        urls = run_client(PUBLISH, hub_env(hub, root / "publisher"), *folders)
        ids = json.dumps(IDS.tolist())
        name = run_client(WITHOUT_IMPART_HF + LOAD, hub_env(hub, root / "stranger"), str(root / "out"), ids)
        yield SimpleNamespace(hub=hub, root=root, urls=urls, name=name, pruned=pruned, layers=layers)


def hub_folder(world: SimpleNamespace, repo: str, target: Path, revision: str = "main") -> Path:
    """A repository's files on the Hub, as a folder."""
    stored = world.hub.repo(repo)
    target.mkdir()
    for name, entry in stored.files(stored.resolve(revision)).items():
        (target / name).write_bytes(stored.blob_path(entry.sha256).read_bytes())
    return target


@pytest.mark.process
@pytest.mark.xdist_group("pruned hub")
def test_loads_without_impart_hf(world: SimpleNamespace) -> None:
    with torch.no_grad():
        expected = world.pruned(IDS).logits
    assert world.name == "PrunedLlamaForCausalLM"
    for name in ("known", "new", "saved", "folder"):
        assert torch.equal(torch.load(world.root / "out" / f"{name}.pt"), expected), name
    state = torch.load(world.root / "out" / "layers.pt")
    assert all(torch.equal(state[name], tensor) for name, tensor in world.layers.state_dict().items())


@pytest.mark.process
@pytest.mark.xdist_group("pruned hub")
def test_what_is_pushed(world: SimpleNamespace, tmp_path: Path) -> None:
    for repo, revision in (("known", "main"), ("new", "dev"), ("saved", "main"), ("from-remote-code", "main")):
        folder = hub_folder(world, f"tester/{repo}", tmp_path / repo, revision)
        assert {p.name for p in folder.iterdir()} >= {"config.json", "README.md", *READER}, repo
        for path in pruned_reader_files():
            assert (folder / path.name).read_bytes() == path.read_bytes(), repo
        assert json.loads((folder / "config.json").read_text())["pruning"] == HISTORY
        card = (folder / "README.md").read_text()
        assert f'from_pretrained("tester/{repo}", trust_remote_code=True)' in card and "1,200 steps" in card
        assert ModelCard(card).data.base_model == "tester/base", repo
    known = ModelCard((tmp_path / "known" / "README.md").read_text()).data
    assert (known.license, known.language, known.tags) == ("mit", ["en"], ["pruned", "impart-hf", "old", "mine"])
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1 and world.hub.repo("tester/new").state["private"]
    pushed = hub_folder(world, "tester/folder", tmp_path / "folder")
    assert [path.name for path in pushed.glob("*.safetensors*")] == ["model.safetensors"]
    for path in (world.root / "pruned").iterdir():
        expected = path.read_bytes()
        if path.name == "README.md":
            expected = expected.replace(b"REPO_ID", b"tester/folder")
        assert (pushed / path.name).read_bytes() == expected, path.name
    assert all(f"/tester/{name}/" in url for name, url in zip(("known", "folder", "layers"), world.urls, strict=True))


def spoil_tensor(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor

    edit_tensors(folder, edit)


SPOILED: dict[str, Any] = {
    "a lost tensor": (lambda f: spoil_tensor(f, "model.layers.1.mlp.up_proj.weight", None), "layers.1.mlp.up_proj"),
    "another width": (
        lambda f: spoil_tensor(f, "model.layers.1.mlp.up_proj.weight", torch.zeros(8, 64)), "layers.1.mlp.up_proj"
    ),
    "cut off": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 100), "model.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "damaged config.json": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "bad widths": (
        lambda f: edit_json(f / "config.json", per_layer_config={"9": {"intermediate_size": 7}}), "layers 0 to 3"
    ),
    "no auto_map": (lambda f: edit_json(f / "config.json", auto_map=None), "auto_map"),
    "no reader": (lambda f: (f / "modeling_pruned.py").unlink(), "modeling_pruned.py"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_push_refuses_what_nobody_could_load(case: str, tmp_path: Path) -> None:
    pruned, _ = pruned_and_dense()
    pruned.save_pretrained(tmp_path / "pruned")
    spoil, words = SPOILED[case]
    spoil(tmp_path / "pruned")
    with pytest.raises((ValueError, OSError)) as caught:  # a Hub that is asked would be another error: it is offline
        push(tmp_path / "pruned", "tester/none")
    assert words in str(caught.value) and "Hub" not in str(caught.value)


def test_push_refuses_other_models(tmp_path: Path) -> None:
    save_model(make_model(tiny_config()), tmp_path / "llama")
    for folder in ("llama", "missing"):
        with pytest.raises(OSError, match=naming(tmp_path / folder)):
            push(tmp_path / folder, "tester/none")
