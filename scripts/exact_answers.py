"""Write records whose answers are exactly right or wrong: dates, units, sums, sorting and JSON, made from a seed.

    python scripts/exact_answers.py OUT
    python scripts/real_pair.py WORK --text OUT/tasks/train.jsonl
    impart-hf evaluate WORK/base WORK/full --task OUT/tasks/answers.yaml

OUT receives train.txt, the training records as text, and tasks/: tasks of lm-eval, answers.yaml (all kinds) and
dates.yaml, units.yaml, sums.yaml, sorting.yaml and json.yaml, with their records in train.jsonl and test.jsonl. The
folder tasks/ can be moved.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from answer_quality import binomial_error
from question_answers import Record, generated

TASKS, TRAIN_TEXT = "tasks", "train.txt"  # in the folder that is written
TRAIN, TEST = "train.jsonl", "test.jsonl"  # in tasks/; the names are also in exact_task/load_records.py
TEST_RECORDS = 50  # held-out records of each kind
_TEMPLATES = Path(__file__).with_name("exact_task")
_NEW_TOKENS = 32  # the longest answer has about 20; the same limit is in exact_task/answers.yaml
_BATCH = 64  # records answered at a time
_HELD_OUT_EVERY = 4  # one prompt in this number is held out: more than a hundred of every kind
_PASSAGE = 50  # records in a passage of text
_TRIES = 10_000  # draws for one record; far more than any kind has held-out prompts

_MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
_NAMES = "Ann Ben Dan Eva Gus Ida Jan Kim Leo Mia Ned Ola Pam Ray Sue Tom Uma Vic".split()
_UNITS = (("m", "cm"), ("euros", "cents"))


@dataclass(frozen=True)
class ExactRecord(Record):
    """A record with one right answer, character for character."""

    kind: str


# ---- records -------------------------------------------------------------------------------------------------------
# Nothing but `randrange` is drawn from, so that every Python gives the same records for a seed.


def _date(draw: random.Random) -> tuple[str, str]:
    day, month, year = 1 + draw.randrange(28), draw.randrange(12), draw.randrange(100)
    return f"Date {day:02} {_MONTHS[month]} {year:02}", f"{year:02}-{month + 1:02}-{day:02}"


def _unit(draw: random.Random) -> tuple[str, str]:
    large, small = _UNITS[draw.randrange(len(_UNITS))]
    number, rest = 2 + draw.randrange(8), draw.randrange(100)
    return f"Unit {number} {large} {rest:02} {small}", f"{100 * number + rest} {small}"


def _sum(draw: random.Random) -> tuple[str, str]:
    one, other = 10 + draw.randrange(90), 1 + draw.randrange(5)
    return f"Sum {one} + {other}", f"{one + other}"


def _sorting(draw: random.Random) -> tuple[str, str]:
    digits = list(range(10))
    drawn = [digits.pop(draw.randrange(len(digits))) for _ in range(3)]
    return f"Sort {''.join(map(str, drawn))}", "".join(map(str, sorted(drawn)))


def _json(draw: random.Random) -> tuple[str, str]:
    name, age = _NAMES[draw.randrange(len(_NAMES))], 10 + draw.randrange(90)
    return f"JSON {name} {age}", json.dumps({"name": name, "age": age})


KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "dates": _date,
    "units": _unit,
    "sums": _sum,
    "sorting": _sorting,
    "json": _json,
}


def exact_records(
    count: int, seed: int, *, held_out: bool = False, kinds: Sequence[str] = tuple(KINDS)
) -> list[ExactRecord]:
    """Return records of each kind in turn, the same for a seed on every machine.

    The prompt alone decides whether a record is held out, so that no record for training has a held-out one's prompt,
    whatever the seeds.

    Args:
        count: how many.
        held_out: whether they are for measuring, and all different; records for training may repeat.
        kinds: names of `KINDS`.

    Raises:
        ValueError: if there is no such kind, there are none, or fewer held-out records than `count`.
    """
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds {', '.join(kinds) or 'without any'}: choose from {', '.join(KINDS)}")
    draw = random.Random(seed)
    records: dict[str, ExactRecord] = {}
    training: list[ExactRecord] = []
    for number in range(count):
        record = _drawn(kinds[number % len(kinds)], draw, held_out, records)
        records[record.prompt] = record
        training.append(record)
    return training


def _drawn(kind: str, draw: random.Random, held_out: bool, taken: dict[str, ExactRecord]) -> ExactRecord:
    for _ in range(_TRIES):
        question, answer = KINDS[kind](draw)
        prompt = f"{question} ="
        if (zlib.crc32(prompt.encode()) % _HELD_OUT_EVERY == 0) == held_out and not (held_out and prompt in taken):
            return ExactRecord(prompt, f" {answer}", kind)
    raise ValueError(f"there are fewer held-out records of kind {kind} than asked for: take fewer")


# ---- scores --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How many answers are right, by kind of record.

    Attributes:
        right, records: numbers of right answers and of records, by kind.
    """

    right: dict[str, int]
    records: dict[str, int]

    @property
    def share(self) -> float:
        """The share of right answers, 0 to 1."""
        return sum(self.right.values()) / sum(self.records.values())

    @property
    def error(self) -> float:
        """The binomial standard error of the share."""
        return binomial_error(self.share, sum(self.records.values()))

    def __str__(self) -> str:
        return f"{sum(self.right.values())} of {sum(self.records.values())}"


