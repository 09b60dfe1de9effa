"""Chains on the Hub: a training run in one repository, each commit a delta of the one before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.chains import checkpoints
from support.hub_client import run_client
from support.loopback_hub import LoopbackHub, hub_env
from support.tiny_models import load_tensors
from support.without_impart_hf import WITHOUT_IMPART_HF

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("hub clients")]

PUBLISH = """
import json, sys
from huggingface_hub import HfApi
from impart_hf import ExactConfig, compress, hub

out, base, *steps = sys.argv[1:]
api = HfApi()
api.create_repo("tester/base")
commits = [api.upload_folder(repo_id="tester/base", folder_path=base).oid]
place = "tester/base"
for number, step in enumerate(steps):
    folder = f"{out}/{number}"
    compress(place, step, folder, ExactConfig())
    hub.push(folder, "tester/run")
    place = "tester/run"
    commits.append(api.model_info(place).sha)
api.upload_file(repo_id="tester/base", path_or_fileobj=b"later", path_in_repo="notes.txt")
hub.push(f"{out}/0", "tester/run", commit_message="begin again")
print(json.dumps(commits))
"""

LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

last, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained("tester/run", revision=last, trust_remote_code=True)
torch.save(model.state_dict(), out + "/state.pt")
AutoModelForCausalLM.from_pretrained("tester/run", revision=last, trust_remote_code=True, local_files_only=True)
print(json.dumps(None))
"""

REWRITE = """
import json, sys
from huggingface_hub import HfApi
from impart_hf import flatten
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.inspection import Inspection

last, out = sys.argv[1:]
flatten("tester/run", out + "/flat", revision=last)
HfApi().delete_repo("tester/base")
try:
    flatten("tester/run", out + "/again", revision=last, cache_dir=out + "/cache")
except OSError as error:
    print(json.dumps({"chain": Inspection("tester/run", HubOptions(last)).to_dict()["chain"], "error": str(error)}))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A Hub with a base and a run of three checkpoints, after both have moved on."""
    root = tmp_path_factory.mktemp("world")
    models = checkpoints(root, 3)
    with LoopbackHub(root / "hub_root", lfs_threshold=50_000) as hub:
        commits = run_client(PUBLISH, hub_env(hub, root / "publisher"), str(root / "out"), *map(str, models))
        yield SimpleNamespace(hub=hub, root=root, models=models, commits=commits)


def test_a_run_in_one_repository(world: SimpleNamespace, tmp_path: Path) -> None:
    """Every link is read at the commit that was recorded, by a client without impart-hf."""
    base, *run = world.commits
    for number, name in enumerate(("tester/base", "tester/run", "tester/run")):
        config = json.loads((world.root / "out" / str(number) / "config.json").read_text())
        assert (config["base_model_name_or_path"], config["base_model_revision"]) == (name, world.commits[number])
        card = (world.root / "out" / str(number) / "README.md").read_text().splitlines()
        assert f"base_model: {name}" in card
    before = len(world.hub.requests)
    run_client(WITHOUT_IMPART_HF + LOAD, hub_env(world.hub, tmp_path), run[-1], str(tmp_path))
    state, expected = torch.load(tmp_path / "state.pt"), load_tensors(world.models[-1])
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    paths = [path for _, path in world.hub.requests[before:] if "/resolve/" in path and path.endswith(".safetensors")]
    assert {tuple(path.split("/")[2:5:2]) for path in paths} == {("base", base), *(("run", commit) for commit in run)}


def test_flat_and_without_its_base(world: SimpleNamespace, tmp_path: Path) -> None:
    base, *run = world.commits
    said = run_client(REWRITE, hub_env(world.hub, tmp_path), run[-1], str(tmp_path))
    config = json.loads((tmp_path / "flat" / "config.json").read_text())
    assert (config["base_model_name_or_path"], config["base_model_revision"]) == ("tester/base", base)
    assert "base_is_delta" not in config
    places = [("tester/run", run[1]), ("tester/run", run[0]), ("tester/base", base)]
    assert said["chain"] == [{"model": name, "revision": commit} for name, commit in places]
    assert "'tester/base'" in said["error"] and base in said["error"] and "tester/run" in said["error"]
