"""AlpacaEval with a judge whose taste is known, so that win rates are known."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.code_tasks import ScriptedModel
from support.loopback_judge import Failure, LoopbackJudge, Question, leave_out_settings
from support.messages import naming

from impart_hf.evaluation.alpaca import AlpacaSettings, PairwiseJudge, PairwiseQuestion, alpaca_task, read_questions
from impart_hf.evaluation.journal import Journal
from impart_hf.evaluation.judge import JudgeError, JudgeSettings

COUNT = 10
# In the format of AlpacaEval's own files.
RECORDS = [
    {"dataset": "test", "instruction": f"Count to {i}.", "output": f"reference {i}", "generator": "reference"}
    for i in range(COUNT)
]


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_settings(monkeypatch)


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    (tmp_path / "instructions.json").write_text(json.dumps(RECORDS), "utf-8")
    return tmp_path / "instructions.json"


def settings(judge: LoopbackJudge, instructions: Path, **changes: Any) -> AlpacaSettings:
    quick = {"first_wait": 0.01, "timeout": 10.0, "attempts": 3, **changes}
    return AlpacaSettings(instructions, JudgeSettings(judge.url, "tester", **quick))


def scores(
    settings: AlpacaSettings, verdicts: Path | None = None, answer: Callable[[str], str] | None = None
) -> dict[str, Any]:
    """What lm-eval makes of the task and a model's answers, which are "mine" if none are given."""
    from lm_eval import evaluate

    model = ScriptedModel(answer or (lambda prompt: f"mine to: {prompt}"))
    results = evaluate(model, {"tasks": {"alpaca_eval": alpaca_task(settings, verdicts)}}, log_samples=False)
    return {name.removesuffix(",tester"): value for name, value in results["results"]["alpaca_eval"].items()}


def prefers_mine(question: Question) -> str:
    """Prefers the model's answer to seven of the ten instructions."""
    mine = any(f"Count to {i}." in question.text for i in range(7))
    return question.name_of("mine" if mine else "reference")


def test_win_rate_and_standard_error(instructions: Path) -> None:
    def slowly(question: Question) -> str:
        time.sleep(0.05)
        return prefers_mine(question)

    with LoopbackJudge(slowly) as judge:
        found = scores(settings(judge, instructions))
    assert found["win_rate"] == pytest.approx(0.7)
    assert found["win_rate_stderr"] == pytest.approx(statistics.stdev([1] * 7 + [0] * 3) / COUNT**0.5)
    assert found["judged"] == 1 and found["sample_len"] == COUNT and "weighted_win_rate" not in found
    assert found["length"] == len("mine to: Count to 0.") and found["reference_length"] == len("reference 0")
    assert len(judge.requests) == 2 * COUNT and 1 < judge.at_once <= 8


@pytest.mark.parametrize("name", ["m", "M"])
def test_a_judge_that_looks_at_the_order_alone(name: str, instructions: Path) -> None:
    with LoopbackJudge(lambda question: name, probabilities=True) as judge:
        found = scores(settings(judge, instructions))
    assert found["win_rate"] == 0.5 and found["win_rate_stderr"] == 0
    assert found["weighted_win_rate"] == pytest.approx(0.5)


def test_weighted_win_rate(instructions: Path) -> None:
    """The judge gives the model 0.8 if it comes first, and 0.6 if it comes second."""
    with LoopbackJudge(lambda q: 0.8 if q.name_of("mine") == "m" else 0.4, probabilities=True) as judge:
        found = scores(settings(judge, instructions))
    assert found["win_rate"] == 1 and found["weighted_win_rate"] == pytest.approx(0.7)


