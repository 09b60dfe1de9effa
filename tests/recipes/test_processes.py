"""A run that is killed, resumed with a push to a Hub, and its delta loaded by others."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from support.hub_client import run_client
from support.loopback_hub import LoopbackHub, hub_env
from support.without_impart_hf import WITHOUT_IMPART_HF
from transformers import AutoModelForCausalLM

IDS = torch.arange(5, 45).view(2, 20)
RUN = """
import sys
from impart_hf.cli.main import main

for recipe, output in zip(sys.argv[1::2], sys.argv[2::2]):
    assert main(["prune", "run", recipe, output]) == 0
"""
LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

out, ids = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained("tester/delta", trust_remote_code=True)
with torch.no_grad():
    torch.save(model(torch.tensor(json.loads(ids))).logits, out)
print("1")
"""


@pytest.mark.process
def test_killed_resumed_pushed_and_loaded(recipe: dict, tmp_path: Path) -> None:
    output, path, stages = tmp_path / "out", tmp_path / "recipe.yaml", recipe["stages"]
    command = [sys.executable, "-m", "impart_hf.cli", "prune", "run", str(path), str(output)]
    recovery = stages[4]["recover"]
    path.write_text(yaml.safe_dump({**recipe, "stages": [*stages[:4], {"recover": {**recovery, "steps": 10**6}}]}))
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as killed:
        deadline = time.monotonic() + 300
        while not list(output.glob("stages/.05-recover.*")):
            assert killed.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        killed.kill()
    before = {folder.name: folder.stat().st_ino for folder in output.glob("stages/[0-9]*")}
    assert sorted(before) == ["01-importance", "02-layers", "03-importance", "04-width"]
    push = {"push": {"repo": "tester/delta", "base_repo": "tester/pruned", "private": False}}
    path.write_text(yaml.safe_dump({**recipe, "stages": [*stages, push]}))
    second = tmp_path / "second.yaml"  # begins with a model that the first has pushed
    then = [{"recover": recovery}, {"compress": {"method": "lowrank", "ratio": 3}}, {"push": {"repo": "tester/second"}}]
    second.write_text(yaml.safe_dump({"model": "tester/pruned", "data": recipe["data"], "stages": then}))
    with LoopbackHub(tmp_path / "hub", lfs_threshold=50_000) as hub:
        command = [sys.executable, "-c", RUN, str(path), str(output), str(second), str(tmp_path / "second")]
        done = subprocess.run(command, env=hub_env(hub, tmp_path / "home"), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        urls = [line for line in done.stdout.splitlines() if line.startswith(hub.url)]
        pushed = [url.removeprefix(f"{hub.url}/").split("/commit/") for url in urls]
        assert [name for name, _ in pushed] == ["tester/pruned", "tester/delta", "tester/second"]
        run_client(
            WITHOUT_IMPART_HF + LOAD, hub_env(hub, tmp_path / "stranger"), str(tmp_path / "logits.pt"),
            json.dumps(IDS.tolist()),
        )  # fmt: skip
        repo = hub.repo("tester/delta")
        card = repo.blob_path(repo.files(repo.resolve("main"))["README.md"].sha256).read_text()
    after = {folder.name: folder.stat().st_ino for folder in output.glob("stages/*")}
    assert {name: after[name] for name in before} == before and sorted(after)[-1] == "06-compress"
    assert "base_model: tester/pruned" in card and "stage by stage" in card and "repo: tester/delta" in card
    local = AutoModelForCausalLM.from_pretrained(
        output / "stages/06-compress", base_model=str(output / "stages/04-width")
    )
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), local(IDS).logits)
    state = json.loads((output / "state.json").read_text())["stages"]
    assert state["07-push"]["report"]["urls"] == urls[:2]
    config = json.loads((tmp_path / "second/stages/02-compress/config.json").read_text())
    assert [config["base_model_name_or_path"], config["base_model_revision"]] == pushed[0]
