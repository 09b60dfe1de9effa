"""What lies beside a model's weights goes along with what is made from the model, and config.json stays as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hub_client import run_client
from support.loaded_models import captured_log
from support.loopback_hub import LoopbackHub, hub_env
from support.messages import naming
from support.tiny_models import Pair, edit_json
from transformers import AutoTokenizer, BertTokenizer

from impart_hf import LowRankConfig, compress, merge
from impart_hf.cli.summaries import compression_summary
from impart_hf.modeling.model_files import CheckpointError, HubOptions
from impart_hf.pruning import prune_layers
from impart_hf.repository.open import open_repository
from impart_hf.repository.reader_files import reader_files
from impart_hf.repository.reconstruct import reconstruct

METHOD = LowRankConfig(compression_ratio=3)
KEPT = [
    *("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "merges.txt", "added_tokens.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json"),
    *("additional_chat_templates/rag.jinja", "tokenization_own.py", "a.tiktoken"),
    *(
        "LICENSE",
        "LICENSE.md",
        "NOTICE.txt",
        "USE_POLICY.md",
        "tokenizer.model.v3",
        "source.spm",
        "mergekit_config.yml",
    ),
]
LEFT = [
    *("pytorch_model.bin", "model.gguf", "model.onnx", "model.onnx_data", "flax_model.msgpack", "tf_model.h5"),
    *("consolidated.00.pth", "model-00007-of-00009.safetensors", "codes.npz", "pytorch_model.bin.index.json"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "all_results.json"),
    *("events.out.tfevents.1", "runs/now/events.out.tfevents.1", "checkpoint-7/tokenizer.json", ".hidden"),
    *("additional_chat_templates/.hidden", "other/vocab.txt", "modeling_own.py"),
    *(
        "texts.jsonl",
        "train.py",
        "vocab.jsonl",
        "weights.dat",
        "model.fp16",
        "model.gguf.part1",
        "q4.gguf",
        "model.json",
    ),
    *("weights.tar.bz2", "weights.xz", "imatrix.dat", "logo.png", "core", "generation_config.json.bak"),
    *("id_rsa", "id_ed25519.txt", "token", "token.txt", "hf_token.txt", "my.env", "key.pem", "tls.key", ".netrc"),
    *("credentials", "aws-credentials.json", "secrets.json", "client_secret.json", "api_key.txt", "password.txt"),
    *("modeling_delta_compressed.py", "delta_model.safetensors", "delta_model.safetensors.index.json"),
]


@pytest.fixture
def rich_pair(pair: Pair) -> Pair:
    """A fine-tune with all kinds of files."""
    for name in [*KEPT, *LEFT]:
        path = pair.finetuned / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"of": name}))
    (pair.finetuned / "README.md").write_text("# Mine\n")
    return pair


def beside(folder: Path) -> dict[str, bytes]:
    """All files by their paths."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def make_delta(pair: Pair, output: Path) -> None:
    compress(str(pair.base), str(pair.finetuned), output, METHOD)


def make_delta_dense_again(pair: Pair, output: Path) -> None:
    make_delta(pair, output.with_name("delta"))
    reconstruct(open_repository(str(output.with_name("delta")), HubOptions()), output)


def make_merge(pair: Pair, output: Path) -> None:
    config = {
        "merge_method": "task_arithmetic", "base_model": str(pair.base), "tokenizer_source": str(pair.finetuned),
        "models": [{"model": str(pair.finetuned), "parameters": {"weight": 0.5}}],
    }  # fmt: skip
    merge(config, output)


def make_pruned(pair: Pair, output: Path) -> None:
    prune_layers(str(pair.finetuned), output, layers=[1], merge=False, protect=False, progress=False)


@pytest.mark.parametrize("make", [make_delta, make_delta_dense_again, make_merge, make_pruned])
def test_all_but_weights_and_leftovers(rich_pair: Pair, tmp_path: Path, make: Callable[[Pair, Path], None]) -> None:
    make(rich_pair, tmp_path / "out")
    found, source = beside(tmp_path / "out"), beside(rich_pair.finetuned)
    for name in [*KEPT, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]:
        assert found[name] == source[name], name
    assert all(found.get(name) != source[name] for name in [*LEFT, "README.md"])
    reader = {path.name for path in reader_files()}
    weights = {"model.safetensors", "delta_model.safetensors"}
    assert set(found) - set(source) <= reader | weights


