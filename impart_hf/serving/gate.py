"""What holds requests back while weights are swapped, and lets those finish that are inside."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any


class Gate:
    """Requests pass while it is open; closing it waits for those inside."""

    def __init__(self) -> None:
        self._opened, self._empty = asyncio.Event(), asyncio.Event()
        self._opened.set()
        self._empty.set()
        self._inside = 0

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """A request's time inside, which begins when the gate is open."""
        while not self._opened.is_set():  # it may have been closed again before this task has its turn
            await self._opened.wait()
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    async def close(self) -> None:
        """Let no request in any more, and wait until the last one has left."""
        self._opened.clear()
        await self._empty.wait()

    def open(self) -> None:
        """Let requests in again."""
        self._opened.set()


def gated(generate: Callable[..., AsyncGenerator[Any, None]], gate: Gate) -> Callable[..., AsyncGenerator[Any, None]]:
    """An asynchronous generator function whose generators each are a request at the gate."""

    async def generate_inside(*arguments: Any, **options: Any) -> AsyncGenerator[Any, None]:
        async with gate.request(), aclosing(generate(*arguments, **options)) as outputs:
            async for output in outputs:
                yield output

    return generate_inside
