"""vLLM takes repositories by Hub id and revision, with its own token and cache, from the loopback Hub."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.loopback_hub import LoopbackHub, hub_env
from support.messages import naming
from support.tiny_models import make_model, save_model, tiny_config
from support.vllm_engines import HEADS, LONG, PROMPTS, EngineError, EngineProcess, swap_to, tokens_of
from support.vllm_server import Server

from impart_hf import PrunedLlamaConfig

pytestmark = pytest.mark.vllm
PUBLISH = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi
from impart_hf import LowRankConfig, compress
from impart_hf.hub import push

family, pruned, out = map(Path, sys.argv[1:])
api = HfApi()
for repo in ("tester/base", "tester/pruned"):
    api.create_repo(repo)
api.upload_folder(repo_id="tester/base", folder_path=family / "base")
commits = {}
for name in ("one", "two"):
    compress("tester/base", str(family / f"{name}-dense"), out / name, LowRankConfig(compression_ratio=3))
    push(out / name, "tester/delta")
    commits[name] = api.model_info("tester/delta").sha
api.upload_folder(repo_id="tester/pruned", folder_path=pruned)
commits["pruned"] = api.model_info("tester/pruned").sha
for repo in ("tester/base", "tester/pruned"):  # both move on
    api.upload_folder(repo_id=repo, folder_path=family / "three-dense")
print(json.dumps(commits))
"""


@pytest.fixture(scope="module")
def world(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A Hub with a base, two commits of a delta repository, a pruned model; the commits."""
    root = tmp_path_factory.mktemp("world")
    llama = tiny_config("llama", num_attention_heads=4, num_key_value_heads=4, **HEADS)
    widths = {"num_attention_heads": [4, 3], "num_key_value_heads": [2, 3], "intermediate_size": [72, 128]}
    pruned = save_model(
        make_model(PrunedLlamaConfig.with_widths(llama, **widths), dtype=torch.float32), root / "pruned"
    )
    (root / "out").mkdir()
    with LoopbackHub(root / "hub_root", lfs_threshold=50_000) as hub:
        command = [sys.executable, "-c", PUBLISH, str(family), str(pruned), str(root / "out")]
        done = subprocess.run(command, env=hub_env(hub, root / "publisher"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        commits = json.loads(done.stdout.splitlines()[-1])
        hub.set_private("tester/delta")
        yield SimpleNamespace(hub=hub, root=root, commits=commits, pruned=pruned)


def client_env(world: SimpleNamespace, folder: Path, **more: str) -> dict[str, str]:
    return {**hub_env(world.hub, folder, **more), "HF_HUB_OFFLINE": "0"}


def test_serve_and_swap_by_id_and_revision(
    world: SimpleNamespace, family_tokens: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    deltas = f"old=tester/delta@{world.commits['one']}"
    plugin = {"VLLM_PLUGINS": "impart_hf", "IMPART_HF_DELTAS": deltas}
    revision = ("--revision", "main", "--download-dir", str(tmp_path / "cache"))
    with Server("tester/delta", *revision, env={**client_env(world, tmp_path), **plugin}) as server:
        assert [server.tokens(prompt) for prompt in [*PROMPTS, LONG]] == family_tokens["two"]
        status, answer = server.load("old")
        assert (status, answer["revision"]) == (200, world.commits["one"]), answer
        assert [server.tokens(prompt) for prompt in [*PROMPTS, LONG]] == family_tokens["one"]
    assert list((tmp_path / "cache").glob("models--tester--*")), "vLLM's own cache is used"
    assert not list((tmp_path / "hf_home").glob("hub/models--*/snapshots/*/*.safetensors"))


def test_from_python_then_offline(
    world: SimpleNamespace, family_tokens: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    with EngineProcess(**client_env(world, tmp_path)) as engine:
        engine.start("tester/delta", revision=world.commits["one"])
        assert engine.tokens([*PROMPTS, LONG]) == family_tokens["one"]
        assert engine.run(swap_to, "tester/delta", "main")[:2] == ("tester/delta", world.commits["two"])
        assert engine.tokens([*PROMPTS, LONG]) == family_tokens["two"]
        with pytest.raises(EngineError, match=naming("CheckpointError", "tester/delta", "'nowhere'")):
            engine.run(swap_to, "tester/delta", "nowhere")
        with pytest.raises(EngineError, match=naming("CheckpointError", "tester/nothing")):
            engine.run(swap_to, "tester/nothing")
        engine.start("tester/pruned", revision=world.commits["pruned"])
        assert engine.tokens() == tokens_of(world.pruned)
    with EngineProcess(**client_env(world, tmp_path) | {"HF_HUB_OFFLINE": "1"}) as engine:
        engine.start("tester/delta", revision=world.commits["one"])
        assert engine.tokens([*PROMPTS, LONG]) == family_tokens["one"]
