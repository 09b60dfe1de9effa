"""`impart-hf diff`, as a user runs it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import failure
from support.messages import naming
from support.tiny_models import Pair

import impart_hf
from impart_hf.cli.main import main


def test_the_tables_say_what_changed(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "diff.png"
    assert main(["diff", str(tiny_pair.base), str(tiny_pair.finetuned), "--plot", str(picture)]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0] == "Comparing"  # without a terminal there are no bars
    lines = printed.out.splitlines()
    rows = [line for line in lines if line.startswith("model.layers.1.mlp.down_proj.weight")]
    assert len(rows) == 1 and "64x128" in rows[0]
    report = impart_hf.diff(str(tiny_pair.base), str(tiny_pair.finetuned), progress=False)
    (total,) = (line.split() for line in lines if line.startswith("total "))
    assert total[1:4] == [str(report.total.tensors), str(report.total.changed_tensors), str(report.total.entries)]
    assert total[4] == f"{100 * report.total.share:.2f}%" and total[6] == f"{report.total.bits:.3f}"
    assert any(line.startswith("verdict") and report.verdict.text in line for line in lines)
    assert lines[-1].endswith(report.verdict.commands[-1])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_is_one_document(tiny_pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(tiny_pair.base), str(tiny_pair.finetuned), "--json", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    content = json.loads(printed.out)
    wanted = impart_hf.diff(str(tiny_pair.base), str(tiny_pair.finetuned), progress=False).to_dict()
    del content["seconds"], wanted["seconds"]
    assert content == json.loads(json.dumps(wanted))
    assert content["total"]["changed"] == sum(t["changed"] for t in content["tensors"])
    assert content["verdict"]["method"] in ("exact", "impart-rd") and len(content["verdict"]["commands"]) == 1


def test_one_argument_is_a_delta_repository(tiny_repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(tiny_repository), "--json", "--quiet", "--no-spectra"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["finetuned"] == str(tiny_repository) and content["verdict"]["method"] == "stored"
    assert content["total"]["changed"] and all(t["stable_rank"] is None for t in content["tensors"])


def test_bad_input_is_one_line(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, finetuned = tiny_pair.base, tiny_pair.finetuned
    for arguments, names in (
        ((base,), (base, "delta repository")),
        ((base, tmp_path), (tmp_path, "config.json")),
        ((base, finetuned, "--base-model", base), ("base_model", finetuned)),
        ((base, finetuned, "--plot", tmp_path / "none" / "a.png"), (tmp_path / "none",)),
        ((base, finetuned, "--plot", tmp_path / "a.xyz"), (tmp_path / "a.xyz", "png")),
        ((base, finetuned, "--device", "cuda:99"), ("'cuda:99'",)),
    ):
        assert re.search(naming(names), failure(capsys, "diff", *arguments)), arguments


@pytest.mark.process
def test_optimum_cli_has_the_command(tiny_repository: Path) -> None:
    optimum = str(Path(sys.executable).with_name("optimum-cli"))
    command = [optimum, "impart", "diff", str(tiny_repository), "--json", "--quiet"]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(found.stdout)["verdict"]["method"] == "stored"