def test_a_tokenizer_that_is_a_list_of_words(pair: Pair, tmp_path: Path) -> None:
    """Without vocab.txt, every token of it would be unknown."""
    for path in [*pair.finetuned.glob("token*"), *pair.finetuned.glob("*.jinja")]:
        path.unlink()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]
    (pair.finetuned / "vocab.txt").write_text("\n".join(words))
    edit_json(pair.finetuned / "config.json", tokenizer_class="BertTokenizer")
    make_delta(pair, tmp_path / "out")
    for tokenizer in (BertTokenizer.from_pretrained(folder) for folder in (pair.finetuned, tmp_path / "out")):
        assert tokenizer("hello world", add_special_tokens=False).input_ids == [5, 6]


def test_files_that_the_tokenizers_class_names(pair: Pair, tmp_path: Path) -> None:
    for name in ("bpe.codes", "other.codes"):
        (pair.finetuned / name).write_text("a b 1")
    edit_json(pair.finetuned / "tokenizer_config.json", tokenizer_class="PhobertTokenizer")
    report = compress(str(pair.base), str(pair.finetuned), tmp_path / "out", METHOD)
    assert "bpe.codes" in report.sidecar_files and (tmp_path / "out" / "bpe.codes").exists()
    assert not (tmp_path / "out" / "other.codes").exists()
    make_delta_dense_again(pair, tmp_path / "dense")
    assert (tmp_path / "dense" / "bpe.codes").exists()


def test_files_that_the_tokenizers_own_code_names(pair: Pair, tmp_path: Path) -> None:
    names = ["vocab.jsonl", "words.pkl", "hf_token.txt"]
    for name in [*names, "unnamed.pkl"]:
        (pair.finetuned / name).write_text("x")
    (pair.finetuned / "tokenization_own.py").write_text(f"FILES = {names}")
    make_delta(pair, tmp_path / "out")
    found = beside(tmp_path / "out")
    assert found.keys() >= {"vocab.jsonl", "words.pkl"} and not found.keys() & {"hf_token.txt", "unnamed.pkl"}


