"""`scripts/exact_answers.py`: the records, their answers worked out in another way, and the tasks on real lm-eval."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from support.load_script import load_script
from support.messages import naming
from support.tiny_models import tiny_config, tiny_tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM

from impart_hf.evaluation.tasks import TaskEvaluation

script = load_script("exact_answers")
Record, exact_records, main = script.ExactRecord, script.exact_records, script.main

pytestmark = pytest.mark.scripts

_PARTS = {"m": (Fraction(1), "cm"), "cm": (Fraction(1, 100), ""), "euros": (Fraction(1), "cents")}
_PARTS["cents"] = (Fraction(1, 100), "")


def date(question: str) -> str:
    return datetime.strptime(question, "Date %d %b %y").strftime("%y-%m-%d")


def unit(question: str) -> str:
    _, large, one, small, other = question.split()
    (whole, part), (fraction, _) = _PARTS[one], _PARTS[other]
    assert part == other
    return f"{(int(large) * whole + int(small) * fraction) / fraction} {other}"


def total(question: str) -> str:
    return str(sum(int(number) for number in re.findall(r"\d+", question)))


def in_order(question: str) -> str:
    return "".join(sorted(question.split()[1]))


def as_json(question: str) -> dict[str, Any]:
    _, name, age = question.split()
    return {"name": name, "age": int(age)}


WORKED_OUT: dict[str, Callable[[str], Any]] = {
    "dates": date, "units": unit, "sums": total, "sorting": in_order, "json": as_json,
}  # fmt: skip


# Of seed 0.
VECTORS = {
    False: [
        "Date 28 Jul 97 = 97-07-28", "Unit 2 euros 33 cents = 233 cents", "Sum 75 + 4 = 79", "Sort 649 = 469",
        'JSON Jan 74 = {"name": "Jan", "age": 74}',
    ],
    True: [
        "Date 17 Aug 51 = 51-08-17", "Unit 9 euros 71 cents = 971 cents", "Sum 88 + 2 = 90", "Sort 879 = 789",
        'JSON Tom 52 = {"name": "Tom", "age": 52}',
    ],
}  # fmt: skip


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", WORKED_OUT)
def test_answers_are_right(kind: str, held_out: bool) -> None:
    for record in exact_records(60, 3, held_out=held_out, kinds=[kind]):
        assert record.kind == kind and record.prompt.endswith(" =")
        answer = record.answer.removeprefix(" ")
        found = json.loads(answer) if kind == "json" else answer
        assert found == WORKED_OUT[kind](record.prompt.removesuffix(" ="))


def test_held_out_prompts_are_never_trained_on() -> None:
    held = [record.prompt for seed in range(3) for record in exact_records(250, seed, held_out=True)]
    train = {record.prompt for seed in range(3, 6) for record in exact_records(4000, seed)}
    assert not set(held) & train
    assert len(set(held[:250])) == 250, "no question is asked twice"


@pytest.mark.parametrize("kind", WORKED_OUT)
def test_every_kind_suffices_alone(kind: str) -> None:
    assert len({record.prompt for record in exact_records(100, 0, held_out=True, kinds=[kind])}) == 100


def test_every_kind_in_turn_and_one_answer_to_a_prompt() -> None:
    records = exact_records(5000, 0)
    assert [record.kind for record in records[:7]] == [*script.KINDS, "dates", "units"]
    answers: dict[str, str] = {}
    for record in records:
        assert answers.setdefault(record.prompt, record.answer) == record.answer


def test_a_seed_gives_the_same_everywhere() -> None:
    for held_out, expected in VECTORS.items():
        assert [record.prompt + record.answer for record in exact_records(5, 0, held_out=held_out)] == expected
    assert exact_records(20, 0) != exact_records(20, 1)


@pytest.mark.parametrize(
    "arguments, names",
    [
        ({"count": 5, "kinds": ["dates", "words"]}, "words"),
        ({"count": 5, "kinds": []}, "kinds"),
        ({"count": 500, "kinds": ["sums"], "held_out": True}, "sums"),
    ],
)
def test_bad_input(arguments: dict[str, Any], names: Any) -> None:
    with pytest.raises(ValueError, match=naming(names)):
        exact_records(seed=0, **arguments)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact") / "answers"
    assert main([str(folder), "--count", "200", "--test", "25", "--seed", "4"]) == 0
    return folder


def test_files(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = written / "tasks"
    kinds = [f"{kind}.yaml" for kind in script.KINDS]
    assert sorted(path.name for path in tasks.iterdir()) == sorted(
        ["answers.yaml", *kinds, "load_records.py", "test.jsonl", "train.jsonl"]
    )
    assert script.read_tasks(tasks) == exact_records(25, 4, held_out=True)
    assert script.read_tasks(tasks, script.TRAIN) == exact_records(200, 4)
    lines = (written / "train.txt").read_text("utf-8").splitlines()
    assert lines == [record.prompt + record.answer for record in exact_records(200, 4)]
    question_answers = load_script("question_answers")
    asked = question_answers.read_records(tasks / "test.jsonl")
    assert [(record.prompt, record.answer) for record in asked] == [
        (record.prompt, record.answer) for record in exact_records(25, 4, held_out=True)
    ]
    assert main([str(written)]) == 1 and main([str(written / "x"), "--kinds", "words"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and str(written) in lines[0] and "words" in lines[1]
    assert not (written / "x").exists()


class Scripted(LlamaForCausalLM):
    """A model that ends each of its answers as `says` tells it to, whatever its weights."""

    says: Callable[[str], str]

    def generate(self, inputs: Any = None, *, input_ids: Any = None, **_: Any) -> torch.Tensor:  # type: ignore[override]
        prompts, tokenizer = (inputs if input_ids is None else input_ids), tiny_tokenizer()
        asked = tokenizer.batch_decode(prompts, skip_special_tokens=True)
        ids = [torch.tensor(tokenizer(self.says(text), add_special_tokens=False).input_ids) for text in asked]
        said = pad_sequence(ids, batch_first=True, padding_value=tokenizer.eos_token_id)
        return torch.cat([prompts, said], dim=1)


@pytest.fixture(scope="module")
def half_right(written: Path) -> Scripted:
    """Right are dates and sorting; sums are one too many; the others go on where an answer should end."""
    known = {record.prompt: record for record in script.read_tasks(written / "tasks")}

    def says(prompt: str) -> str:
        record = known[prompt.strip()]
        if record.kind == "sums":
            return f" {int(record.answer) + 1}"
        return f"{record.answer}\nDate" if record.kind in ("dates", "sorting") else f"{record.answer}0\n"

    model = Scripted(tiny_config()).eval()
    model.says = says
    return model


def test_score(written: Path, half_right: Scripted) -> None:
    records = script.read_tasks(written / "tasks")
    score = script.exact_score(half_right, tiny_tokenizer(), records)
    assert score.right == {"dates": 5, "units": 0, "sums": 0, "sorting": 5, "json": 0}
    assert set(score.records.values()) == {5} and str(score) == "10 of 25"
    assert score.share == 0.4 and score.error == pytest.approx((0.4 * 0.6 / 25) ** 0.5)


@pytest.mark.parametrize(("task", "score"), [("answers", 0.4), ("sorting", 1.0), ("sums", 0.0)])
def test_lm_eval_gives_the_same_score(
    task: str, score: float, written: Path, half_right: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder that was moved, and from another working directory."""
    moved = shutil.copytree(written / "tasks", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    evaluation = TaskEvaluation([str(moved / f"{task}.yaml")])
    assert evaluation.first_metric() == ("exact_match", True)
    (found,) = evaluation.score(half_right, tiny_tokenizer())
    questions = 25 if task == "answers" else 5
    assert found.value == pytest.approx(score) and found.samples == questions
    assert found.stderr == pytest.approx((score * (1 - score) / (questions - 1)) ** 0.5)
