"""What tensors of a checkpoint become, against the model that transformers loads from the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.disguises import DISGUISES, SAVED
from support.loaded_models import load
from support.tiny_models import edit_tensors, load_tensors, make_model, save_model, tiny_config
from transformers import PreTrainedConfig

from impart_hf.common.checkpoint_layout import CheckpointLayout, known_layout
from impart_hf.modeling.checkpoints import Checkpoint, HubOptions

KINDS = ["llama-tied", "gpt2", "bloom", "biogpt", "gpt-neox", "mixtral", "qwen2-moe", "gpt-oss", "gemma3-vision"]


def layout_of(folder: Path, config: PreTrainedConfig) -> CheckpointLayout:
    layout = known_layout(Checkpoint(str(folder), HubOptions()), config)
    assert layout is not None
    return layout


@pytest.mark.parametrize("disguise", ["as saved", "without prefix", "as in memory", "buffers"])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_that_transformers_loads(tmp_path: Path, kind: str, disguise: str) -> None:
    config = tiny_config(kind)
    folder = save_model(make_model(config), tmp_path / "model", **SAVED.get(disguise, {}))
    before = load_tensors(folder).keys()
    DISGUISES[disguise](folder)
    loaded, stored, layout = load(folder).state_dict(), load_tensors(folder), layout_of(folder, config)
    made: dict[str, torch.Tensor] = {}
    for group in layout.groups.values():
        tensors = {member.name: stored[member.name] for member in group.members}
        parameters = group.to_parameters(tensors)
        assert {n: p.shape for n, p in parameters.items()} == {n: p.shape for n, p in group.parameters.items()}
        assert all(set(layout.parameters(name)) == parameters.keys() for name in tensors)
        back = group.to_tensors(parameters)
        assert back.keys() == tensors.keys() and all(torch.equal(back[n], tensors[n]) for n in tensors)
        made.update(parameters)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in made.items())
    assert loaded.keys() - made.keys() <= layout.tied.keys()
    unread = {name for name in stored if not layout.parameters(name)}
    assert unread == (stored.keys() - before if disguise == "buffers" else set())


def test_one_place_for_one_tensor(tmp_path: Path) -> None:
    """Mixtral's experts under transformers' names of version 5, one by one."""
    config = tiny_config("mixtral")
    new, old = (save_model(make_model(config), tmp_path / name) for name in ("new", "old"))

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("block_sparse_moe", "mlp")] = tensors.pop(name)

    edit_tensors(new, rename)
    places = [
        {place: name for g in layout_of(f, config).groups.values() for name, place in g.places().items()}
        for f in (old, new)
    ]
    assert places[0].keys() == places[1].keys()
    assert all(name.replace("block_sparse_moe", "mlp") == places[1][place] for place, name in places[0].items())


def test_of_two_tensors_for_one_parameter_the_first(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    folder = save_model(make_model(config), tmp_path / "model")
    edit_tensors(folder, lambda t: t.update({"wte.weight": t["transformer.wte.weight"] + 1}))
    loaded, layout = load(folder).transformer.wte.weight, layout_of(folder, config)
    used = [n for n in ("wte.weight", "transformer.wte.weight") if layout.parameters(n)]
    assert len(used) == 1 and torch.equal(loaded, load_tensors(folder)[used[0]])


def test_experts_that_cannot_be_combined_are_not_read(tmp_path: Path) -> None:
    config = tiny_config("mixtral")
    folder = save_model(make_model(config), tmp_path / "model")
    lost = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    edit_tensors(folder, lambda t: t.pop(lost) is None)
    layout = layout_of(folder, config)
    assert layout.parameters(lost.replace("2.w1", "1.w1")) == ()
    assert layout.parameters(lost.replace("2.w1", "2.w2")) == ("model.layers.1.mlp.experts.down_proj",)


def test_unknown_architecture(tmp_path: Path) -> None:
    folder = save_model(make_model(tiny_config()), tmp_path / "model")
    assert known_layout(Checkpoint(str(folder), HubOptions()), PreTrainedConfig()) is None
