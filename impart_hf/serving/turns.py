"""Requests for several deltas of one engine: those for one delta run together, the others wait for their turn."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from .gate import Gate

MAX_WAIT_VARIABLE, MIN_RESIDENCE_VARIABLE = "IMPART_HF_MAX_WAIT", "IMPART_HF_MIN_RESIDENCE"


def seconds_from(variable: str, default: float) -> float:
    """Return the seconds that a variable of the environment gives, or a default.

    Raises:
        ValueError: if it is no number of seconds.
    """
    setting = os.environ.get(variable, "")
    if not setting:
        return default
    try:
        seconds = float(setting)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{variable}: '{setting}' is no number of seconds, from 0 on")
    return seconds


@dataclass(eq=False)
class _Waiting:
    """A request that waits.

    Attributes:
        name: the delta that it is for.
        since: when it arrived, in the clock's seconds.
        turn: done when the delta is loaded, or could not be.
    """

    name: str
    since: float
    turn: asyncio.Future[None]


class Turns:
    """Admits requests for the loaded delta, and has another one loaded when it is its turn.

    The next delta is that of the request that has waited longest. It is loaded as soon as nothing runs or waits for the
    loaded one, or when the request has waited for `max_wait` seconds, but never before the loaded one has been there
    for `min_residence` seconds.

    Attributes:
        loaded: name of the loaded delta; None if there is none.
    """

    def __init__(
        self,
        gate: Gate,
        load: Callable[[str], Awaitable[object]],
        loaded: str | None,
        *,
        max_wait: float,
        min_residence: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Set up turns.

        Args:
            gate: what running requests are inside of; `load` closes it while weights are exchanged.
            load: loads a delta by name. It calls `now_loaded`. What it raises goes to the requests that wait for it.
            loaded: see the attribute.
            max_wait, min_residence: seconds, see above.
            clock: returns seconds.
        """
        self._gate, self._load, self._clock = gate, load, clock
        self._max_wait, self._min_residence = max_wait, min_residence
        self.loaded, self._loaded_at = loaded, clock() - min_residence
        self._waiting: list[_Waiting] = []
        self._changed = asyncio.Event()
        self._scheduler: asyncio.Task[None] | None = None

    def now_loaded(self, name: str | None) -> None:
        """Note which delta is loaded from now on."""
        self.loaded, self._loaded_at = name, self._clock()
        self._changed.set()

    def waiting(self) -> dict[str, int]:
        """Return how many requests wait, by delta."""
        return dict(Counter(entry.name for entry in self._waiting))

    @asynccontextmanager
    async def request(self, wanted: Callable[[], str]) -> AsyncIterator[None]:
        """Wait until a delta is loaded, and keep it loaded until the context ends.

        Args:
            wanted: returns the delta's name, which may be another one after the request has waited.

        Raises:
            Exception: what loading the delta raised.
        """
        since = self._clock()
        while True:
            async with self._gate.request():
                if self.loaded == wanted():
                    try:
                        yield
                    finally:
                        self._changed.set()
                    return
            await self._turn(wanted(), since)

    async def _turn(self, name: str, since: float) -> None:
        entry = _Waiting(name, since, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self._changed.set()
        if self._scheduler is None or self._scheduler.done():
            self._scheduler = asyncio.create_task(self._schedule())
        try:
            await entry.turn
        finally:
            if entry in self._waiting:  # its client is gone
                self._waiting.remove(entry)
                self._changed.set()

    async def _schedule(self) -> None:
        """Load one delta after the other until no request waits."""
        while self._waiting:
            self._changed.clear()
            name, seconds = self._next()
            if seconds > 0:
                with suppress(TimeoutError, asyncio.TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), seconds)
                continue
            error: Exception | None = None
            if name != self.loaded:
                try:
                    await self._load(name)
                except Exception as raised:
                    error = raised
            self._answer(name, error)
            await asyncio.sleep(0)  # those whose turn it is go through the gate first

    def _next(self) -> tuple[str, float]:
        """Return whose turn is next, and in how many seconds."""
        for entry in self._waiting:
            if entry.name == self.loaded:
                return entry.name, 0
        oldest = min(self._waiting, key=lambda entry: entry.since)
        now = self._clock()
        seconds = self._loaded_at + self._min_residence - now
        if not self._gate.is_empty:
            seconds = max(seconds, oldest.since + self._max_wait - now)
        return oldest.name, seconds

    def _answer(self, name: str, error: Exception | None) -> None:
        """Let the requests for a delta go on, or fail."""
        answered = [entry for entry in self._waiting if entry.name == name]
        self._waiting = [entry for entry in self._waiting if entry.name != name]
        for entry in answered:
            if entry.turn.done():
                continue
            if error is None:
                entry.turn.set_result(None)
            else:
                entry.turn.set_exception(error)
