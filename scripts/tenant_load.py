"""Load on OpenAI-compatible servers: questions of many tenants, at fixed times or so many at once, and their answers.

The client never waits for a server before it sends the next question of an open loop, and latency counts from the
moment at which a question was due, so that a queue in front of the server is not hidden.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

PERCENTILES = (50, 90, 99)
LONGEST_PATIENCE = 10.0
_KEPT_SECONDS = 2  # an idle connection; vLLM closes it after 5, when a question might just be on its way


@dataclass(frozen=True)
class Question:
    """What a tenant asks.

    Attributes:
        tenant: the tenant's number.
        prompt: the prompt's number.
        at: seconds after the start at which it is due.
        chat: whether it goes to the chat route; otherwise to completions.
        stream: whether the answer comes in parts.
        patience: seconds after which its client leaves; None if it stays.
    """

    tenant: int
    prompt: int
    at: float = 0.0
    chat: bool = False
    stream: bool = True
    patience: float | None = None


@dataclass
class Answer:
    """What came back; times are those of one monotonic clock, in seconds.

    Attributes:
        due: when the question should have been sent.
        sent: when it was sent.
        first: when the first text came; None if none did, or if the answer was not streamed.
        done: when the answer was complete, or had failed.
        tokens: number of tokens, as the server counts them.
        ids: the tokens, if the server was asked for them.
        error: what went wrong; None if nothing did.
        left: whether the client has left before the end.
    """

    question: Question
    due: float
    sent: float
    first: float | None = None
    done: float = 0.0
    text: str = ""
    tokens: int = 0
    ids: list[int] = field(default_factory=list)
    error: str | None = None
    left: bool = False


@dataclass(frozen=True)
class Expected:
    """The right answer.

    Attributes:
        ids: its tokens.
        text: their text; None if it breaks off inside a character, which servers show in different ways.
    """

    ids: list[int]
    text: str | None


@dataclass(frozen=True)
class Target:
    """Where a tenant's questions go: a server's address, and the model's name there."""

    url: str
    model: str


def arrivals(
    rate: float, seconds: float, weights: Sequence[float], prompts: int, seed: int, stream: bool = True
) -> list[Question]:
    """Return the questions of an open loop: Poisson arrivals at a mean rate, in order.

    Args:
        rate: questions in a second.
        seconds: length of the loop.
        weights: for each tenant, the chance of a question being its, up to a common factor.
        prompts: number of prompts to choose from.
    """
    choose, found, at = random.Random(seed), list[Question](), 0.0
    while (at := at + choose.expovariate(rate)) < seconds:
        (tenant,) = choose.choices(range(len(weights)), weights)
        found.append(Question(tenant, choose.randrange(prompts), at, stream=stream))
    return found


def zipf(tenants: int, exponent: float) -> list[float]:
    """Return weights that fall as the rank to the minus `exponent`."""
    return [(rank + 1) ** -exponent for rank in range(tenants)]


def mixture(tenants: int, prompts: int, chat: bool, seed: int, leaving: float = 0.0) -> Iterator[Question]:
    """Yield questions without end: every tenant alike, streamed or not, and half of them chats if `chat`.

    Args:
        leaving: share of clients that leave, at a time up to `LONGEST_PATIENCE` seconds after they have asked.
    """
    choose = random.Random(seed)
    while True:
        tenant, prompt = choose.randrange(tenants), choose.randrange(prompts)
        as_chat, stream = chat and choose.random() < 0.5, choose.random() < 0.5
        patience = LONGEST_PATIENCE * choose.random() if choose.random() < leaving else None
        yield Question(tenant, prompt, chat=as_chat, stream=stream, patience=patience)


class Client:
    """Asks questions of servers, as many at once as it is told to; an asynchronous context manager."""

    def __init__(
        self, targets: Sequence[Target], prompts: Sequence[str], tokens: int, timeout: float = 600.0, ids: bool = False
    ):
        """Set up a client.

        Args:
            targets: for each tenant.
            prompts: texts.
            tokens: the length of every answer.
            timeout: seconds after which an answer is given up.
            ids: whether to ask for the tokens themselves, by a field of vLLM's.
        """
        self._targets, self._prompts, self._tokens, self._timeout = targets, prompts, tokens, timeout
        self._more = {"return_token_ids": True} if ids else {}

    @property
    def tenants(self) -> int:
        """The number of tenants."""
        return len(self._targets)

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_SECONDS),  # no limit
            timeout=aiohttp.ClientTimeout(total=self._timeout),
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def ask(self, question: Question, due: float | None = None) -> Answer:
        """Ask a question now, and return its answer; whatever goes wrong is in the answer."""
        now = time.monotonic()
        answer = Answer(question, now if due is None else due, now)
        try:
            await asyncio.wait_for(self._ask(question, answer), question.patience)
        except (asyncio.TimeoutError, TimeoutError):
            answer.left = True
        answer.done = time.monotonic()
        return answer

    async def _ask(self, question: Question, answer: Answer) -> None:
        target = self._targets[question.tenant]
        route = "chat/completions" if question.chat else "completions"
        try:
            async with self._session.post(f"{target.url}/v1/{route}", json=self._body(question, target)) as response:
                if response.status != 200:
                    raise ValueError(f"status {response.status}: {(await response.text())[:300]}")
                if question.stream:
                    await _read_parts(response, answer)
                else:
                    _take(await response.json(), answer)
            if answer.tokens != self._tokens:
                raise ValueError(f"{answer.tokens} tokens in place of {self._tokens}")
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, LookupError, OSError) as error:
            answer.error = f"{type(error).__name__}: {error}"

    def _body(self, question: Question, target: Target) -> dict[str, Any]:
        prompt = self._prompts[question.prompt]
        asked = {"messages": [{"role": "user", "content": prompt}]} if question.chat else {"prompt": prompt}
        streamed = {"stream": True, "stream_options": {"include_usage": True}} if question.stream else {}
        length = {"max_tokens": self._tokens, "ignore_eos": True}  # so that all ways have the same work
        return {"model": target.model, "temperature": 0} | asked | length | streamed | self._more


