"""The loopback Hub, used by the real huggingface_hub and transformers clients.

Downloads and listings run in this process, since they take the endpoint as an argument. What reads its settings at
import time (pushing large files without Xet, loading by id) runs in a client process, few times and batched.
"""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, close_session, constants, hf_hub_download, snapshot_download
from huggingface_hub import errors as hf_errors
from support.loopback_hub import LoopbackHub, hub_env

pytestmark = pytest.mark.xdist_group("loopback hub")

REPO = "tester/first"
WEIGHTS = bytes(range(256)) * 9000  # More than two of the chunks in which the server reads and writes.

PUSH = """
import json, os, sys
from huggingface_hub import HfApi

folder, repo = sys.argv[1:]
api = HfApi()
shas = [api.create_repo(repo).repo_id and api.model_info(repo).sha]
for text in ("one", "two"):
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump({"text": text}, file)
    shas.append(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=text).oid)
again = api.upload_folder(repo_id=repo, folder_path=folder).oid
api.create_tag(repo, tag="v1", revision=shas[1])
api.create_branch(repo, branch="dev/x", revision=shas[1])
dev = api.upload_file(repo_id=repo, path_or_fileobj=b"dev", path_in_repo="note with space.txt", revision="dev/x").oid
api.delete_folder("sub", repo_id=repo, revision="dev/x")
print(json.dumps({"shas": shas, "again": again, "dev": dev, "user": api.whoami()["name"]}))
"""