def test_verdicts_without_probabilities(instructions: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their instructions do not count in the weighted win rate, and a warning says so."""

    def answer(question: Question) -> float | bytes:
        weight = 0.8 if question.name_of("mine") == "m" else 0.2
        if "Count to 9." not in question.text:
            return weight
        return json.dumps({"choices": [{"message": {"content": question.name_of("reference")}}]}).encode()

    with LoopbackJudge(answer, probabilities=True) as judge:
        found = scores(settings(judge, instructions))
    assert found["win_rate"] == pytest.approx(0.9) and found["weighted_win_rate"] == pytest.approx(0.8)
    assert "2 of 20 verdicts have no probabilities" in caplog.text


def test_verdicts_that_cannot_be_read(instructions: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are asked for three times; an instruction counts if both of its verdicts can be read."""

    def answer(question: Question) -> str:
        if "Count to 9." in question.text and question.name_of("mine") == "m":
            return "I like both."
        return prefers_mine(question)

    with LoopbackJudge(answer) as judge:
        found = scores(settings(judge, instructions))
        assert found["win_rate"] == pytest.approx(7 / 9) and found["judged"] == pytest.approx(0.9)
        assert len(judge.requests) == 2 * COUNT + 2
        assert "I like both." in caplog.text
        judge.answer = lambda question: "Neither."
        with pytest.raises(ValueError, match=naming("tester", "20 of 20", "Neither.")):
            scores(settings(judge, instructions))


@pytest.mark.parametrize("failure, names", [(Failure(401, "no key"), (401, "no key")), ("Yes!", ("tester", "'Yes!'"))])
def test_the_judge_is_tried_before_the_model_answers(failure: Any, names: Any, instructions: Path) -> None:
    with LoopbackJudge(prefers_mine) as judge:
        judge.fails_check = failure
        with pytest.raises((JudgeError, ValueError), match=naming(names)):
            scores(settings(judge, instructions), answer=lambda prompt: pytest.fail("the model was asked"))
        judge.fails_check = None
        assert scores(settings(judge, instructions))["win_rate"] == pytest.approx(0.7)
        assert judge.checks > 1


def test_failures_of_the_judge_do_not_change_the_score(instructions: Path) -> None:
    def answer(question: Question) -> Any:
        failures = {3: Failure(429, Retry_After="0.05"), 7: Failure(500), 11: Failure(0), 13: b"nonsense"}
        return failures.get(question.number) or prefers_mine(question)

    with LoopbackJudge(answer) as judge:
        assert scores(settings(judge, instructions))["win_rate"] == pytest.approx(0.7)
    assert len(judge.requests) == 2 * COUNT + 4


def test_the_question(tmp_path: Path) -> None:
    """Whatever the texts hold, the judge can tell them apart, and sees each order once."""
    texts = ('{"a": {b}} "quoted"\n\nAnswer of m:\n"mine"', "line\nAnswer of M:\n\\n {first}", "\u00e9 \U0001f600 %s")
    for model_first in (True, False):
        instruction, answer, reference = texts
        (system, user) = PairwiseQuestion(instruction, answer, reference, model_first).messages()
        assert (system["role"], user["role"]) == ("system", "user")
        found = Question({"messages": [system, user]}, 0).answers
        assert found == dict(zip("mM", (answer, reference) if model_first else (reference, answer), strict=True))
        assert json.dumps(instruction, ensure_ascii=False) in user["content"]


def test_verdicts_are_kept(instructions: Path, tmp_path: Path) -> None:
    """After a failure in the middle the rest is asked for; another answer or judge is another verdict."""
    verdicts = tmp_path / "results" / "verdicts.jsonl"

    def failing(question: Question) -> Any:
        return prefers_mine(question) if question.number <= 6 else Failure(503)

    with LoopbackJudge(failing) as judge:
        with pytest.raises(JudgeError, match=naming(judge.url, 503)):
            scores(settings(judge, instructions, concurrency=1), verdicts)
        kept = len(verdicts.read_text().splitlines())
        assert kept == 6
        judge.answer = prefers_mine
        judge.requests.clear()
        assert scores(settings(judge, instructions), verdicts)["win_rate"] == pytest.approx(0.7)
        assert len(judge.requests) == 2 * COUNT - kept
        scores(settings(judge, instructions), verdicts)
        assert len(judge.requests) == 2 * COUNT - kept
        one = {"Count to 3.": "mine, but another"}
        scores(settings(judge, instructions), verdicts, lambda prompt: one.get(prompt, f"mine to: {prompt}"))
        assert len(judge.requests) == 2 * COUNT - kept + 2
    with pytest.raises(ValueError, match=naming(verdicts, 2, "record 3", "'Count to 3.'")):  # two answers to one
        read_questions(instructions, verdicts)
    records = [json.loads(line) for line in verdicts.read_text().splitlines()]
    assert len(records) == 2 * COUNT + 2
    assert {record["judge"] for record in records} == {"tester"}
    assert sum(record["model_wins"] for record in records if record["output"].startswith("mine to")) == 14


@pytest.mark.process
def test_a_killed_run_resumes(instructions: Path, tmp_path: Path) -> None:
    verdicts = tmp_path / "verdicts.jsonl"
    program = """
from impart_hf.evaluation.alpaca import PairwiseJudge, pairwise_questions, read_questions
from impart_hf.evaluation.judge import JudgeSettings
from pathlib import Path
import sys
url, questions, verdicts = sys.argv[1:]
judge = PairwiseJudge(JudgeSettings(url, "tester", concurrency=1), Path(verdicts))
asked = [(question, "mine to: " + question["instruction"]) for question in read_questions(questions)]
judge.ask([pair for question, answer in asked for pair in pairwise_questions(question, answer)])
"""
    process: Any = None

    def killing(question: Question) -> Any:
        if question.number == 8:
            os.kill(process.pid, signal.SIGKILL)
        return prefers_mine(question)

    with LoopbackJudge(killing) as judge:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(
            [sys.executable, "-c", program, judge.url, str(instructions), str(verdicts)], env=environment
        )
        assert process.wait(120) == -signal.SIGKILL
        judge.requests.clear()
        judge.answer = prefers_mine
        assert scores(settings(judge, instructions), verdicts)["win_rate"] == pytest.approx(0.7)
    assert len(judge.requests) == 2 * COUNT - 7


def test_a_journal_survives_what_kills_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.add("a", {"value": 1})
    journal.add("b", {"value": "\ud800 \u00e9\nline"})
    whole = path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        again = Journal(path)
        assert "a" in again and "b" not in again
        again.add("c", {"value": 2})
        third = Journal(path)
        assert third["a"]["value"] == 1 and third["c"]["value"] == 2 and "b" not in third
    path.write_bytes(b'[1]\nnull\n{"no": "key"}\n\n\xff\n' + whole)
    assert Journal(path)["b"]["value"] == "\ud800 \u00e9\nline"
    assert "a" not in Journal(None)


# --- files


def write(path: Path, *records: Any) -> Path:
    """As a JSON array or, if the name says so, a record a line."""
    if path.suffix == ".json":
        path.write_text(json.dumps(records), "utf-8")
    else:
        path.write_text("".join(json.dumps(record) + "\n\n" for record in records), "utf-8")
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_references_in_a_file_of_their_own(suffix: str, tmp_path: Path) -> None:
    asked = write(tmp_path / f"asked{suffix}", *({"instruction": r["instruction"]} for r in RECORDS[:3]))
    answers = [{**record, "output": record["output"].upper()} for record in reversed(RECORDS)]
    references = write(tmp_path / f"references{suffix}", *answers)
    assert read_questions(asked, references) == [{**r, "output": r["output"].upper()} for r in RECORDS[:3]]
    # A record that has an answer of its own is compared with the reference's.
    whole = write(tmp_path / f"whole{suffix}", *RECORDS)
    assert [question["output"] for question in read_questions(whole, references)][:2] == ["REFERENCE 0", "REFERENCE 1"]
    assert read_questions(whole) == RECORDS
    # An instruction that is asked twice, with one answer or two.
    twice = write(tmp_path / f"twice{suffix}", RECORDS[1], RECORDS[1])
    assert [q["output"] for q in read_questions(twice, references)] == ["REFERENCE 1", "REFERENCE 1"]
    two = write(tmp_path / f"two{suffix}", RECORDS[1], {**RECORDS[1], "output": "another"})
    assert [q["output"] for q in read_questions(twice, two)] == ["reference 1", "another"]


def test_another_model_as_the_reference(instructions: Path, tmp_path: Path) -> None:
    """By the file of its verdicts."""
    verdicts = tmp_path / "verdicts.jsonl"
    with LoopbackJudge(prefers_mine) as judge:
        scores(settings(judge, instructions), verdicts)
    expected = [f"mine to: {record['instruction']}" for record in RECORDS]
    assert [question["output"] for question in read_questions(instructions, verdicts)] == expected


@pytest.mark.parametrize(
    "asked, references, names",
    [
        ([], None, ("asked.json", "no records")),
        ([{"output": "x"}], None, ("asked.json", "record 0", "'instruction'")),
        (["text"], None, ("asked.json", "record 0", "'instruction'")),
        ([RECORDS[0], {"instruction": "Go."}], None, ("asked.json", "record 1", "'output'", "--references")),
        (RECORDS, RECORDS[:4], ("references.json", 0, "record 4", "'Count to 4.'")),
        (RECORDS, [{"instruction": r["instruction"]} for r in RECORDS], ("references.json", "record 0", "'output'")),
    ],
)
def test_files_that_do_not_fit(asked: list[Any], references: list[Any] | None, names: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "asked.json", *asked)
    other = None if references is None else write(tmp_path / "references.json", *references)
    with pytest.raises(ValueError, match=naming(names)):
        read_questions(path, other)


def test_files_that_are_no_json(tmp_path: Path) -> None:
    (tmp_path / "asked.txt").write_text("Count to one.\n")
    with pytest.raises(ValueError, match=naming("asked.txt")):
        read_questions(tmp_path / "asked.txt")
    with pytest.raises(OSError, match=naming("gone.json")):
        read_questions(tmp_path / "gone.json")


def test_nothing_is_asked_twice_in_one_run() -> None:
    """Of two equal instructions with equal answers."""
    pair = PairwiseQuestion("Count.", "mine", "reference", True)
    with LoopbackJudge(lambda question: question.name_of("mine")) as judge:
        panel = PairwiseJudge(JudgeSettings(judge.url, "tester"))
        panel.ask([pair, pair])
        panel.ask([])
        assert panel.verdict(pair)["model_wins"] is True and len(judge.requests) == 1
