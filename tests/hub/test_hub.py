"""Delta repositories on the Hub: the real clients, in processes of their own, against the loopback Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.hub_client import run_client
from support.loopback_hub import LoopbackHub, hub_env
from support.tiny_models import Pair, edit_json
from support.without_impart_hf import WITHOUT_IMPART_HF
from transformers import AutoModelForCausalLM

import impart_hf

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("hub")]

# Pushes base, fine-tune and two commits of their delta; then the base moves on.
PUBLISH = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi
from impart_hf import LowRankConfig, compress
from impart_hf.hub import push

base, finetuned, out = map(Path, sys.argv[1:])
(finetuned / "README.md").write_text("---\\nlicense: apache-2.0\\nlanguage: [en]\\n---\\n# A fine-tune\\n")
api = HfApi()

def upload(repo, folder):
    api.create_repo(repo, exist_ok=True)
    return api.upload_folder(repo_id=repo, folder_path=folder).oid

result = {"base": upload("tester/base", base), "finetuned": upload("tester/finetuned", finetuned)}
for name, ratio in (("first", 3), ("second", 5)):
    compress("tester/base", "tester/finetuned", out / name, LowRankConfig(compression_ratio=ratio))
    push(out / name, "tester/delta")
    result[name] = api.model_info("tester/delta").sha
for kind in ("private", "gated"):
    upload(f"tester/{kind}-base", base)
    compress(f"tester/{kind}-base", "tester/finetuned", out / kind, LowRankConfig(compression_ratio=3))
    push(out / kind, f"tester/on-{kind}")
compress(str(base), str(finetuned), out / "named", LowRankConfig(compression_ratio=3), base_name="tester/base")
push(out / "named", "tester/named")
result["base moved"] = upload("tester/base", finetuned)
print(json.dumps(result))
"""

LOAD = """
import json, sys, warnings
import torch
import transformers
import impart_hf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

first, out, base = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained("tester/delta")
assert isinstance(model, impart_hf.DeltaCompressedForCausalLM) and isinstance(model, LlamaForCausalLM)
assert model.name_or_path == model.config.name_or_path == "tester/delta"
torch.save(model.state_dict(), out + "/second.pt")
model.save_pretrained(out + "/saved")
url = str(model.push_to_hub("tester/other", commit_message="mine"))
model.save_pretrained(out + "/other-again", push_to_hub=True, private=True, commit_message="again")
model.push_to_hub("tester/tagged", tags=["mine"], revision="dev")

old = AutoModelForCausalLM.from_pretrained("tester/delta", revision=first)
torch.save(old.state_dict(), out + "/first.pt")
old.push_to_hub("tester/old")
AutoModelForCausalLM.from_pretrained("tester/delta", local_files_only=True)
direct = impart_hf.DeltaCompressedForCausalLM.from_pretrained("tester/delta")
assert torch.equal(direct.lm_head.weight, model.lm_head.weight)
again = AutoModelForCausalLM.from_pretrained("tester/other")
assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())
AutoTokenizer.from_pretrained("tester/delta")
text = pipeline("text-generation", model="tester/delta")("A fine", max_new_tokens=3, do_sample=False)
moved = AutoModelForCausalLM.from_pretrained("tester/named", base_model=base)
assert torch.equal(moved.lm_head.weight, old.lm_head.weight)
print(json.dumps({"url": url, "text": text[0]["generated_text"]}))
"""

REMOTE_CODE = (
    WITHOUT_IMPART_HF
    + """
import json, pickle
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

first, out = sys.argv[1:]
for name, arguments in (("second", {}), ("first", {"revision": first})):
    model = AutoModelForCausalLM.from_pretrained("tester/delta", trust_remote_code=True, **arguments)
    assert isinstance(model, LlamaForCausalLM)
    expected = torch.load(f"{out}/{name}.pt")
    assert all(torch.equal(expected[n], t) for n, t in model.state_dict().items()), name
assert type(pickle.loads(pickle.dumps(model))) is type(model)
url = str(model.push_to_hub("tester/from-remote-code"))
generator = pipeline("text-generation", model="tester/delta", trust_remote_code=True)
text = generator("A fine", max_new_tokens=3, do_sample=False)
assert not any(name.split(".")[0] == "impart_hf" for name in sys.modules)
print(json.dumps({"url": url, "text": text[0]["generated_text"]}))
"""
)

