"""Deltas beside a base, all of them on the Hub: loaded by id and commit, saved and pushed byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.hub_client import run_client
from support.loopback_hub import LoopbackHub, hub_env
from support.tiny_models import Pair

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("hub")]

PUBLISH = """
import json, sys
from huggingface_hub import HfApi
from impart_hf import LowRankConfig, compress
from impart_hf.hub import push

base, finetuned, out = sys.argv[1:]
api = HfApi()
for repo, folder in (("tester/base", base), ("tester/finetuned", finetuned)):
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)
commits = []
for ratio in (3, 6):
    compress("tester/base", "tester/finetuned", f"{out}/{ratio}", LowRankConfig(compression_ratio=ratio))
    push(f"{out}/{ratio}", "tester/delta")
    commits.append(api.model_info("tester/delta").sha)
print(json.dumps(commits))
"""
LOAD = """
import json, sys
import torch
from pathlib import Path
from huggingface_hub import snapshot_download
from impart_hf import load_delta
from transformers import AutoModelForCausalLM

first, out = sys.argv[1:]
model = load_delta(AutoModelForCausalLM.from_pretrained("tester/base"), "tester/delta", "second")
model.load_adapter("tester/delta", "first", revision=first)
ids = torch.arange(5, 25)[None]
differences = []
for name, revision in (("first", first), ("second", None)):
    model.set_adapter(name)
    merged = AutoModelForCausalLM.from_pretrained("tester/delta", revision=revision)
    found, expected = model(ids).logits.float(), merged(ids).logits.float()
    differences.append(float((found - expected).norm() / expected.norm()))
model.save_pretrained(out)
same = []
for name, revision in (("first", first), ("second", "main")):
    snapshot = Path(snapshot_download("tester/delta", revision=revision))
    files = [path.name for path in snapshot.iterdir() if path.is_file() and not path.name.startswith(".")]
    same.append(all((snapshot / n).read_bytes() == Path(out, name, n).read_bytes() for n in files) and len(files) > 3)
url = model.push_to_hub("tester/again", "first", commit_message="Again")
print(json.dumps({"differences": differences, "same": same, "url": str(url)}))
"""


def test_by_id_and_commit(tiny_pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with LoopbackHub(tmp_path / "hub_root", lfs_threshold=50_000) as hub:
        folders = [str(tiny_pair.base), str(tiny_pair.finetuned), str(tmp_path / "out")]
        first, _ = run_client(PUBLISH, hub_env(hub, tmp_path / "publisher"), *folders)
        told = run_client(LOAD, hub_env(hub, tmp_path / "loader"), first, str(tmp_path / "saved"))
        assert max(told["differences"]) < 0.02, "of bfloat16 models"
        assert told["same"] == [True, True] and "tester/again" in told["url"]
        again, delta = hub.repo("tester/again"), hub.repo("tester/delta")
        files = {n: e.sha256 for n, e in again.files(again.resolve("main")).items()}
        original = {n: e.sha256 for n, e in delta.files(first).items()}
        assert {n for n in original if files.get(n) != original[n]} <= {"README.md", ".gitattributes"}
