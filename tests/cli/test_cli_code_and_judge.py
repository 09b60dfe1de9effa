"""`impart-hf evaluate` on tasks that execute code, and on alpaca_eval with a judge."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.code_tasks import HUMANEVAL, usable_isolation, write_code_task
from support.commands import failure
from support.loopback_judge import Failure, LoopbackJudge, Question, leave_out_settings
from support.messages import naming
from support.tiny_models import Pair

from impart_hf.cli.main import main

RECORDS = [{"instruction": f"Count to {i}.", "output": f"reference {i}", "generator": "r"} for i in range(4)]
SHORT = ("--gen-kwargs", "max_gen_toks=2", "--quiet")


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_settings(monkeypatch)


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    (tmp_path / "instructions.json").write_text(json.dumps(RECORDS), "utf-8")
    return tmp_path / "instructions.json"


def scores(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[list[dict[str, Any]]]:
    """Of each model."""
    status = main(["evaluate", *map(str, arguments), *SHORT, "--json"])
    found = capsys.readouterr()
    assert status == 0, found.err
    return [row["scores"] for row in json.loads(found.out)["models"]]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    return failure(capsys, "evaluate", *map(str, arguments))


def judged(judge: LoopbackJudge, instructions: Path, *arguments: object) -> list[object]:
    options = ["--judge", judge.url, "--judge-model", "tester", "--instructions", instructions]
    return ["--task", "alpaca_eval", "--apply-chat-template", *options, *arguments]


def prefers_two_of_mine(question: Question) -> str:
    """Prefers the model's answers to two of the four instructions."""
    reference = question.name_of("reference")
    return reference if re.search("Count to [01]", question.text) else "mM".replace(reference, "")


def test_programs_are_executed(tiny_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the four problems one is solved by its prompt, whatever the model says in the comment that follows."""
    solved = {**HUMANEVAL[0], "prompt": HUMANEVAL[0]["prompt"] + HUMANEVAL[0]["canonical_solution"] + "\n\n#"}
    task = write_code_task(tmp_path, "humaneval/humaneval.yaml", [solved, *HUMANEVAL[1:]])
    ((score,),) = scores(capsys, tiny_repository, "--task", task, "--allow-code", usable_isolation())
    assert (score["metric"], score["value"], score["samples"]) == ("pass@1", 0.25, 4)
    assert score["stderr"] == pytest.approx(0.25) and score["higher_is_better"] is True


def test_programs_that_are_not_isolated_are_announced(
    tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = write_code_task(tmp_path, "humaneval/humaneval.yaml", HUMANEVAL[:1])
    assert main(["evaluate", str(tiny_pair.base), "--task", str(task), "--allow-code", "unisolated", *SHORT]) == 0
    printed = capsys.readouterr()
    assert re.search(naming("not isolated"), printed.err) and "pass@1" in printed.out


def test_a_judge_compares_answers(
    pair: Pair, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two models; in the card as other scores; and the same command asks neither model nor judge again."""
    models = [pair.base, pair.finetuned]
    with LoopbackJudge(prefers_two_of_mine, probabilities=True) as judge:
        arguments = judged(judge, instructions, "--results", tmp_path / "results", "--update-card")
        found = scores(capsys, *models, *arguments)
        asked = len(judge.requests)
        assert asked in (8, 16)  # the two models may say the same
        for model in found:
            values = {score["metric"]: score for score in model}
            assert values["win_rate"]["value"] == 0.5 and values["win_rate"]["stderr"] == pytest.approx(3**-0.5 / 2)
            assert values["weighted_win_rate"]["value"] == pytest.approx(0.5)
            assert values["judged"]["value"] == 1 and values["reference_length"]["value"] == len("reference 0")
            assert {(score["task"], score["filter"], score["samples"]) for score in model} == {
                ("alpaca_eval", "tester", 4)
            }
        judge.answer = lambda question: Failure(500)
        assert scores(capsys, *models, *arguments) == found
        assert len(judge.requests) == asked
    results = {result.metric_name: result for result in ModelCard.load(pair.base / "README.md").data.eval_results}
    assert results["win_rate (tester)"].metric_value == 0.5


def test_a_run_goes_on_after_the_judge_was_down(
    tiny_pair: Pair, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(question: Question) -> Any:
        return prefers_two_of_mine(question) if question.number <= 3 else Failure(403, "no credit left")

    with LoopbackJudge(answer) as judge:
        arguments = [tiny_pair.base, *judged(judge, instructions, "--results", tmp_path / "results")]
        assert re.search(naming(judge.url, 403, "no credit left"), refused(capsys, *arguments, *SHORT))
        kept = len((tmp_path / "results" / "alpaca_eval-verdicts.jsonl").read_text("utf-8").splitlines())
        judge.answer, before = prefers_two_of_mine, len(judge.requests)
        (found,) = scores(capsys, *arguments)
        assert kept == 3 and len(judge.requests) == before + 5
    assert found[0]["metric"] == "win_rate" and found[0]["value"] == 0.5


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--allow-code", "isolated"], ("--allow-code", "--task")),
        (["--task", "piqa", "--judge", "http://127.0.0.1:1/v1"], ("--judge", "alpaca_eval")),
        (["--task", "piqa", "--references", "a.json", "--judge-max-tokens", "9"], ("--references", "alpaca_eval")),
        (["--task", "alpaca_eval", "--judge-model", "m"], ("--judge", "--instructions")),
        (["--task", "alpaca_eval,piqa"], ("--judge", "--judge-model", "--instructions")),
    ],
)
def test_options_without_effect_and_options_that_are_missing(
    arguments: list[str], names: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(naming(names), refused(capsys, "user/model", *arguments))


def test_bad_input(tiny_pair: Pair, instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LoopbackJudge(prefers_two_of_mine) as judge:
        plain = [argument for argument in judged(judge, instructions) if argument != "--apply-chat-template"]
        assert re.search(naming("alpaca_eval", "--apply-chat-template"), refused(capsys, tiny_pair.base, *plain))
        gone = judged(judge, tmp_path / "gone.json")
        assert re.search(naming("gone.json"), refused(capsys, tiny_pair.base, *gone))
        # The tiny model has 128 positions, and answers to AlpacaEval may have 2048 tokens.
        long = refused(capsys, tiny_pair.base, *judged(judge, instructions), "--quiet")
        assert re.search(naming("alpaca_eval", 2048, 128), long)
        elsewhere = judged(judge, instructions, "--judge", "localhost")
        assert re.search(naming("'localhost'"), refused(capsys, tiny_pair.base, *elsewhere))
    assert judge.requests == []