# The base as it was and as it is now, a delta with its base, and the tokens that a private base needs.
COMPARE = """
import json, sys
import impart_hf

base, first, token = sys.argv[1:]
def changed(*models, **options):
    report = impart_hf.diff(*models, progress=False, spectra=False, **options)
    return report.total.changed, report.verdict.method, list(report.verdict.commands)

print(json.dumps({
    "moved": changed("tester/base", "tester/finetuned"),
    "pair": changed("tester/base", "tester/finetuned", base_revision=base),
    "delta": changed("tester/delta", finetuned_revision=first),
    "beside": changed("tester/base", "tester/delta", base_revision=base, finetuned_revision=first),
    "private": changed("tester/private-base", "tester/base", finetuned_revision=base, token=token),
}))
"""

# Each argument is a JSON list: repository, arguments of from_pretrained.
ERRORS = """
import json, sys
import impart_hf
from transformers import AutoModelForCausalLM

answers = []
for argument in sys.argv[1:]:
    repo, arguments = json.loads(argument)
    try:
        AutoModelForCausalLM.from_pretrained(repo, **arguments)
        answers.append(["loaded", ""])
    except Exception as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def world(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A Hub with base, fine-tune and deltas; the folders they were pushed from; the commits."""
    root = tmp_path_factory.mktemp("world")
    for name in ("base", "finetuned"):
        shutil.copytree(getattr(tiny_pair, name), root / name)
    (root / "out").mkdir()
    with LoopbackHub(root / "hub_root", lfs_threshold=50_000) as hub:
        folders = [str(root / name) for name in ("base", "finetuned", "out")]
        commits = run_client(PUBLISH, hub_env(hub, root / "publisher"), *folders)
        hub.set_private("tester/private-base")
        hub.set_gated("tester/gated-base")
        yield SimpleNamespace(hub=hub, root=root, out=root / "out", commits=commits)


@pytest.fixture(scope="module")
def loaded(world: SimpleNamespace) -> SimpleNamespace:
    """What a client with impart_hf loaded and pushed."""
    folder = world.root / "loader"
    (folder / "out").mkdir(parents=True)
    arguments = (world.commits["first"], str(folder / "out"))
    before = len(world.hub.requests)
    result = run_client(LOAD, hub_env(world.hub, folder), *arguments, str(world.root / "base"))
    requests = world.hub.requests[before:]
    return SimpleNamespace(folder=folder, out=folder / "out", arguments=arguments, requests=requests, **result)


def hub_files(world: SimpleNamespace, repo: str, revision: str = "main") -> dict[str, Any]:
    """The files of a repository on the Hub, those aside that the Hub makes itself."""
    stored = world.hub.repo(repo)
    return {name: entry for name, entry in stored.files(stored.resolve(revision)).items() if name != ".gitattributes"}


def local_state(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, base_model=str(base)).state_dict()


def test_base_and_commit_are_recorded(world: SimpleNamespace) -> None:
    config = json.loads((world.out / "first" / "config.json").read_text())
    assert config["base_model_name_or_path"] == "tester/base"
    assert config["base_model_revision"] == world.commits["base"] != world.commits["base moved"]
    assert world.hub.repo("tester/base").resolve("main") == world.commits["base moved"]
    named = json.loads((world.out / "named" / "config.json").read_text())
    assert (named["base_model_name_or_path"], named["base_model_revision"]) == ("tester/base", None)
    card = (world.out / "first" / "README.md").read_text()
    head = card.split("---")[1].splitlines()
    assert {"base_model: tester/base", "base_model_relation: finetune", "license: apache-2.0"} <= set(head)
    assert world.commits["base"] in card
    assert 'from_pretrained("REPO_ID"' in card
    stored = world.hub.repo("tester/delta")
    pushed = stored.blob_path(hub_files(world, "tester/delta", world.commits["first"])["README.md"].sha256)
    assert pushed.read_text() == card.replace("REPO_ID", "tester/delta")


def test_loads_by_id_and_revision_although_the_base_moved_on(world: SimpleNamespace, loaded: SimpleNamespace) -> None:
    for name in ("first", "second"):
        state = torch.load(loaded.out / f"{name}.pt")
        expected = local_state(world.out / name, world.root / "base")
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    downloads = {path for _, path in loaded.requests if path.startswith("/tester/base/resolve/")}
    assert f"/tester/base/resolve/{world.commits['base']}/model.safetensors" in downloads
    assert all(path.startswith(f"/tester/base/resolve/{world.commits['base']}/") for path in downloads)
    weights = {
        path for _, path in loaded.requests if path.startswith("/tester/delta/resolve/") and "delta_model" in path
    }
    commits = {world.commits["first"], world.commits["second"]}
    assert {path.split("/")[4] for path in weights} == commits, "all files of a load are of one commit"


