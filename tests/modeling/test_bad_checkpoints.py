"""Checkpoints that cannot be read: one clear error that names the file."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.messages import naming
from support.refusals import METHOD, refuses, run
from support.tiny_models import Pair, edit_json, fine_tune, load_tensors, make_model, save_model, tiny_config, to_bin
from transformers import AutoModelForCausalLM

from impart_hf import ImPartConfig, compress
from impart_hf.adapters.adapter_files import find_adapter
from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.modeling.delta_record import DeltaFormatError
from impart_hf.modeling.model_files import CheckpointError, HubOptions, fetch_file, pinned


def test_missing_models(pair: Pair, tmp_path: Path) -> None:
    refuses(Pair(tmp_path / "gone", pair.finetuned), CheckpointError, naming(tmp_path / "gone"))
    refuses(Pair(pair.base, tmp_path / "gone"), CheckpointError, naming(tmp_path / "gone"))


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def spoil_config_type(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def spoil_config_depth(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncate_header(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:100])


def truncate_data(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def empty_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def spoil_header(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[20:24] = b"\xff\x00{{"
    (folder / "model.safetensors").write_bytes(data)


def shard(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """A checkpoint of two files, its index edited."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in (0, 1):
        filename = f"model-{number + 1}.safetensors"
        part = {n: tensors[n] for n in names[number::2]}
        save_file(part, folder / filename)
        weight_map.update(dict.fromkeys(part, filename))
    index = {"weight_map": weight_map}
    edit(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def copy_into_second_file(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Two files that both have the norm; the index names one of them."""
    shard(folder, lambda index: None)
    paths = [folder / f"model-{number}.safetensors" for number in (1, 2)]
    tensors = [load_file(path) for path in paths]
    has = next(n for n in (0, 1) if "model.norm.weight" in tensors[n])
    tensors[1 - has]["model.norm.weight"] = change(tensors[has]["model.norm.weight"])
    paths[1 - has].unlink()
    save_file(tensors[1 - has], paths[1 - has])


def index_of_missing_file(folder: Path) -> None:
    shard(folder, lambda index: (folder / "model-2.safetensors").unlink())


def index_of_missing_tensor(folder: Path) -> None:
    shard(folder, lambda index: index["weight_map"].update(ghost="model-1.safetensors"))


def index_without_map(folder: Path) -> None:
    shard(folder, lambda index: index.pop("weight_map"))


def index_empty(folder: Path) -> None:
    shard(folder, lambda index: index.update(weight_map={}))


def index_of_lists(folder: Path) -> None:
    shard(folder, lambda index: index.update(weight_map={"a": ["model-1.safetensors"]}))


def index_outside(folder: Path) -> None:
    shard(folder, lambda index: index["weight_map"].update(ghost="../base/model-1.safetensors"))


def same_tensor_in_two_files(folder: Path) -> None:
    """With other values in each; equal copies are harmless."""
    copy_into_second_file(folder, lambda tensor: tensor + 1)


def index_of_json_file(folder: Path) -> None:
    shard(folder, lambda index: index["weight_map"].update(ghost="config.json"))


def quantised(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def truncated_bin(folder: Path) -> None:
    to_bin(folder)
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])


def old_truncated_bin(folder: Path) -> None:
    to_bin(folder, zipped=False)
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])


def bin_of_something_else(folder: Path) -> None:
    lose_weights(folder)
    torch.save({"model": {"a": torch.zeros(3)}}, folder / "pytorch_model.bin")


def bin_of_numbers(folder: Path) -> None:
    lose_weights(folder)
    torch.save({1: torch.zeros(3)}, folder / "pytorch_model.bin")


def bin_of_sparse_tensors(folder: Path) -> None:
    lose_weights(folder)
    torch.save({"a": torch.eye(3).to_sparse()}, folder / "pytorch_model.bin")


def bin_of_text(folder: Path) -> None:
    lose_weights(folder)
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize(
    "spoil, names",
    [
        (spoil_config, ("config.json", "JSON")),
        (spoil_config_type, ("config.json", "JSON object")),
        (spoil_config_depth, ("config.json", "JSON")),
        (lose_config, "config.json"),
        (lose_weights, ("model.safetensors", "pytorch_model.bin")),
        (truncate_header, ("model.safetensors", "weight file")),
        (truncate_data, ("model.safetensors", "weight file")),
        (empty_file, ("model.safetensors", "weight file")),
        (spoil_header, ("model.safetensors", "weight file")),
        (index_of_missing_file, "model-2.safetensors"),
        (index_of_missing_tensor, ("index", "ghost")),
        (index_without_map, ("model.safetensors.index.json", "weight_map")),
        (index_empty, ("model.safetensors.index.json", "weight_map")),
        (index_of_lists, ("model.safetensors.index.json", "weight_map")),
        (index_outside, ("model.safetensors.index.json", "weight_map")),
        (same_tensor_in_two_files, ("tensor", "two weight files")),
        (index_of_json_file, ("config.json", "weight file")),
        (quantised, "quantised"),
        (truncated_bin, ("pytorch_model.bin", "weight file")),
        (old_truncated_bin, ("pytorch_model.bin", "weight file")),
        (bin_of_something_else, ("pytorch_model.bin", "dictionary")),
        (bin_of_numbers, ("pytorch_model.bin", "dictionary")),
        (bin_of_sparse_tensors, ("pytorch_model.bin", "dictionary")),
        (bin_of_text, ("pytorch_model.bin", "weight file")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_checkpoints_that_cannot_be_read(pair: Pair, spoil: Callable[[Path], None], names: Any, side: str) -> None:
    spoil(getattr(pair, side))
    assert str(getattr(pair, side)) in refuses(pair, CheckpointError, naming(names))


def test_equal_copies_in_two_files(pair: Pair, tmp_path: Path) -> None:
    expected = load_tensors(pair.finetuned)["model.norm.weight"]
    for folder in (pair.base, pair.finetuned):
        copy_into_second_file(folder, torch.Tensor.clone)
    run(pair, tmp_path / "delta")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "delta").model.norm.weight, expected)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_an_index_that_names_what_no_file_need_hold(tmp_path: Path, name: str) -> None:
    """A tied output projection, or a buffer of old."""
    folder = save_model(make_model(tiny_config("llama-tied")), tmp_path / "model")
    names = load_tensors(folder).keys()
    shard(folder, lambda index: index["weight_map"].update({name: "model-1.safetensors"}))
    assert set(Checkpoint(str(folder), HubOptions()).names()) == names
    if name == "lm_head.weight":
        edit_json(folder / "config.json", tie_word_embeddings=False)
        with pytest.raises(CheckpointError, match=naming("index", name)):
            Checkpoint(str(folder), HubOptions())


class Malice:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("how", ["torch", "old torch", "pickle"])
@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_a_malicious_pickle_is_not_executed(pair: Pair, tmp_path: Path, how: str, side: str) -> None:
    folder = getattr(pair, side)
    lose_weights(folder)
    evil = {"a": torch.zeros(3), "b": Malice(tmp_path / "executed")}
    if how == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malice(tmp_path / "executed")))
    else:
        torch.save(evil, folder / "pytorch_model.bin", _use_new_zipfile_serialization=how == "torch")
    refuses(pair, CheckpointError, naming("pytorch_model.bin", "weight file"))
    assert not (tmp_path / "executed").exists()


def test_parameters_in_a_bin_file(pair: Pair, tmp_path: Path) -> None:
    """Parameters ask for gradients; a delta has none."""
    for folder in (pair.base, pair.finetuned):
        tensors = load_file(folder / "model.safetensors")
        lose_weights(folder)
        torch.save({n: torch.nn.Parameter(t) for n, t in tensors.items()}, folder / "pytorch_model.bin")
    run(pair, tmp_path / "delta", ImPartConfig(4))
    assert (tmp_path / "delta" / "config.json").exists()


def test_a_delta_repository_is_no_fine_tune(pair: Pair, tiny_repository: Path) -> None:
    """And no base, if it is not exact: see test_chains.py."""
    match = naming(tiny_repository, "delta repository", "impart-hf reconstruct")
    refuses(Pair(pair.base, tiny_repository), CheckpointError, match)
    with pytest.raises(DeltaFormatError, match=naming(tiny_repository, "--method exact", "impart-hf reconstruct")):
        compress(str(tiny_repository), str(pair.finetuned), pair.base.parent / "delta", METHOD)


def test_offline_and_not_in_the_cache(tmp_path: Path) -> None:
    options = HubOptions(cache_dir=str(tmp_path), local_files_only=True)
    for open_it in (Checkpoint, find_adapter, pinned):  # the first that a command calls
        with pytest.raises(CheckpointError, match=naming("'someone/else'", "cache")) as caught:
            open_it("someone/else", options)
        assert "config.json" not in str(caught.value)  # which such a repository need not have
    with pytest.raises(CheckpointError, match=naming("'tokenizer.json'", "'someone/else'", "cache")):
        fetch_file("someone/else", "tokenizer.json", options)


def test_a_fine_tune_in_other_precision_than_its_base(tmp_path: Path) -> None:
    """Not bad input at all: bfloat16 base, float32 fine-tune, and the other way round."""
    base = make_model(tiny_config("llama"))
    tuned = fine_tune(base)
    save_model(base, tmp_path / "base")
    save_model(tuned.float(), tmp_path / "finetuned")
    for one, other in (("base", "finetuned"), ("finetuned", "base")):
        compress(str(tmp_path / one), str(tmp_path / other), tmp_path / "delta", METHOD)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
        for name, tensor in load_tensors(tmp_path / other).items():
            ours = model.state_dict()[name]
            assert ours.dtype == tensor.dtype and (ours - tensor).norm() <= 0.1 * tensor.norm(), name


def put(folder: Path, kind: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write weights in one of the ways that transformers writes or wrote them."""
    files, suffix = kind.split()
    stem, write = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    if files == "one":
        write(tensors, folder / f"{stem}.{suffix}")
        return
    names, weight_map = sorted(tensors), {}
    for number in (1, 2):
        part = {name: tensors[name] for name in names[number - 1 :: 2]}
        write(part, folder / f"{stem}-{number:05}-of-00002.{suffix}")
        weight_map |= dict.fromkeys(part, f"{stem}-{number:05}-of-00002.{suffix}")
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


KINDS = ("one safetensors", "two safetensors", "one bin", "two bin")


@pytest.mark.parametrize("kinds", [pair for n in (2, 4) for pair in itertools.combinations(KINDS, n)], ids=str)
def test_of_two_sets_of_weights_the_one_that_transformers_loads(
    pair: Pair, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    shutil.copyfile(pair.base / "config.json", folder / "config.json")
    tensors = load_tensors(pair.base)
    for number, kind in enumerate(kinds, 1):
        put(folder, kind, {name: torch.full_like(tensor, number) for name, tensor in tensors.items()})
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    opened = Checkpoint(str(folder), HubOptions())
    assert opened.names() == sorted(loaded)
    assert all(torch.equal(opened.tensor(name), tensor) for name, tensor in loaded.items())


def test_shards_beside_a_single_file_may_be_gone(pair: Pair) -> None:
    """`save_pretrained` removes the shards of an earlier save, and leaves their index."""
    before = Checkpoint(str(pair.finetuned), HubOptions()).names()
    (pair.finetuned / "model.safetensors.index.json").write_text('{"weight_map": {"gone": "model-1.safetensors"}}')
    assert Checkpoint(str(pair.finetuned), HubOptions()).names() == before


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model.gguf"])
def test_weights_of_another_name_are_named(pair: Pair, name: str) -> None:
    (pair.finetuned / "model.safetensors").rename(pair.finetuned / name)
    refuses(pair, CheckpointError, naming(pair.finetuned, name))


def test_a_broken_link_is_named(pair: Pair) -> None:
    (pair.finetuned / "model.safetensors").unlink()
    (pair.finetuned / "model.safetensors").symlink_to("gone")
    refuses(pair, CheckpointError, naming(pair.finetuned, "model.safetensors", "broken link"))
