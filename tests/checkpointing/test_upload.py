"""Deltas that are uploaded at every save: a real client, in a process of its own, against the loopback Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.hub_client import run_client
from support.loopback_hub import LoopbackHub, hub_env
from support.tiny_models import Pair

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("hub")]

# A base on the Hub, one that is a local copy of it, and a Hub that fails at the second save.
TRAIN = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch
from huggingface_hub import HfApi
from support.checkpoint_runs import dense, load_start, make_trainer, same_bits
from transformers import AutoModelForCausalLM
import impart_hf
from impart_hf import DeltaCheckpointCallback
from impart_hf.checkpointing import callback as module

base, out = map(Path, sys.argv[1:3])
api = HfApi()
api.create_repo("tester/base", exist_ok=True)
commit = api.upload_folder(repo_id="tester/base", folder_path=base).oid

def train(name, start, callbacks, **settings):
    make_trainer(start, out / name, callbacks, max_steps=4, **settings).train()

def same(repo, step):
    model = AutoModelForCausalLM.from_pretrained(repo, dtype=torch.float32)
    return same_bits(dict(model.state_dict()), dense(out / "plain" / f"checkpoint-{step}"))

train("plain", load_start(base), [])
train("hub", load_start("tester/base"), [DeltaCheckpointCallback(push_to="tester/deltas")])
recorded = json.loads((out / "hub" / "checkpoint-2" / "config.json").read_text())
files = api.list_repo_files("tester/deltas")
result = {
    "pinned": [recorded["base_model_name_or_path"], recorded["base_model_revision"] == commit],
    "titles": [commit.title for commit in api.list_repo_commits("tester/deltas")],
    "same": same("tester/deltas", 4),
    "training files": [name for name in files if name.startswith(("optimizer", "trainer", "model.s", "rng"))],
}
train("local", load_start(base), [DeltaCheckpointCallback(push_to="tester/local", base_name="tester/base")],
      load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
result["local"] = same("tester/local", 4)

upload, pushed = module.push, []
def failing(folder, repo, **more):
    pushed.append(repo)
    if len(pushed) == 1:
        raise ConnectionError("no network")
    return upload(folder, repo, **more)
module.push = failing
train("failing", load_start("tester/base"), [DeltaCheckpointCallback(push_to="tester/failing")])
result["after a failure"] = [same("tester/failing", 4), (out / "failing/checkpoint-2/delta_model.safetensors").exists()]
print(json.dumps(result))
"""


def test_every_save_is_a_commit(tiny_pair: Pair, tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "root") as hub:
        env = hub_env(hub, tmp_path)
        result = run_client(TRAIN, env, str(tiny_pair.base), str(tmp_path), str(Path(__file__).parents[1]))
    assert result["pinned"] == ["tester/base", True]
    assert result["titles"][:2] == ["Step 4", "Step 2"]
    assert result["same"] and result["local"] and result["after a failure"] == [True, True]
    assert result["training files"] == []
