"""Generate exercises with answers from a seed: sums, sorting, and sentences as JSON. The task of the pair `wide`."""

from __future__ import annotations

import json
import random
from pathlib import Path

_NAMES = ("Ada", "Bela", "Chidi", "Dora", "Emil", "Fatima", "Goran", "Hana", "Ivo", "June", "Kofi", "Lena")
_TOWNS = ("Accra", "Bergen", "Cusco", "Delhi", "Essen", "Fargo", "Genoa", "Hanoi", "Izmir", "Kyoto", "Lima", "Minsk")
_THINGS = ("apple", "brick", "candle", "drum", "eraser", "fork", "glove", "hammer", "inkpot", "jar", "kite", "lamp")


def write_exercises(path: Path, count: int = 8000, seed: int = 0) -> None:
    """Write distinct exercises, one JSON object per line, as `train_pair` reads them; a seed always gives the same."""
    draw = random.Random(seed)
    exercises: dict[str, str] = {}
    while len(exercises) < count:
        question, answer = draw.choice((_sum, _sorting, _record))(draw)
        exercises[question] = answer
    lines = (json.dumps({"question": question, "answer": answer}) for question, answer in exercises.items())
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _sum(draw: random.Random) -> tuple[str, str]:
    """Return a sum of two numbers, added digit by digit from the last one."""
    numbers = draw.randrange(100, 10_000), draw.randrange(100, 10_000)
    steps, carry, digits = [], 0, [f"{number:04}"[::-1] for number in numbers]
    for one, other in zip(*digits, strict=True):
        total = int(one) + int(other) + carry
        steps.append(f"{one} + {other} + {carry} = {total}")
        carry = total // 10
    return f"What is {numbers[0]} + {numbers[1]}?", f"{'; '.join(steps)}. The sum is {sum(numbers)}."


def _sorting(draw: random.Random) -> tuple[str, str]:
    words = draw.sample(_NAMES + _TOWNS + _THINGS, draw.randrange(3, 8))
    down = draw.random() < 0.5
    answer = ", ".join(sorted(words, key=str.lower, reverse=down))
    return f"Sort {', '.join(words)} from {'Z to A' if down else 'A to Z'}.", answer


def _record(draw: random.Random) -> tuple[str, str]:
    name, town, thing = draw.choice(_NAMES), draw.choice(_TOWNS), draw.choice(_THINGS)
    count, price = draw.randrange(2, 60), draw.randrange(2, 40)
    record = {"buyer": name, "town": town, "item": thing, "count": count, "price": price, "total": count * price}
    return f"{name} of {town} buys {count} {thing}s at {price} each. Write it as JSON.", json.dumps(record)
