"""Checkpoints that cannot be read: one clear error that names the file."""

from __future__ import annotations

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
from support.refusals import METHOD, refuses, run
from support.tiny_models import Pair, edit_json, fine_tune, load_tensors, make_model, save_model, tiny_config, to_bin
from transformers import AutoModelForCausalLM

from impart_hf import ImPartConfig, compress
from impart_hf.modeling.checkpoints import Checkpoint, CheckpointError, HubOptions


def test_missing_models(pair: Pair, tmp_path: Path) -> None:
    refuses(Pair(tmp_path / "gone", pair.finetuned), CheckpointError, "gone' is neither a local folder nor")
    refuses(Pair(pair.base, tmp_path / "gone"), CheckpointError, "gone' is neither a local folder nor")


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
    shard(folder, lambda index: shutil.copy(folder / "model-1.safetensors", folder / "model-2.safetensors"))


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
    "spoil, match",
    [
        (spoil_config, "config.json is not readable JSON"),
        (spoil_config_type, "config.json does not hold a JSON object"),
        (spoil_config_depth, "config.json is not readable JSON"),
        (lose_config, "has no config.json: it is not a transformers checkpoint"),
        (lose_weights, "has none of the weight files"),
        (truncate_header, "cannot be read as a weight file"),
        (truncate_data, "cannot be read as a weight file"),
        (empty_file, "cannot be read as a weight file"),
        (spoil_header, "cannot be read as a weight file"),
        (index_of_missing_file, "names the weight file model-2.safetensors, but does not have it"),
        (index_of_missing_tensor, "the index names ghost, which no weight file holds"),
        (index_without_map, "holds no valid weight_map"),
        (index_empty, "holds no valid weight_map"),
        (index_of_lists, "holds no valid weight_map"),
        (index_outside, "holds no valid weight_map"),
        (same_tensor_in_two_files, "stands in two weight files"),
        (index_of_json_file, "config.json cannot be read as a weight file"),
        (quantised, "is a quantised checkpoint; only float weights have a delta"),
        (truncated_bin, "pytorch_model.bin cannot be read as a weight file"),
        (old_truncated_bin, "pytorch_model.bin cannot be read as a weight file"),
        (bin_of_something_else, "does not hold a dictionary of dense tensors"),
        (bin_of_numbers, "does not hold a dictionary of dense tensors"),
        (bin_of_sparse_tensors, "does not hold a dictionary of dense tensors"),
        (bin_of_text, "pytorch_model.bin cannot be read as a weight file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_checkpoints_that_cannot_be_read(pair: Pair, spoil: Callable[[Path], None], match: str, side: str) -> None:
    spoil(getattr(pair, side))
    assert str(getattr(pair, side)) in refuses(pair, CheckpointError, match)


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
    refuses(pair, CheckpointError, "pytorch_model.bin cannot be read as a weight file")
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
    match = "is a delta repository; make it dense with `impart-hf reconstruct` first"
    refuses(Pair(pair.base, tiny_repository), CheckpointError, match)
    with pytest.raises(CheckpointError, match=match):
        compress(str(tiny_repository), str(pair.finetuned), pair.base.parent / "delta", METHOD)


def test_offline_and_not_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'config.json' of 'someone/else' is not in the local cache"):
        Checkpoint("someone/else", HubOptions(cache_dir=str(tmp_path), local_files_only=True))


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
