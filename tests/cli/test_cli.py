"""The command line, as a user runs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.commands import failure
from support.messages import naming
from support.tiny_models import Pair
from support.workspaces import counted_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer

from impart_hf.cli.main import main


@pytest.fixture(scope="module")
def repository(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "delta"
    assert (
        main(["compress", str(tiny_pair.base), str(tiny_pair.finetuned), str(folder), "--ratio", "6", "--quiet"]) == 0
    )
    return folder


def test_compress_prints_what_is_on_disk(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "delta"
    arguments = [str(tiny_pair.base), str(tiny_pair.finetuned), str(out), "--method", "dare", "--ratio", "3", "--json"]
    assert main(["compress", *arguments, "--seed", "7", "--value-dtype", "bfloat16"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    counted = counted_bytes(out)
    assert report["repository_bytes"] == counted
    assert report["checkpoint_bytes"] == (tiny_pair.finetuned / "model.safetensors").stat().st_size
    assert report["ratio"] == pytest.approx(report["checkpoint_bytes"] / counted)
    assert report["method"]["seed"] == 7 and report["method"]["value_dtype"] == "bfloat16"
    assert printed.err.splitlines()[0] == "1/3 Scanning"  # without a terminal there are no bars
    parts = {part["kind"]: part for part in report["parts"]}
    assert sum(part["bytes"] for part in parts.values()) == counted
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    assert report["inputs"] == {"calibrated": 0, "guessed": 0, "unknown": parts["attention"]["tensors"] + 8}
    assert report["next"][0] == f"impart-hf inspect {out}"


def test_inspect_table_and_json(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(repository)]) == 0
    table = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj.weight" in table and "64x128" in table
    assert main(["inspect", str(repository), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["method"]["name"] == "impart-rd"
    rows = {t["name"]: t for t in content["tensors"]}
    down = rows["model.layers.1.mlp.down_proj.weight"]
    assert down["full_rank"] == 64 and 0 < down["rank"] < 64 and 0 < down["keep_ratio"] <= 1
    assert 0 < down["relative_error"] and down["kind"] == "encoded"
    assert rows["model.norm.weight"]["kind"] == "kept" and rows["model.norm.weight"]["bytes"] == 128
    assert content["delta_bytes"] == (repository / "delta_model.safetensors").stat().st_size


def test_inspect_needs_no_base(tiny_pair: Pair, repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "delta"
    copy.mkdir()
    for path in repository.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (copy / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(copy)]) == 0
    assert main(["verify", str(copy), "--quiet"]) == 1
    assert main(["verify", str(copy), "--quiet", "--base-model", str(tiny_pair.base)]) == 0


def test_plot(repository: Path, tmp_path: Path) -> None:
    assert main(["inspect", str(repository), "--plot", str(tmp_path / "delta.png")]) == 0
    assert (tmp_path / "delta.png").read_bytes().startswith(b"\x89PNG")


def test_reconstruct_gives_the_same_model(repository: Path, tmp_path: Path) -> None:
    dense_folder = tmp_path / "dense"
    assert main(["reconstruct", str(repository), str(dense_folder), "--quiet", "--max-shard-size", "50KB"]) == 0
    assert len(list(dense_folder.glob("model-*.safetensors"))) > 1
    dense = AutoModelForCausalLM.from_pretrained(dense_folder)
    loaded = AutoModelForCausalLM.from_pretrained(repository)
    assert type(dense).__name__ == "LlamaForCausalLM" and dense.dtype == loaded.dtype
    ids = AutoTokenizer.from_pretrained(dense_folder)("A small difference", return_tensors="pt").input_ids
    assert torch.equal(dense(ids).logits, loaded(ids).logits)


def test_bad_input_is_one_line(
    tiny_pair: Pair, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, finetuned, out = tiny_pair.base, tiny_pair.finetuned, tmp_path / "out"
    assert "compression_ratio" in failure(capsys, "compress", base, finetuned, out, "--ratio", "1")
    for options, names in (
        (("--method", "dare", "--beta", "0.5"), ("--beta", "impart", "dare")),
        (("--calibration", "none", "--calibration-samples", "5"), ("--calibration-samples", "--calibration")),
        (("--steps", "5", "--distill-blocks", "1"), ("--steps", "--distill-blocks", "--distill")),
        (("--base-name", "not a name"), ("base_name", "'not a name'")),
        (("--push", "user/delta"), ("--push", "--base-name")),
        (("--device", "cuda:99"), ("device", "'cuda:99'")),
    ):
        assert re.search(naming(names), failure(capsys, "compress", base, finetuned, out, *options))
    assert re.search(naming(tmp_path, "config.json"), failure(capsys, "inspect", tmp_path))
    assert re.search(naming(finetuned, "'llama'"), failure(capsys, "verify", finetuned))
    assert str(repository) in failure(capsys, "reconstruct", repository, repository, "--quiet")
    assert str(out) in failure(capsys, "push", out, "user/delta")
    # a base that only this machine has makes a repository that nobody can load
    assert "--base-name" in failure(capsys, "push", repository, "user/delta")
    assert list(tmp_path.iterdir()) == []


def test_every_text_is_read_with_its_field(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talks = tmp_path / "talks.jsonl"
    talks.write_text('{"id": "x", "turns": ["One.", "Two."]}')
    pair = [str(tiny_pair.base), str(tiny_pair.finetuned), str(tmp_path / "out")]
    for arguments in (
        ["compress", *pair, "--calibration", talks],
        ["compress", *pair, "--distill", talks],
        ["tune", *pair, "--validation", talks],
        ["tune", *pair, "--method", "impart-qt", "--calibration", talks, "--task", "arc_easy"],
        ["evaluate", str(tiny_pair.base), "--text", talks],
    ):
        line = failure(capsys, *arguments, "--text-field", "body", "--quiet")
        assert re.search(naming(talks, "turns", "'body'"), line), arguments


@pytest.mark.process
def test_push_without_a_network_is_one_line(tiny_pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "delta"
    arguments = [str(tiny_pair.base), str(tiny_pair.finetuned), str(out), "--ratio", "4", "--base-name", "user/base"]
    assert main(["compress", *arguments, "--quiet"]) == 0
    # nothing listens on the discard port
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
    command = [str(Path(sys.executable).with_name("impart-hf")), "push", str(out), "user/delta"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Hub" in done.stderr.splitlines()[-1]


@pytest.mark.process
def test_the_command_is_installed(repository: Path) -> None:
    command = [str(Path(sys.executable).with_name("impart-hf")), "inspect", str(repository)]
    assert "base" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wrong = subprocess.run([*command[:1], "inspect", "/nowhere/at all"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr and "/nowhere/at all" in wrong.stderr


@pytest.mark.process
def test_optimum_cli_has_the_same_commands(repository: Path) -> None:
    optimum = str(Path(sys.executable).with_name("optimum-cli"))
    command = [optimum, "impart", "inspect", str(repository), "--json"]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(found.stdout)["method"]["name"] == "impart-rd"
    wrong = subprocess.run([optimum, "impart", "verify", "/nowhere/at all"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "impart-hf: error: " in wrong.stderr
