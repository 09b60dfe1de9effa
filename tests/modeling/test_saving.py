"""Saving a delta's model keeps what the user put into the folder and what the user set, as saving any model does."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.loaded_models import IDS, captured_log, load, logits
from support.messages import naming
from support.tiny_models import Pair, edit_json, fine_tune, same_files, save_model, save_pair, tiny_config
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedModel, pipeline

from impart_hf import LowRankConfig, compress

pytestmark = pytest.mark.usefixtures("seeded")
ARCHITECTURES = (
    *("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "helium", "mixtral"),
    *("gpt-oss", "gpt-neox", "mamba"),
)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# What the user put into the folder ----------------------------------------------------------------------------------


def test_a_tokenizer_that_was_saved_first(model: PreTrainedModel, tiny_repository: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_repository)
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(tmp_path / "out")
    mine = contents(tmp_path / "out")
    for name in ("README.md", "LICENSE", "notes/of/mine.txt"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(mine.setdefault(name, b"mine").decode())
    model.save_pretrained(tmp_path / "out")
    found, source = contents(tmp_path / "out"), contents(tiny_repository)
    assert {name: found[name] for name in mine} == mine
    assert "chat_template.jinja" in source and "chat_template.jinja" not in found, "a tokenizer without a template"
    own = {name for name in source if name.startswith("delta_model") or name.endswith((".py", "config.json"))}
    assert {name: found[name] for name in own - mine.keys()} == {name: source[name] for name in own - mine.keys()}
    assert set(found) <= set(source) | set(mine)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template is None and len(again) == len(tokenizer)
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_over_another_delta(model: PreTrainedModel, tiny_pair: Pair, tiny_repository: Path, tmp_path: Path) -> None:
    """Neither its shards nor its index are left to be read in place of the new file, nor the other way round."""
    sharded = tmp_path / "sharded"
    compress(
        str(tiny_pair.base),
        str(tiny_pair.finetuned),
        sharded,
        LowRankConfig(compression_ratio=5),
        max_shard_size="40KB",
    )
    assert len(list(sharded.glob("delta_model-*"))) > 1
    other = load(sharded)
    for saved, source in ((model, tiny_repository), (other, sharded), (model, tiny_repository)):
        saved.save_pretrained(tmp_path / "out")
        names = {p.name for p in (tmp_path / "out").glob("delta_model*")}
        assert names == {p.name for p in source.glob("delta_model*")}
        assert torch.equal(logits(load(tmp_path / "out")), logits(saved))


def test_more_chat_templates(repository: Path, tmp_path: Path) -> None:
    (repository / "additional_chat_templates").mkdir()
    (repository / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    load(repository).save_pretrained(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(repository)


# What the user set --------------------------------------------------------------------------------------------------


def changed_fields(folder: Path, other: Path) -> dict[str, Any]:
    """The fields of text_config that two repositories do not share, with the first one's values."""
    one, two = (json.loads((f / "config.json").read_text()) for f in (folder, other))
    fields, others = one.pop("text_config"), two.pop("text_config")
    assert one == two
    missing = dict.fromkeys(others.keys() - fields.keys())
    return {name: value for name, value in fields.items() if name not in others or others[name] != value} | missing


def test_changed_configurations(model: PreTrainedModel, tiny_repository: Path, tmp_path: Path) -> None:
    model.config.eos_token_id = 5
    model.config.use_cache = False
    model.config.note_of_mine = {"a": 1}
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "out")
    fields = {"eos_token_id": 5, "use_cache": False, "note_of_mine": {"a": 1}}
    assert changed_fields(tmp_path / "out", tiny_repository) == fields
    again = load(tmp_path / "out")
    assert again.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path / "out")}
    assert again.generation_config.max_new_tokens == 7
    source, found = contents(tiny_repository), contents(tmp_path / "out")
    differ = {name for name in source if source[name] != found[name]}
    assert differ == {"config.json", "generation_config.json"}
    again.save_pretrained(tmp_path / "twice")
    assert same_files(tmp_path / "out", tmp_path / "twice")
    again.generation_config = GenerationConfig.from_pretrained(tiny_repository)
    again.config = load(tiny_repository).config
    again.save_pretrained(tmp_path / "out")
    assert changed_fields(tmp_path / "out", tiny_repository) == {}, "changes are undone in the same way"


