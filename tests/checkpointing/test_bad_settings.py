"""What is refused before the first step."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from support.checkpoint_runs import load_start, make_trainer
from support.messages import naming
from support.tiny_models import Pair

from impart_hf import DeltaCheckpointCallback
from impart_hf.modeling.model_files import CheckpointError


def refused(model: Any, callback: DeltaCheckpointCallback, output: Path, **settings: Any) -> str:
    """The error of a training that ends before its first step."""
    trainer = make_trainer(model, output, [callback], **settings)
    with pytest.raises((ValueError, CheckpointError)) as caught:
        trainer.train()
    assert trainer.state.global_step == 0 and not list(output.glob("checkpoint-*"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"of": "end"}, ("of", "end")),
        ({"anchor_every": 3}, ("anchor_every", "start")),
        ({"of": "last", "anchor_every": 0}, ("anchor_every", 0)),
        ({"of": "last", "anchor_every": 32}, ("anchor_every", 31, 32)),
        ({"keep": 0}, ("keep", 0)),
        ({"of": "last", "push_to": "me/deltas"}, ("push_to", "start")),
        ({"of": "last", "base_name": "me/base"}, ("base_name", "start")),
        ({"private": True}, ("private", "push_to")),
    ],
)
def test_settings_that_are_invalid_or_have_no_effect(settings: dict[str, Any], named: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=naming(*named)):
        DeltaCheckpointCallback(**settings)


@pytest.mark.parametrize(
    ("callback", "settings", "named"),
    [
        ({"of": "last"}, {"save_total_limit": 2}, ("save_total_limit", "keep")),
        ({}, {"save_on_each_node": True}, ("save_on_each_node",)),
        ({"push_to": "me/deltas"}, {}, ("push_to", "base_name")),
        ({"base": "/no/such/folder"}, {}, ("/no/such/folder",)),
        ({"base": ""}, {}, ("base",)),
    ],
)
def test_a_training_that_leaves_no_room_for_deltas(
    callback: dict[str, Any], settings: dict[str, Any], named: tuple[str, ...], tiny_pair: Pair, tmp_path: Path
) -> None:
    error = refused(load_start(tiny_pair.base), DeltaCheckpointCallback(**callback), tmp_path, **settings)
    assert re.search(naming(*named), error), error


def test_the_trainer_s_uploads_of_checkpoints(tiny_pair: Pair, tmp_path: Path) -> None:
    """A Trainer that uploads needs the Hub, which is why its settings alone are given."""
    model, callback = load_start(tiny_pair.base), DeltaCheckpointCallback()
    trainer = make_trainer(model, tmp_path, [])
    trainer.args.push_to_hub, trainer.args.hub_strategy = True, "checkpoint"
    with pytest.raises(ValueError, match=naming("hub_strategy", "checkpoint", "push_to")):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)


def test_sharded_states_of_fsdp(tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(load_start(tiny_pair.base), tmp_path, [DeltaCheckpointCallback()])
    plugin = SimpleNamespace(state_dict_type=SimpleNamespace(name="SHARDED_STATE_DICT"))
    monkeypatch.setattr(AcceleratorState(), "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ValueError, match=naming("SHARDED_STATE_DICT", "FULL_STATE_DICT")):
        trainer.train()


def test_an_adapter(tiny_pair: Pair, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load_start(tiny_pair.base), peft.LoraConfig(target_modules=["q_proj"]))
    assert "adapter" in refused(model, DeltaCheckpointCallback(str(tiny_pair.base)), tmp_path)


def test_a_module_that_is_no_model(tmp_path: Path) -> None:
    assert "Linear" in refused(torch.nn.Linear(2, 2), DeltaCheckpointCallback("base"), tmp_path)


def test_another_kind_of_base(tiny_pair: Pair, pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    error = refused(load_start(tiny_pair.base), DeltaCheckpointCallback(str(pair_of("qwen2").base)), tmp_path)
    assert "qwen2" in error and "llama" in error


def test_a_base_in_the_output_folder(tiny_pair: Pair, tmp_path: Path) -> None:
    """The Trainer may remove it, or save the trained model over it."""
    base = shutil.copytree(tiny_pair.base, tmp_path / "base")
    assert str(base) in refused(load_start(base), DeltaCheckpointCallback(), tmp_path)
    assert str(base) in refused(load_start(base), DeltaCheckpointCallback(), base)


def test_a_save_without_dense_weights(tiny_pair: Pair, tmp_path: Path) -> None:
    """As DeepSpeed's ZeRO-3 leaves it if it is not told to gather."""
    model = load_start(tiny_pair.base)
    trainer = make_trainer(model, tmp_path, [callback := DeltaCheckpointCallback()], max_steps=2)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    (tmp_path / "checkpoint-0").mkdir()
    with pytest.raises(CheckpointError, match=naming("checkpoint-0", "stage3_gather_16bit_weights_on_model_save")):
        callback.on_save(trainer.args, trainer.state, trainer.control)