def test_revisions_are_compared(world: SimpleNamespace) -> None:
    environment = hub_env(world.hub, world.root / "comparer")
    token = environment.pop("HF_TOKEN")
    found = run_client(COMPARE, environment, world.commits["base"], world.commits["first"], token)
    assert found["moved"][:2] == [0, "equal"] and found["private"][:2] == [0, "equal"]
    local = impart_hf.diff(str(world.root / "base"), str(world.root / "finetuned"), progress=False, spectra=False)
    assert found["pair"][:2] == [local.total.changed, "impart-rd"]
    assert found["pair"][2][0].endswith(f"--base-revision {world.commits['base']}")
    own = impart_hf.diff(str(world.out / "first"), base_model=str(world.root / "base"), progress=False, spectra=False)
    assert found["delta"][:2] == [own.total.changed, "stored"] and found["beside"][0] == own.total.changed
    assert found["beside"][2][0].endswith(f"reconstruct tester/delta DENSE --revision {world.commits['first']}")


def test_pushes_the_repository_unchanged(world: SimpleNamespace, loaded: SimpleNamespace) -> None:
    original = hub_files(world, "tester/delta")
    assert {"config.json", "delta_model.safetensors", "README.md", "tokenizer.json"} <= original.keys()
    assert "modeling_delta_compressed.py" in original
    for repo in ("tester/other", "tester/other-again"):
        assert hub_files(world, repo) == original, repo
    assert hub_files(world, "tester/old") == hub_files(world, "tester/delta", world.commits["first"])
    assert "/tester/other/" in loaded.url
    assert not world.hub.repo("tester/other").state["private"] and world.hub.repo("tester/other-again").state["private"]
    saved = {p.name: p.read_bytes() for p in (loaded.out / "saved").iterdir()}
    local = {p.name: p.read_bytes() for p in (world.out / "second").iterdir()}
    local["README.md"] = local["README.md"].replace(b"REPO_ID", b"tester/delta")
    assert saved == local
    tagged = hub_files(world, "tester/tagged", "dev")
    assert {name for name in original if tagged[name] != original[name]} == {"README.md"}


def test_trust_remote_code_without_impart_hf(world: SimpleNamespace, loaded: SimpleNamespace) -> None:
    folder = world.root / "stranger"
    result = run_client(REMOTE_CODE, hub_env(world.hub, folder), *loaded.arguments)
    assert result["text"] == loaded.text
    assert hub_files(world, "tester/from-remote-code") == hub_files(world, "tester/old")


def test_one_clear_error(world: SimpleNamespace, loaded: SimpleNamespace, tmp_path: Path) -> None:
    unpinned = shutil.copytree(world.out / "first", tmp_path / "delta")
    edit_json(unpinned / "config.json", base_model_revision="0" * 40)
    cases: dict[str, tuple[list[Any], str, list[str]]] = {
        "private base": (["tester/on-private", {}], "MissingBaseError", ["tester/private-base", "token"]),
        "gated base": (["tester/on-gated", {}], "MissingBaseError", ["tester/gated-base", "gated", "token"]),
        "missing base": (
            ["tester/delta", {"base_model": "tester/none"}], "MissingBaseError", ["tester/none", "neither a local"],
        ),
        "base is a delta": (
            ["tester/delta", {"base_model": "tester/old"}], "DeltaFormatError", ["tester/old", "method exact"],
        ),
        "other base": (["tester/delta", {"base_model": "tester/finetuned"}], "WrongBaseError", ["tester/finetuned"]),
        "base not pinned, moved on": (["tester/named", {}], "WrongBaseError", ["tester/base", "tester/named"]),
        "missing commit of the base": ([str(unpinned), {}], "MissingBaseError", ["tester/base", "0" * 40]),
        "missing revision": (["tester/delta", {"revision": "none"}], "OSError", ["tester/delta", "none"]),
        "with a token": (["tester/on-private", {"token": LoopbackHub.token}], "loaded", []),
    }  # fmt: skip
    env = hub_env(world.hub, world.root / "anonymous", token=None)
    answers = run_client(ERRORS, env, *(json.dumps(case[0]) for case in cases.values()))
    for (name, (_, kind, words)), (raised, message) in zip(cases.items(), answers, strict=True):
        assert raised == kind, (name, message)
        assert all(word in message for word in words), (name, message)
        assert "\n" not in message or kind == "OSError", (name, message)