def test_using_a_model_sets_nothing(model: PreTrainedModel, tiny_repository: Path, tmp_path: Path) -> None:
    model.generate(IDS, max_new_tokens=2, do_sample=True, top_k=3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_repository)
    pipeline("text-generation", model=model, tokenizer=tokenizer)("A fine", max_new_tokens=3)
    model.gradient_checkpointing_enable()
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path / "out")
    assert same_files(tiny_repository, tmp_path / "out")


def test_into_the_folder_that_it_came_from(repository: Path, tmp_path: Path) -> None:
    before = contents(repository)
    loaded = load(repository)
    loaded.config.eos_token_id = 5
    loaded.save_pretrained(repository)
    after = contents(repository)
    assert {name for name in before if before[name] != after[name]} == {"config.json"} and after.keys() == before.keys()
    assert load(repository).config.eos_token_id == 5


def test_arguments_of_loading_are_changes(tiny_repository: Path, tmp_path: Path) -> None:
    load(tiny_repository, use_cache=False, dtype=torch.float32, attn_implementation="eager").save_pretrained(tmp_path)
    assert changed_fields(tmp_path, tiny_repository) == {"use_cache": False}


def test_tied_by_an_argument(tiny_repository: Path, tmp_path: Path) -> None:
    """The delta is of an untied model; what is saved must still be."""
    model = load(tiny_repository, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(tiny_repository)))


