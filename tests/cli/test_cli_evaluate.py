"""`impart-hf evaluate` on tasks: what it prints, and which options it refuses."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.lm_eval_task import write_reciting_task
from support.messages import naming
from support.tiny_models import Pair

from impart_hf.cli.main import main
from impart_hf.cli.task_options import key_values


@pytest.fixture(scope="module")
def reciting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reciting_task(tmp_path_factory.mktemp("task"), {f"Question {i}": "no" for i in range(4)})


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status = main(["evaluate", *map(str, arguments)])
    found = capsys.readouterr()
    assert status == 0, found.err
    return found.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on standard error."""
    assert main(["evaluate", *map(str, arguments)]) == 1
    found = capsys.readouterr()
    assert found.out == "" and len(found.err.splitlines()) == 1
    return found.err


def test_several_models_and_tasks(
    task: Path, reciting: Path, tiny_pair: Pair, tiny_repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [tiny_pair.base, tiny_pair.finetuned, tiny_repository]
    found = json.loads(printed(capsys, *models, "--task", f"{task},{reciting}", "--limit", "3", "--quiet", "--json"))
    assert [row["model"] for row in found["models"]] == [str(model) for model in models]
    for row in found["models"]:
        assert [(s["task"], s["metric"], s["filter"]) for s in row["scores"]] == [
            ("going_on", "acc", "none"),
            ("reciting", "exact_match", "whole"),
            ("reciting", "exact_match", "stripped"),
        ]
        assert all(score["samples"] == 3 and score["stderr"] is not None for score in row["scores"])
        assert row["cost"]["parameters"] and row["perplexity"] is None


def test_table(task: Path, reciting: Path, tiny_pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--task", reciting, "--task", task, "--batch-size", "auto", "--gen-kwargs", "max_gen_toks=1"]
    assert main(["evaluate", str(tiny_pair.base), *map(str, settings)]) == 0
    found = capsys.readouterr()
    costs, scores = found.out.split("\n\n")
    assert len(costs.splitlines()) == 3
    heading, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in scores.splitlines()]
    columns = ["model", "task", "filter", "metric", "value", "± stderr", "questions", "examples", "version"]
    assert heading == columns
    base = str(tiny_pair.base)
    assert rows[0] == [base, "reciting", "whole", "exact_match ↑", "0.0000", "0.0000", "4", "0", "2.5"]
    assert rows[2][:4] == [base, "going_on", "none", "acc ↑"] and re.fullmatch(r"0\.\d{4}", rows[2][5])
    assert "requests" not in found.err, "lm-eval's bars are for terminals"


def test_results_and_cards(task: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [repository, "--task", task, "--results", tmp_path / "results", "--update-card", "--json", "--quiet"]
    first = json.loads(printed(capsys, *command))
    (file,) = (tmp_path / "results").rglob("*.json")
    written = file.stat().st_mtime_ns
    assert json.loads(printed(capsys, *command)) == first
    assert file.stat().st_mtime_ns == written
    (result,) = ModelCard.load(repository / "README.md").data.eval_results
    (score,) = first["models"][0]["scores"]
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("going_on", "acc", score["value"])


def test_scores_are_printed_though_a_card_cannot_be_written(
    task: Path, pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    (pair.base / "README.md").mkdir()
    assert main(["evaluate", str(pair.base), "--task", str(task), "--limit", "2", "--update-card", "--quiet"]) == 1
    assert "going_on" in capsys.readouterr().out


def test_deltas_beside_their_base(
    task: Path, tiny_repository: Path, tiny_pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice the same: the second delta takes the first one's place."""
    command = ["--task", task, "--dtype", "float32", "--quiet", "--json"]
    beside = json.loads(printed(capsys, tiny_repository, tiny_repository, *command, "--backend", "runtime"))["models"]
    alone = json.loads(printed(capsys, tiny_repository, *command))["models"]
    assert [row["scores"] for row in beside] == [alone[0]["scores"]] * 2
    line = refused(capsys, tiny_pair.finetuned, *command, "--backend", "runtime")
    assert re.search(naming(tiny_pair.finetuned, "delta repository"), line)


@pytest.mark.process
def test_processes_share_questions_and_text(
    task: Path, tiny_pair: Pair, tiny_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes print once what one does; each has answered its share."""
    (tmp_path / "text.txt").write_text("A fine-tuned model is its base model and a small difference. " * 30)
    models = [tiny_pair.base, tiny_repository]
    settings = ["--task", task, "--text", tmp_path / "text.txt", "--length", "32", "--samples", "5"]
    command = list(map(str, ["evaluate", *models, *settings, "--dtype", "float32", "--json", "--quiet"]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = [*launcher, "-m", "impart_hf.cli", *command, "--results", str(tmp_path / "results")]
    done = subprocess.run(job, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert main(command) == 0
    expected = json.loads(capsys.readouterr().out)
    for row, other in zip(found["models"], expected["models"], strict=True):
        assert row["perplexity"] == pytest.approx(other["perplexity"], rel=1e-6)
        (score,), (wanted,) = row["scores"], other["scores"]
        assert score["samples"] == wanted["samples"] == 24
        assert score["value"] == pytest.approx(wanted["value"], abs=1.5 / 24), "two choices may be equally likely"
    assert [path.suffix for path in (tmp_path / "results").rglob("going_on*")] == [".json"] * 2


@pytest.mark.parametrize(
    "arguments, names",
    [
        (("--limit", "9"), ("--limit", "--task")),
        (("--num-fewshot", "2", "--seed", "1"), ("--num-fewshot", "--seed", "--task")),
        (("--backend", "hf"), ("--backend", "--task")),
        (("--update-card",), ("--update-card", "--task")),
        (("--batch-size", "auto", "--text", "text.txt"), ("--batch-size", "--task")),
        (("--task", "a", "--fewshot-as-multiturn"), ("--fewshot-as-multiturn", "--apply-chat-template")),
        (("--task", "a", "--backend", "vllm", "--device", "cpu"), ("--device", "vLLM")),
        (("--task", "a", "--backend", "vllm", "--text", "text.txt"), ("--text", "--backend vllm")),
        (("--task", "a", "--backend", "runtime", "--latency"), ("--latency", "--backend runtime")),
        (("--task", "a", "--limit", "0"), ("limit", 0)),
        (("--task", "a", "--limit", "2.5"), ("limit", 2.5)),
        (("--task", " , "), "--task"),
        (("--task", "a", "--update-card"), ("'user/a'", "folder")),
    ],
)
def test_options_that_are_refused(arguments: tuple, names: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(naming(names), refused(capsys, "user/a", *arguments))


def test_values_by_key() -> None:
    found = key_values("max_gen_toks=512,temperature=0.7,do_sample=true,stop=None,name=a=b")
    assert found == {"max_gen_toks": 512, "temperature": 0.7, "do_sample": True, "stop": None, "name": "a=b"}
    found = key_values(
        r"""until=["A, B","\n\n"],stop="\n,",more={"a":{"b":1},"c":[[2],[3]]},text=it's,size=5,e=...,s={1}"""
    )
    assert found == {
        "until": ["A, B", "\n\n"], "stop": "\n,", "more": {"a": {"b": 1}, "c": [[2], [3]]}, "text": "it's", "size": 5,
        "e": "...", "s": "{1}",
    }  # fmt: skip
    for text in ("a", "=1", "a=1,", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="KEY=VALUE"):
            key_values(text)
