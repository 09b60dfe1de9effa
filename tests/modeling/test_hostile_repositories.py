"""Delta repositories with hostile configurations or sets of files, and bases that are not theirs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from support.forged_files import DELTA, NORM, UP, forge_record, replace
from support.hostile import refuses, refuses_or_is_the_same
from support.loaded_models import decode_all
from support.messages import naming
from support.tiny_models import Pair, edit_json, edit_tensors, load_tensors
from transformers import AutoModelForCausalLM

from impart_hf import LowRankConfig, compress
from impart_hf.modeling.checkpoints import CheckpointError
from impart_hf.modeling.delta_record import DeltaFormatError
from impart_hf.modeling.delta_repository import WrongBaseError

pytestmark = pytest.mark.usefixtures("little_memory")


# --- hostile configurations


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config": None},
        {"text_config": {}},
        {"text_config": {"model_type": "transformer-of-tomorrow"}},
        {"text_config": {"model_type": 7}},
        {"text_config": {"model_type": "delta_compressed"}},
        {"text_config": [1]},
        {"text_config": "llama"},
        {"format_version": 2},
        {"format_version": "1"},
        {"format_version": 0},
        {"tensor_dtype": "float99"},
        {"tensor_dtype": "Tensor"},
        {"tensor_dtype": "int8"},
        {"tensor_dtype": "__name__"},
        {"tensor_dtype": 7},
        {"tensor_dtype_exceptions": {UP: "uint8"}},
        {"tensor_dtype_exceptions": {UP: 3}},
        {"tensor_dtype_exceptions": [UP]},
        {"absent_tensors": [UP]},
        {"absent_tensors": UP},
        {"absent_tensors": [7]},
        {"row_counts": {UP: 0}},
        {"row_counts": {UP: -1}},
        {"row_counts": {UP: 1}},
        {"row_counts": {UP: 1 << 40}},
        {"row_counts": {UP: 1.5}},
        {"row_counts": {"ghost": 5}},
        {"row_counts": [UP]},
        {"base_tensors": {UP: "ghost"}},
        {"base_tensors": {UP: NORM}},
        {"base_tensors": {"extra": NORM}},
        {"base_tensors": {UP: 7}},
        {"base_tensors": [UP]},
        {"base_model_name_or_path": ""},
        {"base_model_name_or_path": 7},
        {"base_model_name_or_path": "../../etc"},
        {"base_model_name_or_path": "/nowhere/at/all"},
        {"base_model_revision": 7},
        {"model_type": "llama"},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_hostile_configurations(repository: Path, changes: dict[str, Any]) -> None:
    edit_json(repository / "config.json", **changes)
    # A value of the wrong type is refused by transformers' own strict dataclasses, as in any model's configuration.
    refuses(repository, ".", (ValueError, CheckpointError, StrictDataclassError))
    if "model_type" not in changes:
        with pytest.raises((ValueError, CheckpointError, StrictDataclassError)):
            AutoModelForCausalLM.from_pretrained(repository)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 50_000])
def test_configurations_that_are_none(repository: Path, text: str) -> None:
    (repository / "config.json").write_text(text)
    refuses(repository, "config.json", CheckpointError)


# --- hostile sets of files


@pytest.fixture
def sharded(tiny_pair: Pair, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), folder, LowRankConfig(3), max_shard_size="30KB")
    assert len(shards(folder)) > 2
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("delta_model-*.safetensors"))


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / f"{DELTA}.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "..", ".", "", "sub/x", None, 7, ["x"], {"x": 1}], ids=lambda name: repr(name)
)
def test_index_that_leads_elsewhere(sharded: Path, name: Any) -> None:
    (sharded.parent / "x").write_bytes(shards(sharded)[0].read_bytes())
    edit_index(sharded, lambda index: index["weight_map"].update({f"{UP}.delta": name}))
    refuses(sharded, naming(f"{DELTA}.index.json", "weight_map"))


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 7])
def test_index_without_a_map(sharded: Path, weight_map: Any) -> None:
    edit_index(sharded, lambda index: index.update(weight_map=weight_map))
    refuses(sharded, naming(f"{DELTA}.index.json", "weight_map"))


def test_index_that_lost_a_file(sharded: Path) -> None:
    """Without its entries, a third of the tensors would pass for the base's."""
    first = shards(sharded)[0].name
    edit_index(
        sharded, lambda index: index.update(weight_map={k: v for k, v in index["weight_map"].items() if v != first})
    )
    refuses(sharded, rf"checksums|{DELTA}\.index\.json")