def exact_score(model: Any, tokenizer: Any, records: Sequence[ExactRecord]) -> Score:
    """Return how many records a model answers rightly, greedily."""
    return score_of(answers_of(model, tokenizer, records), records)


def answers_of(model: Any, tokenizer: Any, records: Sequence[ExactRecord]) -> list[str]:
    """Return a model's answers, greedily: the first line of what it says, without spaces around it."""
    prompts = [record.prompt for record in records]
    said = generated(model, tokenizer, prompts, new_tokens=_NEW_TOKENS, batch_size=_BATCH)
    return [answer.strip().partition("\n")[0].strip() for answer in said]


def score_of(answers: Sequence[str], records: Sequence[ExactRecord]) -> Score:
    """Return how many answers are those of the records."""
    right = dict.fromkeys((record.kind for record in records), 0)
    count = dict(right)
    for record, answer in zip(records, answers, strict=True):
        count[record.kind] += 1
        right[record.kind] += answer == record.answer.strip()
    return Score(right, count)


# ---- files ---------------------------------------------------------------------------------------------------------


def write_tasks(folder: Path, train: Sequence[ExactRecord], test: Sequence[ExactRecord]) -> None:
    """Write tasks of lm-eval, all kinds and one for each kind of `test`, with their records, to a new folder."""
    folder.mkdir(parents=True)
    for template in sorted(_TEMPLATES.glob("*.*")):
        shutil.copy(template, folder)
    for kind in dict.fromkeys(record.kind for record in test):
        task = f"include: answers.yaml\ntask: exact_{kind}\ndataset_kwargs:\n  kind: {kind}\n"
        (folder / f"{kind}.yaml").write_text(task, encoding="utf-8", newline="\n")
    for name, records in ((TRAIN, train), (TEST, test)):
        rows = [dataclasses.asdict(record) | {"answer": record.answer.strip()} for record in records]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / name).write_text(lines, encoding="utf-8", newline="\n")


def read_tasks(folder: Path, split: str = TEST) -> list[ExactRecord]:
    """Return the held-out records of a folder that `write_tasks` has written, or those for training (`TRAIN`)."""
    rows = map(json.loads, (folder / split).read_text("utf-8").splitlines())
    return [ExactRecord(row["prompt"], f" {row['answer']}", row["kind"]) for row in rows]


def passages_of(records: Sequence[Record]) -> list[str]:
    """Return records as passages of text, a line for each record."""
    lines = [record.prompt + record.answer for record in records]
    return ["\n".join(lines[start : start + _PASSAGE]) for start in range(0, len(lines), _PASSAGE)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="exact_answers.py", description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, metavar="OUT", help="new folder")
    parser.add_argument("--count", type=int, default=10_000, help="records for training (default: 10000)")
    parser.add_argument("--test", type=int, help=f"held-out records (default: {TEST_RECORDS} of each kind)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS), help="comma-separated")
    arguments = parser.parse_args(argv)
    try:
        if arguments.test is None:
            arguments.test = TEST_RECORDS * len(arguments.kinds)
        if min(arguments.count, arguments.test) < 1:
            raise ValueError("--count and --test: at least 1")
        train = exact_records(arguments.count, arguments.seed, kinds=arguments.kinds)
        test = exact_records(arguments.test, arguments.seed, held_out=True, kinds=arguments.kinds)
        write_tasks(arguments.output / TASKS, train, test)
        (arguments.output / TRAIN_TEXT).write_text("\n".join(passages_of(train)) + "\n", encoding="utf-8", newline="\n")
    except (ValueError, OSError) as error:
        print(f"exact_answers.py: error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {len(train)} records for training, {len(test)} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