def test_other_fields_keep_the_notation_of_old(repository: Path, tmp_path: Path) -> None:
    content = json.loads((repository / "config.json").read_text())
    rope = {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    fields = {k: v for k, v in content["text_config"].items() if k not in ("rope_parameters", "dtype")}
    edit_json(repository / "config.json", text_config={**fields, **rope, "torch_dtype": "bfloat16"})
    loaded = load(repository)
    loaded.save_pretrained(tmp_path / "same")
    assert same_files(repository, tmp_path / "same")
    loaded.config.eos_token_id = 5
    loaded.save_pretrained(tmp_path / "out")
    assert changed_fields(tmp_path / "out", repository) == {"eos_token_id": 5}
    loaded.config.rope_parameters = {**loaded.config.rope_parameters, "factor": 4.0}
    loaded.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out")
    assert (
        again.config.rope_parameters == loaded.config.rope_parameters and again.config.rope_parameters["factor"] == 4.0
    )


def test_settings_that_transformers_does_not_save(model: PreTrainedModel, tmp_path: Path) -> None:
    model.generation_config.update(do_sample=False, temperature=0.6)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match=naming("temperature")):
        model.save_pretrained(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_no_architecture_changes_by_loading(kind: str, tmp_path: Path) -> None:
    pair = save_pair(tmp_path, tiny_config(kind))
    compress(str(pair.base), str(pair.finetuned), tmp_path / "delta", LowRankConfig(compression_ratio=3))
    load(tmp_path / "delta", dtype=torch.float32, attn_implementation="eager").save_pretrained(tmp_path / "out")
    assert same_files(tmp_path / "delta", tmp_path / "out")
    (tmp_path / "delta" / "generation_config.json").unlink()
    load(tmp_path / "delta").save_pretrained(tmp_path / "without")
    assert same_files(tmp_path / "delta", tmp_path / "without")


@pytest.mark.parametrize("revision", [None, "0123456"])
def test_the_base_by_its_published_name(
    model: PreTrainedModel, tiny_repository: Path, tmp_path: Path, revision: str | None
) -> None:
    model.delta_config.base_model_name_or_path = "org/base"
    model.delta_config.base_model_revision = revision
    model.save_pretrained(tmp_path / "out")
    before, after = (json.loads((f / "config.json").read_text()) for f in (tiny_repository, tmp_path / "out"))
    assert after == before | {"base_model_name_or_path": "org/base", "base_model_revision": revision}


def test_a_commit_of_another_base_is_not_kept(repository: Path, tmp_path: Path) -> None:
    base = json.loads((repository / "config.json").read_text())["base_model_name_or_path"]
    edit_json(repository / "config.json", base_model_revision="0123456")
    loaded = load(repository, base_model=base)
    loaded.save_pretrained(tmp_path / "same")
    assert same_files(repository, tmp_path / "same")
    loaded.delta_config.base_model_name_or_path = "org/base"
    loaded.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["base_model_revision"] is None


# Where it came from -------------------------------------------------------------------------------------------------


def other_delta(pair: Pair, folder: Path) -> None:
    shutil.rmtree(folder)
    tuned = fine_tune(load(pair.finetuned))
    other = save_model(tuned, folder.with_name("other"))
    compress(str(pair.base), str(other), folder, LowRankConfig(compression_ratio=5))


def same_deltas_of_another_dtype(pair: Pair, folder: Path) -> None:
    edit_json(folder / "config.json", tensor_dtype="float16")


def dense_model(pair: Pair, folder: Path) -> None:
    load(pair.finetuned).save_pretrained(folder)


def no_delta_file(pair: Pair, folder: Path) -> None:
    (folder / "delta_model.safetensors").unlink()


def cut_short(pair: Pair, folder: Path) -> None:
    data = (folder / "delta_model.safetensors").read_bytes()
    (folder / "delta_model.safetensors").write_bytes(data[:-9])


@pytest.mark.parametrize("replace", [other_delta, same_deltas_of_another_dtype, dense_model, no_delta_file, cut_short])
@pytest.mark.parametrize("into", ["elsewhere", "itself"])
def test_a_source_that_holds_something_else_now(
    tiny_pair: Pair, repository: Path, tmp_path: Path, replace: Callable[[Pair, Path], None], into: str
) -> None:
    loaded = load(repository)
    expected = logits(loaded)
    replace(tiny_pair, repository)
    target = repository if into == "itself" else tmp_path / "out"
    twin = pickle.loads(pickle.dumps(loaded))
    for each in (loaded, twin):
        with captured_log() as lines:
            each.save_pretrained(target)
        assert len(lines) == 1 and str(repository) in lines[0] and "dense" in lines[0]
        saved = load(target)
        assert type(saved) is LlamaForCausalLM and torch.equal(logits(saved), expected)


def test_new_files_beside_the_same_delta_are_no_change(repository: Path, tmp_path: Path) -> None:
    loaded = load(repository)
    (repository / "NOTES.md").write_text("mine")
    edit_json(repository / "config.json", base_model_revision="main")
    loaded.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "delta_model.safetensors").exists() and (tmp_path / "out" / "NOTES.md").exists()


def test_an_adapter_on_changed_weights(model: PreTrainedModel, tmp_path: Path) -> None:
    """It is saved alone, as for any model, so that the change would be lost without a word."""
    peft = pytest.importorskip("peft")
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    model.add_adapter(peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    with captured_log() as lines:
        model.save_pretrained(tmp_path / "adapter")
    assert len(lines) == 1 and "only the adapter is saved" in lines[0]
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


# A full disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """Lets the kernel refuse files of more bytes than given."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk(
    model: PreTrainedModel, repository: Path, tmp_path: Path, full_disk: Callable[[int], None], exists: bool
) -> None:
    target = tmp_path / "out"
    if exists:
        shutil.copytree(repository, target)
        edit_json(target / "config.json", note="what was there before")
        (target / "tokenizer.json").unlink()
    before = contents(target)
    model.config.eos_token_id = 5
    full_disk(60_000)
    with pytest.raises(OSError, match=naming(target)):
        model.save_pretrained(target)
    full_disk(resource.RLIM_INFINITY)
    assert contents(target) == before and target.exists() == exists
    assert not [p for p in tmp_path.rglob(".*") if p.name != "."], "no temporary files are left"
    model.save_pretrained(target)
    assert load(target).config.eos_token_id == 5
    assert (
        load_file(target / "delta_model.safetensors").keys() == load_file(repository / "delta_model.safetensors").keys()
    )
    assert os.access(target / "config.json", os.R_OK)