def test_index_that_lost_or_gained_an_entry(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].pop(f"{UP}.delta"))
    refuses(sharded, naming(f"{DELTA}.index.json", "entries"))
    last = shards(sharded)[-1].name
    edit_index(sharded, lambda index: index["weight_map"].update({f"{UP}.delta": last, "ghost": last}))
    refuses(sharded, naming(f"{DELTA}.index.json", "entries"))


def test_missing_and_mixed_files(sharded: Path) -> None:
    *_, other, last = shards(sharded)
    data = last.read_bytes()
    last.unlink()
    refuses(sharded, naming(sharded, last.name, f"{DELTA}.index.json"), CheckpointError)
    last.symlink_to("nowhere")
    refuses(sharded, naming(sharded, last.name, f"{DELTA}.index.json"), CheckpointError)
    last.unlink()
    last.mkdir()
    refuses(sharded, naming(sharded, last.name, f"{DELTA}.index.json"), CheckpointError)
    last.rmdir()
    shutil.copy(other, last)
    refuses(sharded, naming("entry", "two files"))
    last.write_bytes(data)
    assert decode_all(sharded)


def test_links(repository: Path, tiny_tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """A link to a good file is what the Hub's cache is made of; one to itself or to a folder is a missing file."""
    delta = repository / DELTA
    delta.rename(tmp_path / "blob")
    delta.symlink_to(tmp_path / "blob")
    assert refuses_or_is_the_same(repository, tiny_tensors) is False
    for target in (DELTA, "..", "/dev/null/x"):
        delta.unlink()
        delta.symlink_to(target)
        refuses(repository, naming(repository, DELTA), CheckpointError)


# --- another base


def test_another_base(repository: Path, tiny_pair: Pair, tmp_path: Path) -> None:
    base = tmp_path / "base"
    for name in load_tensors(tiny_pair.base):
        shutil.copytree(tiny_pair.base, base)
        edit_tensors(base, lambda t, name=name: t[name].view(torch.int16).view(-1)[-1:].bitwise_xor_(1))
        with pytest.raises(WrongBaseError, match=naming(base, repository, name)):
            decode_all(repository, str(base))
        shutil.rmtree(base)


def test_a_base_of_other_names_or_shapes(repository: Path, tiny_pair: Pair, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_pair.base, tmp_path / "base"))
    edit_tensors(base, lambda t: t.update({NORM: torch.ones(32, dtype=torch.bfloat16)}))
    with pytest.raises((WrongBaseError, DeltaFormatError), match=naming(NORM)):
        decode_all(repository, str(base))
    edit_tensors(base, lambda t: t.pop(NORM))
    with pytest.raises(WrongBaseError, match=naming(base, repository, "tensors")):
        decode_all(repository, str(base))


def test_errors_reach_the_caller_of_from_pretrained(repository: Path, tiny_pair: Pair, tmp_path: Path) -> None:
    original = (repository / DELTA).read_bytes()
    forge_record(repository, lambda data: data[:-2] + b"\xff\xff")
    with pytest.raises(DeltaFormatError, match=naming(UP, "value", "finite")):
        AutoModelForCausalLM.from_pretrained(repository)
    damaged = bytearray(original)
    damaged[-100] ^= 1
    replace(repository / DELTA, damaged)
    with pytest.raises(DeltaFormatError, match=naming(repository / DELTA, "CRC-32")):
        AutoModelForCausalLM.from_pretrained(repository)
    replace(repository / DELTA, original)
    base = Path(shutil.copytree(tiny_pair.base, tmp_path / "base"))
    edit_tensors(base, lambda t: t[UP][3:4].add_(1))
    with pytest.raises(WrongBaseError, match=naming(base, repository, UP)):
        AutoModelForCausalLM.from_pretrained(repository, base_model=str(base))
    assert AutoModelForCausalLM.from_pretrained(repository).delta_config.format_version == 1
