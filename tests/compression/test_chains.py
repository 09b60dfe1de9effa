"""Compressing against a delta, and flattening what comes of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import save_adapter
from support.chains import chain_of, checkpoints
from support.loaded_models import decode_all, load
from support.messages import naming
from support.tiny_models import Pair, edit_json, load_tensors
from support.workspaces import differing, finished, hidden

from impart_hf import ExactConfig, LowRankConfig, compress, flatten
from impart_hf.common.files import OutputError
from impart_hf.compression import exact_tensors
from impart_hf.compression import pair as pair_module
from impart_hf.lora.export import export_lora
from impart_hf.modeling.delta_record import DeltaFormatError
from impart_hf.modeling.delta_repository import WrongBaseError
from impart_hf.modeling.model_files import CheckpointError, HubOptions
from impart_hf.repository.open import open_repository
from impart_hf.repository.reconstruct import reconstruct


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """A model with three checkpoints of its training, and their deltas; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    models = checkpoints(folder, 3)
    edit_json(models[3] / "config.json", rope_theta=5000.0)
    (models[3] / "README.md").write_text("---\nlicense: apache-2.0\n---\nThe last step.\n")
    (models[3] / "chat_template.jinja").write_text("{{ messages }}")
    return models, chain_of(folder, models)


def as_dense(delta: Path, folder: Path) -> Path:
    reconstruct(open_repository(str(delta), HubOptions()), folder)
    return folder