TRANSFORMERS = """
import json, sys
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers import LlamaConfig, LlamaForCausalLM

repo, gated, reader = sys.argv[1:]
words = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "hub": 2}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
config = LlamaConfig(vocab_size=3, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(config)
first = model.push_to_hub(repo, private=True).oid
old = model.lm_head.weight.detach().clone()
torch.nn.init.ones_(model.lm_head.weight)
second = model.push_to_hub(repo, commit_message="ones").oid
last = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").push_to_hub(repo).oid

loaded = AutoModelForCausalLM.from_pretrained(repo)
assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
assert torch.equal(AutoModelForCausalLM.from_pretrained(repo, revision=first).lm_head.weight, old)
errors = []
for repo_id, token in ((gated, reader), ("tester/none", None), ("none", None)):
    try:
        AutoConfig.from_pretrained(repo_id, token=token)
    except OSError as error:
        errors.append(type(error.__cause__).__name__)
print(json.dumps({
    "shas": [first, second, last], "errors": errors, "hidden_size": AutoConfig.from_pretrained(repo).hidden_size,
    "ids": AutoTokenizer.from_pretrained(repo)("hello hub there")["input_ids"],
}))
"""


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process reach the loopback Hub even where tests are told to be offline or to use a proxy."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    close_session()  # The next request makes a session that has read the variable.


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """Serve an empty Hub."""
    with LoopbackHub(tmp_path / "hub_root") as server:
        yield server


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Serve a Hub on which a client process has made a repository with two commits, a tag and a branch."""
    base = tmp_path_factory.mktemp("pushed")
    folder = base / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "sub" / "small.txt").write_text("small")
    (folder / "empty.txt").write_text("")
    with LoopbackHub(base / "hub_root") as server:
        result = run_client(PUSH, hub_env(server, base), str(folder), REPO)
        yield SimpleNamespace(hub=server, log=list(server.requests), **result)


def run_client(script: str, env: dict[str, str], *args: str) -> dict[str, Any]:
    """Run a client script and return the JSON of its last line."""
    command = [sys.executable, "-c", script, *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def client(hub: LoopbackHub, token: str | bool = LoopbackHub.token) -> HfApi:
    """Return a client in this process; `token=False` makes it anonymous."""
    return HfApi(endpoint=hub.url, token=token)


def downloader(hub: LoopbackHub, cache: Path) -> Callable[..., Path]:
    """Return `hf_hub_download` for this Hub with a cache of its own."""

    def download(repo_id: str, name: str, token: str | bool = hub.token, **options: Any) -> Path:
        options = {"endpoint": hub.url, "cache_dir": cache, "token": token, **options}
        return Path(hf_hub_download(repo_id, name, **options))

    return download


def make_repo(hub: LoopbackHub, repo_id: str = REPO, **options: Any) -> HfApi:
    """Create a repository with one small file and return the client."""
    api = client(hub)
    api.create_repo(repo_id, **options)
    api.upload_file(repo_id=repo_id, path_or_fileobj=b"{}", path_in_repo="config.json")
    return api


def test_push_makes_one_commit_each_and_skips_what_is_stored(pushed: SimpleNamespace) -> None:
    assert len(set(pushed.shas)) == 3 and all(len(sha) == 40 for sha in pushed.shas)
    assert pushed.again == pushed.shas[2], "an unchanged folder makes no commit"
    assert pushed.user == "tester"
    uploads = [path for method, path in pushed.log if method == "PUT"]
    assert uploads == [f"/lfs/{REPO}/{hashlib.sha256(WEIGHTS).hexdigest()}"], "the large file is sent once"
    titles = [commit.title for commit in client(pushed.hub).list_repo_commits(REPO)]
    assert titles == ["two", "one", "initial commit"]


def test_download_at_main_tag_branch_and_sha(pushed: SimpleNamespace, tmp_path: Path) -> None:
    download = downloader(pushed.hub, tmp_path)
    first = pushed.shas[1]
    assert json.loads(download(REPO, "config.json").read_text()) == {"text": "two"}
    assert json.loads(download(REPO, "config.json", revision=first).read_text()) == {"text": "one"}
    assert download(REPO, "config.json", revision="v1").parent.name == first
    assert download(REPO, "note with space.txt", revision="dev/x").read_bytes() == b"dev"
    assert download(REPO, "small.txt", subfolder="sub").read_text() == "small"
    assert download(REPO, "empty.txt").read_bytes() == b""
    weights = download(REPO, "model.safetensors")
    assert weights.read_bytes() == WEIGHTS
    assert weights.resolve().name == hashlib.sha256(WEIGHTS).hexdigest(), "the cache names LFS blobs by sha256"
    assert ("GET", f"/{REPO}/resolve/dev%2Fx/note%20with%20space.txt") in pushed.hub.requests


def test_snapshot_and_cached_revision(pushed: SimpleNamespace, tmp_path: Path) -> None:
    options = {"endpoint": pushed.hub.url, "cache_dir": tmp_path, "token": pushed.hub.token}
    old = Path(snapshot_download(REPO, revision=pushed.shas[1], **options))
    new = Path(snapshot_download(REPO, **options))
    expected = {".gitattributes", "config.json", "empty.txt", "model.safetensors", "sub/small.txt"}
    assert {str(path.relative_to(new)) for path in new.rglob("*") if path.is_file()} == expected
    assert (old.name, new.name) == tuple(pushed.shas[1:])
    assert [json.loads((path / "config.json").read_text())["text"] for path in (old, new)] == ["one", "two"]
    before = len(pushed.hub.requests)
    assert Path(snapshot_download(REPO, revision=pushed.shas[1], **options)) == old
    assert len(pushed.hub.requests) == before, "a cached commit needs no request"


def test_listings(pushed: SimpleNamespace) -> None:
    api = client(pushed.hub, token=False)
    info = api.model_info(REPO, files_metadata=True)
    assert (info.id, info.sha, info.private, info.gated) == (REPO, pushed.shas[2], False, False)
    assert info.last_modified is not None and info.siblings is not None
    large = next(item for item in info.siblings if item.rfilename == "model.safetensors")
    assert large.lfs is not None and large.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert api.model_info(REPO, revision="dev/x").sha == api.list_repo_commits(REPO, revision="dev/x")[0].commit_id
    assert [item.path for item in api.list_repo_tree(REPO, "sub")] == ["sub/small.txt"]
    top = [item.path for item in api.list_repo_tree(REPO)]
    assert top == [".gitattributes", "config.json", "empty.txt", "model.safetensors", "sub"]
    assert "sub/small.txt" not in api.list_repo_files(REPO, revision="dev/x"), "the folder was deleted there"
    paths = api.get_paths_info(REPO, ["model.safetensors", "sub", "missing"])
    assert [item.path for item in paths] == ["model.safetensors", "sub"]
    refs = api.list_repo_refs(REPO)
    assert {branch.name for branch in refs.branches} == {"main", "dev/x"}
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", pushed.shas[1])]


def test_missing_things_raise_their_own_errors(pushed: SimpleNamespace, tmp_path: Path) -> None:
    download, api = downloader(pushed.hub, tmp_path), client(pushed.hub)
    with pytest.raises(hf_errors.EntryNotFoundError):
        download(REPO, "missing.json")
    assert list(tmp_path.rglob(f".no_exist/{pushed.shas[2]}/missing.json")), "the commit came with the refusal"
    with pytest.raises(hf_errors.RevisionNotFoundError):
        download(REPO, "config.json", revision="missing")
    with pytest.raises(hf_errors.RevisionNotFoundError):
        api.model_info(REPO, revision="0" * 40)
    for token in (pushed.hub.token, False):
        with pytest.raises(hf_errors.RepositoryNotFoundError):
            download("tester/missing", "config.json", token=token)
    with pytest.raises(hf_errors.RepositoryNotFoundError):
        api.model_info("missing")
    with pytest.raises(hf_errors.EntryNotFoundError):
        list(api.list_repo_tree(REPO, "missing"))
    with pytest.raises(hf_errors.HfHubHTTPError, match="Invalid user token"):
        client(pushed.hub, token="hf_unknown").whoami()


def test_ranges(pushed: SimpleNamespace) -> None:
    url = f"{pushed.hub.url}/{REPO}/resolve/main/model.safetensors"
    end = len(WEIGHTS)
    ranges = {
        "10-19": WEIGHTS[10:20],
        f"{end - 9}-": WEIGHTS[-9:],
        f"{end - 9}-{end + 9}": WEIGHTS[-9:],
        "-5": WEIGHTS[-5:],
    }
    for span, content in ranges.items():
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": f"bytes={span}"})) as response:
            assert (response.status, response.read()) == (206, content)
    with pytest.raises(urllib.error.HTTPError, match="416"):
        urllib.request.urlopen(urllib.request.Request(url, headers={"Range": f"bytes={end}-"}))


def test_private_repository_looks_missing(hub: LoopbackHub, tmp_path: Path) -> None:
    api, download = make_repo(hub, private=True), downloader(hub, tmp_path)
    assert api.model_info(REPO).private
    for token in (False, hub.reader_token):
        with pytest.raises(hf_errors.RepositoryNotFoundError):
            client(hub, token).model_info(REPO)
        with pytest.raises(hf_errors.RepositoryNotFoundError):
            download(REPO, "config.json", token=token)
    hub.set_private(REPO, False)
    assert download(REPO, "config.json", token=False).read_bytes() == b"{}"


def test_gated_repository_lists_files_and_refuses_their_content(hub: LoopbackHub, tmp_path: Path) -> None:
    make_repo(hub)
    cache = tmp_path / "cache"
    download = downloader(hub, cache)
    hub.set_gated(REPO)
    assert client(hub, False).model_info(REPO).gated == "manual"
    for token in (False, hub.reader_token):
        with pytest.raises(hf_errors.GatedRepoError):
            download(REPO, "config.json", token=token)
        with pytest.raises(hf_errors.GatedRepoError):
            snapshot_download(REPO, endpoint=hub.url, cache_dir=cache, token=token)
        with pytest.raises(hf_errors.GatedRepoError):
            client(hub, token).auth_check(REPO)
    assert not list(cache.rglob("config.json"))
    hub.set_gated(REPO, accepted=[hub.reader_token])
    assert download(REPO, "config.json", token=hub.reader_token).read_bytes() == b"{}"


def test_writes_are_refused_without_the_right(hub: LoopbackHub) -> None:
    api = make_repo(hub)
    head = api.model_info(REPO).sha
    refused: list[tuple[str | bool, str]] = [(hub.reader_token, "403"), (False, "401")]
    for token, status in refused:
        with pytest.raises(hf_errors.HfHubHTTPError, match=status):
            client(hub, token).upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x.txt")
    with pytest.raises(hf_errors.HfHubHTTPError, match="403"):
        client(hub, hub.reader_token).create_repo("tester/other")
    with pytest.raises(hf_errors.HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(hf_errors.HfHubHTTPError, match="412"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x.txt", parent_commit="0" * 40)
    with pytest.raises(hf_errors.BadRequestError, match="pull requests"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x.txt", create_pr=True)
    with pytest.raises(hf_errors.EntryNotFoundError):
        api.delete_file("missing.txt", repo_id=REPO)
    assert api.model_info(REPO).sha == head
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def put(hub: LoopbackHub, content: bytes, oid: str, size: int, signature: str) -> int:
    """Upload an LFS object and return the status."""
    url = f"{hub.url}/lfs/{REPO}/{oid}?size={size}&signature={signature}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=content, method="PUT")) as response:
            status: int = response.status
    except urllib.error.HTTPError as error:
        status = error.code
    return status


def test_uploads_are_stored_whole_or_not_at_all(hub: LoopbackHub) -> None:
    make_repo(hub)
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    signature = hub.sign(REPO, oid, len(WEIGHTS))
    blobs = hub.repo(REPO).folder / "blobs"
    before = sorted(blobs.iterdir())
    assert put(hub, WEIGHTS, oid, len(WEIGHTS), "0" * 64) == 403
    assert put(hub, WEIGHTS[::-1], oid, len(WEIGHTS), signature) == 400
    host, port = hub.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"PUT /lfs/{REPO}/{oid}?size={len(WEIGHTS)}&signature={signature} HTTP/1.1\r\n"
        connection.sendall(f"{head}Host: {host}\r\nContent-Length: {len(WEIGHTS)}\r\n\r\n".encode() + WEIGHTS[:5000])
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b"", "the server gives up without an answer"
    assert sorted(blobs.iterdir()) == before, "neither a blob nor a temporary file is left"
    assert put(hub, WEIGHTS, oid, len(WEIGHTS), signature) == 200
    assert (blobs / oid).read_bytes() == WEIGHTS


def test_a_hub_reopened_on_its_folder_has_the_same_repositories(hub: LoopbackHub, tmp_path: Path) -> None:
    sha = make_repo(hub, private=True).model_info(REPO).sha
    hub.set_gated(REPO)
    with LoopbackHub(tmp_path / "hub_root") as again:
        info = client(again).model_info(REPO)
        assert (info.sha, info.private, info.gated) == (sha, True, "manual")


@pytest.mark.process
def test_transformers_pushes_and_loads_by_id(hub: LoopbackHub, tmp_path: Path) -> None:
    make_repo(hub, "tester/gated")
    hub.set_gated("tester/gated")
    result = run_client(TRANSFORMERS, hub_env(hub, tmp_path), "tester/tiny", "tester/gated", hub.reader_token)
    assert result["hidden_size"] == 8 and result["ids"] == [1, 2, 0]
    assert result["errors"] == ["GatedRepoError", "RepositoryNotFoundError", "RepositoryNotFoundError"]
    assert hub.repo("tester/tiny").resolve("main") == result["shas"][2]
    assert hub.repo("tester/tiny").state["private"]
    files = hub.repo("tester/tiny").files(result["shas"][0])
    assert set(files) == {".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors"}
