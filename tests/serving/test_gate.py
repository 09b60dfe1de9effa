"""The gate that holds requests back during a swap."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from impart_hf.serving.gate import Gate, gated


def test_closing_waits_for_those_inside_and_holds_the_others_back() -> None:
    async def run() -> list[str]:
        gate, said = Gate(), []
        leave = asyncio.Event()

        async def request(name: str) -> None:
            async with gate.request():
                said.append(f"{name} enters")
                await leave.wait()
            said.append(f"{name} leaves")

        first = asyncio.create_task(request("first"))
        await asyncio.sleep(0)
        closing = asyncio.create_task(gate.close())
        await asyncio.sleep(0)
        second = asyncio.create_task(request("second"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert said == ["first enters"] and not closing.done()
        leave.set()
        await closing
        await first
        assert said == ["first enters", "first leaves"]
        gate.open()
        await second
        return said

    assert asyncio.run(run()) == ["first enters", "first leaves", "second enters", "second leaves"]


def test_a_gate_that_is_closed_again_at_once_lets_nobody_in() -> None:
    async def run() -> None:
        gate = Gate()
        await gate.close()
        waiting = asyncio.create_task(gate.request().__aenter__())
        await asyncio.sleep(0)
        gate.open()
        await gate.close()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        gate.open()
        await waiting

    asyncio.run(run())


@pytest.mark.parametrize("end", ["finished", "left", "cancelled", "failed"])
def test_however_a_generator_ends_it_has_left(end: str) -> None:
    async def run() -> None:
        gate, closed = Gate(), []

        async def generate(count: int) -> AsyncGenerator[int, Any]:
            try:
                for number in range(count):
                    yield number
                    if end == "failed":
                        raise ValueError("broken")
                    await asyncio.sleep(3600 if end == "cancelled" else 0)
            finally:
                closed.append(True)

        outputs = gated(generate, gate)(3)
        assert await anext(outputs) == 0
        if end == "finished":
            assert [number async for number in outputs] == [1, 2]
        elif end == "left":
            await outputs.aclose()
        elif end == "cancelled":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(outputs), 0.01)
        else:
            with pytest.raises(ValueError, match="broken"):
                await anext(outputs)
        assert closed == [True]
        await asyncio.wait_for(gate.close(), 5)

    asyncio.run(run())