def config_of(delta: Path) -> dict[str, Any]:
    return json.loads((delta / "config.json").read_text("utf-8"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Against a delta ------------------------------------------------------------------------------------------------------


def test_base_and_length_are_stated(trained: tuple[list[Path], list[Path]]) -> None:
    models, deltas = trained
    first, last = config_of(deltas[0]), config_of(deltas[2])
    assert first["base_model_name_or_path"] == str(models[0]) and "base_is_delta" not in first
    assert last["base_model_name_or_path"] == str(deltas[1]) and last["base_is_delta"] is True
    assert last["base_model_revision"] is None and last["text_config"]["rope_theta"] == 5000.0
    card = (deltas[2] / "README.md").read_text()
    assert f"base model `{deltas[1].name}`" in card and "chain of 3 deltas" in card
    assert "chain of" not in (deltas[0] / "README.md").read_text()


def test_base_name(trained: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    models, deltas = trained
    compress(str(deltas[1]), str(models[3]), tmp_path / "delta", ExactConfig(), base_name="me/step-2")
    assert config_of(tmp_path / "delta")["base_model_name_or_path"] == "me/step-2"
    assert "base_model: me/step-2" in (tmp_path / "delta" / "README.md").read_text().splitlines()
    assert same(decode_all(tmp_path / "delta", str(deltas[1])), load_tensors(models[3]))


def test_lossy_delta_of_a_delta(trained: tuple[list[Path], list[Path]], tiny_pair: Pair, tmp_path: Path) -> None:
    """The last link may be of any method, and is then no base of another."""
    _, deltas = trained
    report = compress(str(deltas[1]), str(tiny_pair.finetuned), tmp_path / "last", LowRankConfig(compression_ratio=3))
    assert report.ratio >= 3 and type(load(tmp_path / "last").merge_and_unload()).__name__ == "LlamaForCausalLM"
    with pytest.raises(DeltaFormatError, match=naming(str(tmp_path / "last"), "exact", "reconstruct")):
        compress(str(tmp_path / "last"), str(tiny_pair.base), tmp_path / "next", ExactConfig())
    assert not (tmp_path / "next").exists()


def test_adapter_on_a_delta(trained: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    """Trained on what the delta stands for, whichever of its names the adapter has."""
    import peft

    models, deltas = trained
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["up_proj"])
    for number, base in enumerate((models[2], deltas[1])):
        adapter = save_adapter(base, config, tmp_path / f"adapter-{number}")
        compress(str(deltas[1]), str(adapter), tmp_path / f"delta-{number}", ExactConfig())
    one, other = (decode_all(tmp_path / f"delta-{number}") for number in (0, 1))
    assert same(one, other) and not same(one, load_tensors(models[2]))


@pytest.mark.parametrize("link", [0, 1, 2])
def test_output_that_is_a_link(link: int, trained: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    models, deltas = trained
    copies = [Path(shutil.copytree(delta, tmp_path / delta.name)) for delta in deltas]
    for below, delta in zip(copies, copies[1:], strict=False):
        edit_json(delta / "config.json", base_model_name_or_path=str(below))
    with pytest.raises(OutputError, match=naming(str(copies[link]))):
        compress(str(copies[2]), str(models[1]), copies[link], ExactConfig())
    assert same(decode_all(copies[2]), load_tensors(models[3]))


def test_damaged_base(trained: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    models, deltas = trained
    base = Path(shutil.copytree(deltas[0], tmp_path / "base"))
    edit_json(base / "config.json", base_model_name_or_path=str(models[2]))
    with pytest.raises(WrongBaseError, match=naming(str(models[2]), str(base))):
        compress(str(base), str(models[3]), tmp_path / "delta", ExactConfig())
    edit_json(base / "config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match=naming(str(tmp_path / "gone"), str(base))):
        compress(str(base), str(models[3]), tmp_path / "delta", ExactConfig())


def test_no_adapter_of_a_chain(trained: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    repository = open_repository(str(trained[1][1]), HubOptions())
    with pytest.raises(CheckpointError, match=naming(str(trained[1][1]), str(trained[1][0]), "flatten")):
        export_lora(repository, tmp_path / "adapter", 4)


# Flat -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3])
def test_flat_is_what_compressing_the_model_gives(
    length: int, trained: tuple[list[Path], list[Path]], tmp_path: Path
) -> None:
    models, deltas = trained
    report = flatten(str(deltas[length - 1]), tmp_path / "flat")
    dense = as_dense(deltas[length - 1], tmp_path / "dense")
    direct = compress(str(models[0]), str(dense), tmp_path / "direct", ExactConfig())
    assert differing(tmp_path / "flat", tmp_path / "direct") == ["README.md"]
    assert same(decode_all(tmp_path / "flat"), load_tensors(models[length]))
    assert len(open_repository(str(tmp_path / "flat"), HubOptions()).chain) == 1
    assert report.repository_bytes == direct.repository_bytes
    assert "chain of" not in (tmp_path / "flat" / "README.md").read_text()


def test_what_is_kept(trained: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    """Configuration, tokenizer, templates and the card's metadata are those of the last link."""
    flatten(str(trained[1][2]), tmp_path / "flat", base_name="me/base", max_shard_size="1KB")
    config = config_of(tmp_path / "flat")
    assert config["text_config"] == config_of(trained[1][2])["text_config"]
    assert config["base_model_name_or_path"] == "me/base" and config["method"] == {"name": "exact"}
    assert {"license: apache-2.0", "base_model: me/base"} <= set(
        (tmp_path / "flat" / "README.md").read_text().split("\n")
    )
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "flat" / name).read_bytes() == (trained[0][3] / name).read_bytes()
    assert len(list((tmp_path / "flat").glob("delta_model-*.safetensors"))) > 1


def test_flat_of_a_base_that_is_given(trained: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    """A name on the Hub stays; a folder is replaced by the one that is given."""
    models, deltas = trained
    first = Path(shutil.copytree(deltas[0], tmp_path / "first"))
    second = Path(shutil.copytree(deltas[1], tmp_path / "second"))
    edit_json(second / "config.json", base_model_name_or_path=str(first))
    moved = shutil.copytree(models[0], tmp_path / "moved")
    for recorded, expected in ((str(tmp_path / "gone"), str(moved)), ("me/base", "me/base")):
        edit_json(first / "config.json", base_model_name_or_path=recorded)
        flatten(str(second), tmp_path / "flat", base_model=str(moved))
        assert config_of(tmp_path / "flat")["base_model_name_or_path"] == expected
        assert same(decode_all(tmp_path / "flat", str(moved)), load_tensors(models[2]))


def test_a_flat_link_still_carries_the_next(trained: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    """Its tensors are the same, so that a chain can be shortened in its place."""
    models, deltas = trained
    middle = Path(shutil.copytree(deltas[1], tmp_path / "middle"))
    last = Path(shutil.copytree(deltas[2], tmp_path / "last"))
    edit_json(last / "config.json", base_model_name_or_path=str(middle))
    flatten(str(middle), middle)
    assert len(open_repository(str(last), HubOptions()).chain) == 2
    assert same(decode_all(last), load_tensors(models[3]))


@pytest.mark.parametrize("link", [0, 1])
def test_flat_in_place_of_a_delta_below(link: int, trained: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    deltas = chain_of(tmp_path, trained[0])
    before = decode_all(deltas[link])
    with pytest.raises(OutputError, match=naming(str(deltas[link]), "rests on")):
        flatten(str(deltas[2]), deltas[link])
    assert same(decode_all(deltas[link]), before) and same(decode_all(deltas[2]), load_tensors(trained[0][3]))


def test_flat_of_a_lossy_delta(trained: tuple[list[Path], list[Path]], tiny_pair: Pair, tmp_path: Path) -> None:
    """What it decodes to on this machine is stored exactly."""
    compress(str(trained[1][1]), str(tiny_pair.finetuned), tmp_path / "lossy", LowRankConfig(compression_ratio=3))
    flatten(str(tmp_path / "lossy"), tmp_path / "flat")
    assert same(decode_all(tmp_path / "flat"), decode_all(tmp_path / "lossy"))


def test_flattening_is_resumed(
    trained: tuple[list[Path], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, encode, names = str(trained[1][2]), exact_tensors.encode_exact, list[int]()

    def stopping(*tensors: torch.Tensor) -> bytes:
        if len(names) == 2:
            raise KeyboardInterrupt
        names.append(1)
        return encode(*tensors)

    monkeypatch.setattr(exact_tensors, "encode_exact", stopping)
    with pytest.raises(KeyboardInterrupt):
        flatten(source, tmp_path / "flat")
    kept = finished(tmp_path / "flat")
    assert len(kept) == 2 and not (tmp_path / "flat").exists()
    redone: list[int] = []
    monkeypatch.setattr(exact_tensors, "encode_exact", lambda *tensors: redone.append(1) or encode(*tensors))
    flatten(source, tmp_path / "flat")
    changed = open_repository(str(tmp_path / "flat"), HubOptions())
    assert len(redone) + len(kept) == sum(map(changed.is_changed, changed.names())) == 3
    monkeypatch.undo()
    flatten(source, tmp_path / "unbroken")
    assert differing(tmp_path / "flat", tmp_path / "unbroken") == []
    assert not hidden(tmp_path / "flat").exists()


def test_refused(trained: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    models, deltas = trained
    with pytest.raises(CheckpointError, match=naming(str(models[1]))):
        flatten(str(models[1]), tmp_path / "flat")
    with pytest.raises(WrongBaseError, match=naming(str(models[1]), str(deltas[0]))):
        flatten(str(deltas[2]), tmp_path / "flat", base_model=str(models[1]))
    beside = Path(shutil.copytree(deltas[0], tmp_path / "beside"))
    (beside / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=naming(str(beside), "adapter_config.json")):
        flatten(str(beside), tmp_path / "flat")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=naming(str(tmp_path / "full"))):
        flatten(str(deltas[2]), tmp_path / "full")
    assert not (tmp_path / "flat").exists()


@pytest.mark.parametrize("touched", [None, 0, 1])
def test_a_scan_is_kept_as_long_as_no_link_changes(
    touched: int | None, trained: tuple[list[Path], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = [Path(shutil.copytree(delta, tmp_path / delta.name)) for delta in trained[1][:2]]
    edit_json(links[1] / "config.json", base_model_name_or_path=str(links[0]))
    encode, scan, scans = exact_tensors.encode_exact, pair_module.scan, list[int]()
    monkeypatch.setattr(pair_module, "scan", lambda *arguments: scans.append(1) or scan(*arguments))
    monkeypatch.setattr(exact_tensors, "encode_exact", lambda *tensors: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        flatten(str(links[1]), tmp_path / "flat")
    monkeypatch.setattr(exact_tensors, "encode_exact", encode)
    if touched is not None:
        os.utime(links[touched] / "delta_model.safetensors", ns=(1, 1))
    flatten(str(links[1]), tmp_path / "flat")
    assert len(scans) == (1 if touched is None else 2)
