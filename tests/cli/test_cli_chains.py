"""Chains of deltas on the command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from support.chains import UP, chain_of, checkpoints
from support.commands import failure
from support.messages import naming
from support.tiny_models import edit_json, load_tensors
from support.workspaces import differing

from impart_hf import flatten
from impart_hf.cli.main import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """A model with three checkpoints of its training, and their deltas; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    models = checkpoints(folder, 3)
    return models, chain_of(folder, models)


def test_compress(trained: tuple[list[Path], list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models, deltas = trained
    arguments = ["compress", str(deltas[1]), str(models[3]), str(tmp_path / "delta"), "--method", "exact"]
    assert main([*arguments, "--quiet"]) == 0
    assert differing(tmp_path / "delta", deltas[2]) == []
    assert f"impart-hf inspect {tmp_path / 'delta'}" in capsys.readouterr().out
    line = failure(capsys, *arguments, "--push", "me/delta")
    assert "--base-name" in line


def test_inspect(trained: tuple[list[Path], list[Path]], capsys: pytest.CaptureFixture[str]) -> None:
    models, deltas = trained
    assert main(["inspect", str(deltas[2])]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("chain")]
    places = [line.index(f" {place}") for place in (deltas[1], deltas[0], models[0])]
    assert places == sorted(places) and " 3 deltas" in line
    assert main(["inspect", str(deltas[2]), "--json"]) == 0
    chain = json.loads(capsys.readouterr().out)["chain"]
    assert chain == [{"model": str(place), "revision": None} for place in (deltas[1], deltas[0], models[0])]
    assert main(["inspect", str(deltas[0])]) == 0
    assert "chain" not in capsys.readouterr().out


def test_inspect_needs_no_link(
    trained: tuple[list[Path], list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    delta = shutil.copytree(trained[1][2], tmp_path / "delta")
    edit_json(delta / "config.json", base_model_name_or_path=str(tmp_path / "gone"))
    assert main(["inspect", str(delta)]) == 0
    printed = capsys.readouterr().out
    assert UP in printed or "model.norm.weight" in printed
    assert str(tmp_path / "gone") in printed and "cannot be read" in printed
    edit_json(delta / "config.json", base_model_name_or_path=str(delta))  # rests on itself
    assert main(["inspect", str(delta)]) == 0
    assert "and more" in capsys.readouterr().out


def test_verify_and_reconstruct(
    trained: tuple[list[Path], list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models, deltas = trained
    assert main(["verify", str(deltas[2]), "--quiet"]) == 0
    line = capsys.readouterr().out
    assert f"{deltas[1]} on {deltas[0]} on {models[0]}" in line
    dense = tmp_path / "dense"
    assert main(["reconstruct", str(deltas[2]), str(dense), "--quiet", "--base-model", str(models[0])]) == 0
    one, other = load_tensors(dense), load_tensors(models[3])
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_flatten(trained: tuple[list[Path], list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models, deltas = trained
    assert main(["flatten", str(deltas[2]), str(tmp_path / "flat"), "--quiet"]) == 0
    assert "ratio" in capsys.readouterr().out
    flatten(str(deltas[2]), tmp_path / "by-hand")
    assert differing(tmp_path / "flat", tmp_path / "by-hand") == []
    arguments = ["--json", "--base-name", "me/base", "--max-shard-size", "1KB", "--base-model", str(models[0])]
    assert main(["flatten", str(deltas[2]), str(tmp_path / "named"), "--quiet", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["method"] == {"name": "exact"} and report["ratio"] > 1
    assert (tmp_path / "named" / "delta_model.safetensors.index.json").exists()
    assert json.loads((tmp_path / "named" / "config.json").read_text())["base_model_name_or_path"] == "me/base"


def test_flatten_refuses(
    trained: tuple[list[Path], list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models, _ = trained
    line = failure(capsys, "flatten", models[0], tmp_path / "flat", "--quiet")
    assert str(models[0]) in line and not (tmp_path / "flat").exists()


def test_a_lossy_base(
    trained: tuple[list[Path], list[Path]], tiny_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failure(
        capsys, "compress", tiny_repository, trained[0][1], tmp_path / "delta", "--method", "exact", "--quiet"
    )
    assert re.search(naming(str(tiny_repository), "--method exact", "impart-hf reconstruct"), line)