async def _read_parts(response: aiohttp.ClientResponse, answer: Answer) -> None:
    """Read an answer that comes as server-sent events.

    Raises:
        ValueError: if it breaks off, or tells of an error.
    """
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        if line[6:].strip() == b"[DONE]":
            return
        _take(json.loads(line[6:]), answer)
        if answer.first is None and answer.text:
            answer.first = time.monotonic()
    raise ValueError("the answer broke off")


def _take(body: dict[str, Any], answer: Answer) -> None:
    """Add what a body, or a part of one, holds."""
    if "error" in body:
        raise ValueError(str(body["error"])[:300])
    for choice in body["choices"]:
        spoken = choice.get("message") or choice.get("delta") or {}
        answer.text += choice.get("text") or spoken.get("content") or ""
        answer.ids += choice.get("token_ids") or []
    if usage := body.get("usage"):
        answer.tokens = usage["completion_tokens"]


async def open_loop(client: Client, questions: Sequence[Question]) -> list[Answer]:
    """Ask questions when they are due, whatever became of the ones before, and return all answers."""
    started, tasks = time.monotonic(), []
    for question in questions:
        due = started + question.at
        if (wait := due - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(client.ask(question, due)))
    return await asyncio.gather(*tasks)


async def closed_loop(
    client: Client,
    questions: Iterator[Question],
    concurrency: int,
    seconds: float,
    each: Callable[[Answer], None] = lambda answer: None,
) -> list[Answer]:
    """Have so many questions asked at any time, until the seconds are over, and return all answers.

    Args:
        each: is called with every answer as it comes.
    """
    answers: list[Answer] = []
    end = time.monotonic() + seconds

    async def always() -> None:
        while time.monotonic() < end:
            answers.append(await client.ask(next(questions)))
            each(answers[-1])
            if answers[-1].error:
                await asyncio.sleep(0.1)  # a server that is gone is not asked as fast as the processor can

    await asyncio.gather(*(always() for _ in range(concurrency)))
    return answers


def summary(answers: Sequence[Answer]) -> dict[str, float | int | None]:
    """Return throughput, and percentiles of latency and of the time to the first token, all in seconds.

    Failed questions count in `failed` alone. `client_lag` is how late the client itself sent a question at most.
    """
    good = [answer for answer in answers if answer.error is None]
    seconds = max(a.done for a in good) - min(a.due for a in answers) if good else 0.0
    latency = _percentiles("latency", [answer.done - answer.due for answer in good])
    first = _percentiles("first_token", [answer.first - answer.due for answer in good if answer.first is not None])
    return {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "requests_per_second": len(good) / seconds if seconds else None,
        "tokens_per_second": sum(answer.tokens for answer in good) / seconds if seconds else None,
        **latency,
        **first,
        "client_lag": max((answer.sent - answer.due for answer in answers), default=0.0),
    }


def _percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    found = np.percentile(values, PERCENTILES).tolist() if values else itertools.repeat(None)
    return {f"{name}_p{percent}": value for percent, value in zip(PERCENTILES, found, strict=False)}


@dataclass
class Verdict:
    """Counts what a check finds.

    Attributes:
        expected: the right answers, by tenant, prompt and whether it is a chat.
        requests, wrong, lost, left: numbers of answers; a lost one is an error, or nothing at all, and of one whose
            client has left, only what it has got by then is judged.
        longest: seconds of the slowest answer.
        told: descriptions of the first few that were wrong or lost.
    """

    expected: dict[tuple[int, int, bool], Expected]
    requests: int = 0
    wrong: int = 0
    lost: int = 0
    left: int = 0
    longest: float = 0.0
    told: tuple[str, ...] = ()

    def add(self, answer: Answer) -> None:
        """Judge an answer."""
        question = answer.question
        self.requests += 1
        self.longest = max(self.longest, answer.done - answer.due)
        right = self.expected[question.tenant, question.prompt, question.chat]
        if answer.error is not None:
            self.lost += 1
            self._tell(f"lost: {question}: {answer.error}")
        elif answer.left and answer.ids == right.ids[: len(answer.ids)]:
            self.left += 1
        elif answer.left or answer.ids != right.ids or right.text not in (None, answer.text):
            self.wrong += 1
            of = {tenant for (tenant, *_), other in self.expected.items() if other.ids == answer.ids}
            whose = f", which is tenant {min(of)}'s" if of else ""
            self._tell(f"wrong: {question}: {answer.text!r} {answer.ids}{whose}, in place of {right}")

    def _tell(self, what: str) -> None:
        if len(self.told) < 5:
            self.told += (what,)
