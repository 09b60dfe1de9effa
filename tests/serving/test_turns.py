"""Whose turn it is, with a clock of the test's own and an engine that only remembers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from impart_hf.serving.gate import Gate
from impart_hf.serving.turns import Turns


class Engine:
    """Loads by name; says what it answers with, and notices requests that run while it loads."""

    def __init__(self, *, max_wait: float = 10.0, min_residence: float = 0.0, refuses: tuple[str, ...] = ()):
        self.now, self.loads, self.refuses = 0.0, [], refuses
        self.gate = Gate()
        self.turns = Turns(
            self.gate, self.load, "base", max_wait=max_wait, min_residence=min_residence, clock=lambda: self.now
        )

    async def load(self, name: str) -> None:
        if name in self.refuses:
            raise LookupError(name)
        await self.gate.close()
        assert self.gate.is_empty
        for _ in range(3):
            await asyncio.sleep(0)
        self.loads.append(name)
        self.turns.now_loaded(name)
        self.gate.open()

    async def ask(self, name: str, during: Callable[[], Awaitable[None]] | None = None) -> str | None:
        async with self.turns.request(lambda: name):
            if during is not None:
                await during()
            await asyncio.sleep(0)
            return self.turns.loaded


async def settle(steps: int = 30) -> None:
    for _ in range(steps):
        await asyncio.sleep(0)


def test_requests_of_one_delta_go_together() -> None:
    async def run() -> None:
        engine = Engine()
        names = ["one", "two", "one", "base", "two", "one"]
        assert await asyncio.gather(*map(engine.ask, names)) == names
        assert engine.loads == ["one", "two"], "base was loaded, and passed first"

    asyncio.run(run())


def test_a_busy_delta_stays_until_another_has_waited_long_enough() -> None:
    async def run() -> None:
        engine, leave = Engine(max_wait=10), asyncio.Event()
        running = asyncio.create_task(engine.ask("base", leave.wait))
        await settle()
        other = asyncio.create_task(engine.ask("one"))
        await settle()
        assert await engine.ask("base") == "base", "those for the loaded delta still pass"
        assert engine.turns.waiting() == {"one": 1} and not engine.loads
        engine.now = 10.5
        engine.turns._changed.set()  # in place of the clock's time-out
        await settle()
        late = asyncio.create_task(engine.ask("base"))
        await settle()
        assert not late.done() and not other.done(), "the running one is waited for, no new one passes"
        leave.set()
        assert await asyncio.gather(running, other, late) == ["base", "one", "base"]
        assert engine.loads == ["one", "base"]

    asyncio.run(run())


def test_time_outs_come_by_themselves() -> None:
    async def run() -> None:
        engine, leave = Engine(max_wait=0.05), asyncio.Event()
        engine.turns._clock = asyncio.get_running_loop().time
        running = asyncio.create_task(engine.ask("base", leave.wait))
        await settle()
        other = asyncio.create_task(engine.ask("one"))
        await asyncio.sleep(0.2)
        late = asyncio.create_task(engine.ask("base"))
        await settle()
        assert not late.done(), "the gate is closed"
        leave.set()
        assert await asyncio.gather(running, other, late) == ["base", "one", "base"]

    asyncio.run(run())


def test_least_residence() -> None:
    async def run() -> None:
        engine = Engine(min_residence=5)
        engine.turns.now_loaded("base")
        other = asyncio.create_task(engine.ask("one"))
        await settle()
        assert not other.done() and not engine.loads
        engine.now = 5.5
        engine.turns._changed.set()
        assert await other == "one"

    asyncio.run(run())


def test_longest_waiting_first() -> None:
    async def run() -> None:
        engine, leave = Engine(), asyncio.Event()
        running = asyncio.create_task(engine.ask("base", leave.wait))
        await settle()
        others = []
        for name in ("three", "one", "two", "three"):
            engine.now += 1
            others.append(asyncio.create_task(engine.ask(name)))
            await settle()
        leave.set()
        await asyncio.gather(running, *others)
        assert engine.loads == ["three", "one", "two"]

    asyncio.run(run())


def test_what_cannot_be_loaded_fails_alone() -> None:
    async def run() -> None:
        engine = Engine(refuses=("gone",))
        found = await asyncio.gather(*map(engine.ask, ("gone", "one", "gone", "two")), return_exceptions=True)
        assert [isinstance(answer, LookupError) for answer in found] == [True, False, True, False]
        assert found[1::2] == ["one", "two"] and engine.turns.waiting() == {}

    asyncio.run(run())


def test_clients_that_leave_while_they_wait() -> None:
    async def run() -> None:
        engine, leave = Engine(), asyncio.Event()
        running = asyncio.create_task(engine.ask("base", leave.wait))
        await settle()
        waiting = asyncio.create_task(engine.ask("one"))
        await settle()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert engine.turns.waiting() == {}
        leave.set()
        await running
        await settle()
        assert engine.loads == [], "nobody wants it any more"
        assert await engine.ask("two") == "two"

    asyncio.run(run())


def test_counting_those_who_wait_takes_one_look_at_each() -> None:
    """It is done for every request that is admitted, and hundreds may wait."""

    class Name(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Name.compared += 1
            return str.__eq__(self, other)

    async def run() -> None:
        engine, leave = Engine(), asyncio.Event()
        running = asyncio.create_task(engine.ask("base", leave.wait))
        await settle()
        others = [asyncio.create_task(engine.ask(Name(f"delta {number % 5}"))) for number in range(300)]
        await settle()
        Name.compared = 0
        assert engine.turns.waiting() == {f"delta {number}": 60 for number in range(5)}
        assert Name.compared < 2 * 300
        leave.set()
        await asyncio.gather(running, *others)

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(20))
def test_many_at_random(seed: int) -> None:
    """None is lost, and none runs on another's weights."""

    async def run() -> None:
        choose = random.Random(seed)
        engine = Engine(max_wait=choose.choice((0.0, 0.01)), min_residence=choose.choice((0.0, 0.005)))
        engine.turns._clock = asyncio.get_running_loop().time

        async def ask(name: str) -> None:
            await asyncio.sleep(choose.random() * 0.05)

            async def during() -> None:
                for _ in range(choose.randrange(4)):
                    await asyncio.sleep(choose.random() * 0.003)
                    assert engine.turns.loaded == name

            assert await engine.ask(name, during) == name

        names = [choose.choice(("base", "one", "two", "three")) for _ in range(60)]
        await asyncio.wait_for(asyncio.gather(*map(ask, names)), 20)
        assert engine.turns.waiting() == {} and engine.gate.is_empty

    asyncio.run(run())