@pytest.mark.parametrize("name", ["precision.py", "tensors.py", "checkpoints.py"])
def test_code_under_the_name_of_a_reader_file(rich_pair: Pair, tmp_path: Path, name: str) -> None:
    (rich_pair.finetuned / "modeling_delta_compressed.py").unlink()
    (rich_pair.finetuned / name).write_text("OWN = 1")
    make_delta(rich_pair, tmp_path / "no code is named")
    edit_json(rich_pair.finetuned / "config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    with pytest.raises(CheckpointError, match=naming(rich_pair.finetuned, name)):
        make_delta(rich_pair, tmp_path / "out" / "delta")
    assert not (tmp_path / "out").exists()
    make_merge(rich_pair, tmp_path / "merged")
    assert (tmp_path / "merged" / name).read_text() == "OWN = 1", "a dense model needs no reader"


def test_several_chat_templates(pair: Pair, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.finetuned)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(pair.finetuned)
    for _ in range(2):  # the second time over the first
        make_delta(pair, tmp_path / "out")
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_sidecar_files_do_not_count(rich_pair: Pair, tmp_path: Path) -> None:
    report = compress(str(rich_pair.base), str(rich_pair.finetuned), tmp_path / "out", METHOD)
    plain = shutil.copytree(rich_pair.base, tmp_path / "plain")
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(rich_pair.finetuned / name, plain / name)
    assert (
        report.repository_bytes == compress(str(rich_pair.base), str(plain), tmp_path / "two", METHOD).repository_bytes
    )
    found = beside(tmp_path / "out")
    names = [*KEPT, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    assert report.sidecar_files == report.to_dict()["sidecar_files"] == sorted(names)
    summary = compression_summary(report, "out")
    assert f"copied, not counted: {', '.join(sorted(names)[:4])} and {len(names) - 4} more: " in summary
    assert report.sidecar_bytes == sum(len(found[name]) for name in names)


def test_a_file_that_is_too_large_is_named(pair: Pair, tmp_path: Path) -> None:
    with (pair.finetuned / "data.json").open("wb") as file:
        file.truncate(101_000_000)
    with captured_log() as lines:
        make_delta(pair, tmp_path / "out")
    assert not (tmp_path / "out" / "data.json").exists()
    assert any("data.json" in line for line in lines)


# config.json --------------------------------------------------------------------------------------------------------


def test_config_of_before_transformers_5(pair: Pair, tmp_path: Path) -> None:
    fields = {
        "rope_parameters": None, "dtype": None, "torch_dtype": "bfloat16", "rope_theta": 500000.0, "own": [1, None],
        "rope_scaling": {"type": "linear", "factor": 2.0}, "transformers_version": "4.38.0", "pad_token_id": -1,
    }  # fmt: skip
    edit_json(pair.finetuned / "config.json", **fields)
    make_delta_dense_again(pair, tmp_path / "out")
    found, source = ((f / "config.json").read_bytes() for f in (tmp_path / "out", pair.finetuned))
    assert found == source, "to the byte, since it was written with the usual indentation"


@pytest.mark.parametrize(
    ("auto_map", "kept"),
    [
        ({"AutoModelForCausalLM": "modeling_own.Own"}, {"AutoModelForCausalLM": "modeling_own.Own"}),
        ({"AutoModelForCausalLM": "modeling_gone.Own"}, None),
        ({"AutoConfig": "owner/name--modeling_gone.Own"}, {"AutoConfig": "owner/name--modeling_gone.Own"}),
        (
            {"AutoConfig": "modeling_gone.Own", "AutoTokenizer": ["tokenization_own.Own", None]},
            {"AutoTokenizer": ["tokenization_own.Own", None]},
        ),
    ],
)
def test_auto_map_names_files_that_are_there(rich_pair: Pair, tmp_path: Path, auto_map: Any, kept: Any) -> None:
    edit_json(rich_pair.finetuned / "config.json", auto_map=auto_map)
    make_delta_dense_again(rich_pair, tmp_path / "out")
    assert (tmp_path / "out" / "modeling_own.py").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("auto_map") == kept


# On the Hub ---------------------------------------------------------------------------------------------------------

FROM_THE_HUB = """
import json, sys
from huggingface_hub import HfApi
from impart_hf import LowRankConfig, compress

base, finetuned, out = sys.argv[1:]
api = HfApi()
for name, folder in (("base", base), ("finetuned", finetuned)):
    api.create_repo(f"tester/{name}", private=name == "finetuned")
    api.upload_folder(repo_id=f"tester/{name}", folder_path=folder)
compress("tester/base", "tester/finetuned", out + "/delta", LowRankConfig(compression_ratio=3))
print(json.dumps(None))
"""

OFFLINE = """
import json, sys
from impart_hf import LowRankConfig, compress
compress("tester/base", "tester/finetuned", sys.argv[1], LowRankConfig(compression_ratio=3))
print(json.dumps(None))
"""


@pytest.mark.process
@pytest.mark.xdist_group("hub")
def test_all_files_of_a_hub_repository(rich_pair: Pair, tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "hub") as hub:
        env = hub_env(hub, tmp_path)
        run_client(FROM_THE_HUB, env, str(rich_pair.base), str(rich_pair.finetuned), str(tmp_path / "out"))
        before = len(hub.requests)
        run_client(OFFLINE, {**env, "HF_HUB_OFFLINE": "1"}, str(tmp_path / "out" / "offline"))
        assert len(hub.requests) == before
        downloaded = {
            path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path
        }
    make_delta(rich_pair, tmp_path / "out" / "local")
    local = beside(tmp_path / "out" / "local")
    for name in ("delta", "offline"):
        found = beside(tmp_path / "out" / name)
        assert found.keys() == local.keys()
        assert all(found[each] == local[each] for each in KEPT)
    assert not downloaded & {"model.gguf", "optimizer.pt", "flax_model.msgpack"}