KEEPING = """
import json, sys
from huggingface_hub import HfApi
import impart_hf
from transformers import AutoModelForCausalLM

mine, out = sys.argv[1:]
api = HfApi()
api.create_repo("tester/mine")
api.upload_folder(repo_id="tester/mine", folder_path=mine)
model = AutoModelForCausalLM.from_pretrained("tester/delta")
model.config.eos_token_id = 5
model.push_to_hub("tester/mine")
first = api.model_info("tester/mine").sha
model.push_to_hub("tester/mine", tags=["tagged"])
assert AutoModelForCausalLM.from_pretrained("tester/mine").config.eos_token_id == 5
print(json.dumps(first))
"""


def test_a_push_keeps_what_the_hub_has(world: SimpleNamespace, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("tokenizer_config.json", "LICENSE", "config.json", "README.md"):
        (mine / name).write_text("---\ntags: [old]\n---\n# Mine\n" if name == "README.md" else "{}")
    stale = ("delta_model-00001-of-00002.safetensors", "delta_model.safetensors.index.json")
    for name in stale:
        (mine / name).write_text("{}")
    first = run_client(KEEPING, hub_env(world.hub, tmp_path), str(mine), str(tmp_path))
    stored = world.hub.repo("tester/mine")

    def text(name: str, revision: str = "main") -> str:
        return stored.blob_path(hub_files(world, "tester/mine", revision)[name].sha256).read_text()

    assert all(
        text(name, first) == (mine / name).read_text() for name in ("tokenizer_config.json", "LICENSE", "README.md")
    )
    found = hub_files(world, "tester/mine")
    assert "tokenizer.json" not in found, "a tokenizer is kept whole"
    assert "delta_model.safetensors" in found and not set(stale) & found.keys(), "nothing of another delta is read"
    assert json.loads(text("config.json"))["text_config"]["eos_token_id"] == 5
    assert "# Mine" in text("README.md") and "- old" in text("README.md") and "- tagged" in text("README.md")


WARM = """
import json, logging, sys
import impart_hf
from transformers import AutoModelForCausalLM

lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("impart_hf").addHandler(handler)
first, out = sys.argv[1:]
AutoModelForCausalLM.from_pretrained("tester/delta", revision=first)
AutoModelForCausalLM.from_pretrained("tester/delta").save_pretrained(out)
print(json.dumps(lines))
"""


def test_offline_from_a_warm_cache(world: SimpleNamespace, loaded: SimpleNamespace, tmp_path: Path) -> None:
    before = len(world.hub.requests)
    env = {**hub_env(world.hub, loaded.folder), "HF_HUB_OFFLINE": "1"}
    lines = run_client(WARM, env, loaded.arguments[0], str(tmp_path / "saved"))
    assert len(world.hub.requests) == before
    # A cache need not hold all files of a repository, so what is saved is said.
    assert len(lines) == 1 and "offline" in lines[0] and "tester/delta" in lines[0]
    assert {p.name for p in (tmp_path / "saved").iterdir()} >= {"config.json", "delta_model.safetensors"}


CONFIG_ONLY = """
import json, sys
from huggingface_hub import hf_hub_download
print(json.dumps(hf_hub_download("tester/base", "config.json", revision=sys.argv[1])))
"""


def test_offline_with_half_of_it(world: SimpleNamespace, tmp_path: Path) -> None:
    """Of one base config.json is in the cache, of another nothing: the repositories are not to blame."""
    env = hub_env(world.hub, tmp_path)
    run_client(CONFIG_ONLY, env, world.commits["base"])
    cases = [[str(world.out / name), {}] for name in ("first", "gated")]
    answers = run_client(ERRORS, {**env, "HF_HUB_OFFLINE": "1"}, *map(json.dumps, cases))
    for (kind, message), file in zip(
        answers, ("'model.safetensors' of 'tester/base'", "'tester/gated-base'"), strict=True
    ):
        assert kind == "MissingBaseError" and "\n" not in message
        assert file in message and "cache" in message and "offline" in message
