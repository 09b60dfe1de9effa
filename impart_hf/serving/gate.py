"""A gate that holds requests back while weights are swapped, and waits for the running ones to finish."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any


class Gate:
    """Requests pass while the gate is open; closing it waits for those that have passed."""

    def __init__(self) -> None:
        self._opened, self._empty = asyncio.Event(), asyncio.Event()
        self._opened.set()
        self._empty.set()
        self._inside = 0

    @property
    def is_empty(self) -> bool:
        """Whether no request is running."""
        return not self._inside

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Wait until the gate is open, and count as a running request until the context ends."""
        while not self._opened.is_set():  # the gate may be closed again before this task runs
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
        """Admit no more requests, and wait until the last running one has finished."""
        self._opened.clear()
        await self._empty.wait()

    def open(self) -> None:
        """Admit requests again."""
        self._opened.set()


def gated(generate: Callable[..., AsyncGenerator[Any, None]], gate: Gate) -> Callable[..., AsyncGenerator[Any, None]]:
    """Wrap an asynchronous generator function, so that each of its generators is a request at the gate."""

    async def generate_inside(*arguments: Any, **options: Any) -> AsyncGenerator[Any, None]:
        async with gate.request(), aclosing(generate(*arguments, **options)) as outputs:
            async for output in outputs:
                yield output

    return generate_inside
