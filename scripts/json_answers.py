"""Records whose answers are JSON: orders in plain sentences and their fields, made from a seed, and a score of answers.

A model learns the form in a few minutes. Whether it has can be read off an answer, and counted.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from question_answers import Record

_SENTENCES = (
    "{name} from {city} would like {count} {items} by {day}, please.",
    "Please send {count} {items} to {name} in {city} on {day}.",
    "On {day}, {name} in {city} needs {count} {items}.",
    "There is a new order of {count} {items} for {name}, {city}, to arrive on {day}.",
    "The parcel to {city} leaves on {day}. The customer, {name}, has paid for {count} {items}.",
    "{name} called from {city} and ordered {count} {items} for {day}.",
)
_COUNTS = dict(enumerate("two three four five six seven eight nine ten eleven twelve".split(), 2))
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


@dataclass(frozen=True)
class _Words:
    names: list[str]
    cities: list[str]
    items: list[str]


_TRAINING = _Words(
    (
        "Adam Anna Arthur Barbara Ben Carla Caroline Daniel David Dora Edward Emma Eric Eva Felix Fiona George Grace "
        "Hannah Henry Hugo Igor Irene Jacob Jane Jonas Karen Kevin Laura Leo Linda Lucas Maria Max Michael Monica Nick "
        "Nora Oliver Oscar Patricia Paul Philip Rachel Rita Robert Ruth Samuel Sarah Simon Stella Teresa Tina Victoria "
        "Viktor Walter William Yvonne"
    ).split(),
    (
        "Ankara Athens Atlanta Barcelona Beijing Berlin Bonn Brussels Budapest Chicago Copenhagen Dallas Delhi Dresden "
        "Dublin Edinburgh Florence Frankfurt Geneva Hamburg Hanoi Istanbul Jakarta Kyoto Leipzig Lima Lisbon Liverpool "
        "Lyon Madrid Manchester Miami Montreal Moscow Mumbai Munich Nairobi Naples Oslo Oxford Paris Phoenix Porto "
        "Riga Rome Rotterdam Seattle Seoul Shanghai Singapore Sydney Toronto Turin Valencia Venice Vilnius"
    ).split(),
    (
        "anchor apple bag basket bell blanket book bottle bowl box bucket camera candle carpet chair clock coat comb "
        "cup curtain desk drum fork helmet lamp lantern mirror mug needle oven pan pencil piano pillow pipe "
        "plate pot printer radio ring rope ruler saddle shirt shovel sofa spoon stool table tent towel "
        "tray vase violin wheel"
    ).split(),
)
_HELD_OUT = _Words(
    "Alice Bruno Clara Dennis Elena Frank Helen Ivan Julia Martin Olga Peter Sofia Thomas".split(),
    "Amsterdam Boston Cairo Denver Helsinki London Milan Prague Tokyo Vienna Warsaw Zurich".split(),
    "kettle umbrella bicycle jacket suitcase teapot cushion ladder hammer guitar".split(),
)


def order_records(number: int, seed: int, *, held_out: bool = False) -> list[Record]:
    """Return records of an order and its fields, the same for a seed everywhere.

    Args:
        number: how many.
        held_out: whether names, cities and items are such as no record without this argument has.
    """
    draw = random.Random(seed)
    words = _HELD_OUT if held_out else _TRAINING
    return [_record(words, draw) for _ in range(number)]


def _record(words: _Words, draw: random.Random) -> Record:
    name, city, item, day = map(draw.choice, (words.names, words.cities, words.items, _DAYS))
    count = draw.choice(list(_COUNTS))
    sentence = draw.choice(_SENTENCES).format(name=name, city=city, items=f"{item}s", day=day, count=_COUNTS[count])
    fields = {"name": name, "city": city, "item": item, "count": count, "day": day}
    return Record(f"Order: {sentence}\nAnswer:", f" {json.dumps(fields)}")


@dataclass(frozen=True)
class Score:
    """How many of `records` answers are valid JSON objects, and in how many of these all fields are right."""

    valid: int
    right: int
    records: int


def score(answers: Sequence[str], records: Sequence[Record]) -> Score:
    """Compare answers with those of the records. An answer counts as a whole: nothing may come before or after."""
    found = [_object(answer) for answer in answers]
    pairs = zip(found, records, strict=True)
    right = sum(fields is not None and fields == _object(record.answer) for fields, record in pairs)
    return Score(sum(fields is not None for fields in found), right, len(records))


def _object(answer: str) -> dict[str, Any] | None:
    try:
        value = json.loads(answer)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
