"""Adapters and merges by Hub id: the real clients, in a process of their own, against the loopback Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.adapters import lora, merged, save_adapter
from support.hub_client import run_client
from support.loopback_hub import LoopbackHub, hub_env
from support.tiny_models import load_tensors, make_model, save_model, tiny_config

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("hub")]

PUSH = """
import json, sys
from huggingface_hub import HfApi

api = HfApi()  # without cards: in PEFT's, the base is a local folder, which the Hub refuses
for name in ("base", "adapter"):
    api.create_repo(f"tester/{name}")
    api.upload_folder(repo_id=f"tester/{name}", folder_path=f"{sys.argv[1]}/{name}", ignore_patterns="README.md")
print(json.dumps(None))
"""

USE = """
import json, sys
from impart_hf import LowRankConfig, compress, merge

out = sys.argv[1]
compress("tester/base", "tester/adapter", f"{out}/delta", LowRankConfig(compression_ratio=2))
for name, model in (("alone", "tester/adapter"), ("named", "tester/base@main+tester/adapter@main")):
    content = {"merge_method": "task_arithmetic", "base_model": "tester/base", "models": [model]}
    merge(content, f"{out}/{name}")
print(json.dumps(json.load(open(f"{out}/delta/config.json"))["base_model_name_or_path"]))
"""


def test_adapters_by_id_online_and_offline(tmp_path: Path) -> None:
    base = save_model(make_model(tiny_config("llama")), tmp_path / "base")
    wanted = load_tensors(merged(base, save_adapter(base, lora(), tmp_path / "adapter"), tmp_path / "merged"))
    with LoopbackHub(tmp_path / "hub") as hub:
        env = hub_env(hub, tmp_path / "client")
        run_client(PUSH, env, str(tmp_path))
        for place, more in (("online", {}), ("offline", {"HF_HUB_OFFLINE": "1"})):
            assert run_client(USE, env | more, str(tmp_path / place)) == "tester/base"
            for name in ("alone", "named"):
                found = load_tensors(tmp_path / place / name)
                assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
