"""A language model as a judge, behind any server with OpenAI's interface for chats (`POST URL/chat/completions`)."""

import math
import os
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

KEY_VARIABLE = "JUDGE_API_KEY"
LONGEST_WAIT = 120.0  # seconds between two attempts
_PASSING = (408, 409, 425, 429)  # HTTP's errors of clients that another attempt may not meet; those of servers are all


class JudgeError(OSError):
    """A judge that does not answer."""


@dataclass(frozen=True)
class JudgeSettings:
    """Which judge, and how it is asked.

    Attributes:
        url: where the interface begins, such as https://api.openai.com/v1. The key is taken from the environment
            variable JUDGE_API_KEY alone; without it, none is sent.
        model: the judge's name there.
        max_tokens: the most tokens of an answer; None for the server's own limit, which a judge needs that thinks
            before it answers.
        concurrency: requests at a time.
        timeout: seconds until a request without an answer is given up.
        attempts: how often a request is sent until it is answered.
        first_wait: seconds before the second attempt, about; before each further one, twice as many.

    Raises:
        ValueError: if a value is out of range.
    """

    url: str
    model: str
    max_tokens: int | None = 16
    concurrency: int = 8
    timeout: float = 120.0
    attempts: int = 8
    first_wait: float = 1.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        is_url = parts.scheme in ("http", "https") and parts.hostname and self.url.isprintable()
        if not is_url or parts.query or parts.fragment:
            raise ValueError(f"the judge's URL must be http://HOST… or https://HOST…, got {self.url!r}")
        parts.port  # noqa: B018  (raises a ValueError if it is no port)
        if not self.model:
            raise ValueError("the judge's model has no name")
        for name in ("max_tokens", "concurrency", "attempts"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"the judge's {name} must be at least 1, got {value}")
        for name in ("timeout", "first_wait"):
            if not getattr(self, name) > 0:
                raise ValueError(f"the judge's {name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Choice:
    """What a judge says if it is to choose between two names.

    Attributes:
        text: its answer.
        name: the name that its answer is; None if it is neither.
        weight: the probability of the first name against the second at the place of the answer; None if the judge
            gives no probabilities.
    """

    text: str
    name: str | None
    weight: float | None


class Judge:
    """Asks a judge; threads may share it."""

    def __init__(self, settings: JudgeSettings):
        """Make a client; nothing is sent."""
        import httpx

        self.settings = settings
        key = os.environ.get(KEY_VARIABLE, "").strip()
        self._url = settings.url.rstrip("/") + "/chat/completions"
        self._client = httpx.Client(
            timeout=settings.timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=settings.concurrency),
        )
        self._stopped = threading.Event()
        # Some servers refuse one or the other, and are then asked without it.
        self._options: dict[str, Any] = {"temperature": 0, "logprobs": True, "top_logprobs": 5}
        if settings.max_tokens is not None:
            self._options["max_tokens"] = settings.max_tokens

    def stop(self) -> None:
        """Make no further attempts: requests that wait for another end with a `JudgeError`."""
        self._stopped.set()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def choose(self, messages: Sequence[Mapping[str, str]], names: tuple[str, str]) -> Choice:
        """Ask a question whose answer is one of two names.

        Args:
            messages: the chat, which asks for one of the names and nothing else.
            names: the two names; each one token to most judges.

        Raises:
            JudgeError: if there is no answer.
        """
        choice = self._answer(messages)
        text = choice["message"].get("content") or ""
        weight = None
        try:
            weight = _weight(choice["logprobs"]["content"], names)
        except (KeyError, TypeError, AttributeError, OverflowError):  # none, or not as OpenAI gives them
            pass
        return Choice(text, text.strip() if text.strip() in names else None, weight)

    def _answer(self, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """Send a chat until it is answered; return the first of the answer's "choices"."""
        import httpx

        failure, asked_to_wait = "", 0.0
        for attempt in range(self.settings.attempts):
            wait = min(self.settings.first_wait * 2 ** (attempt - 1) * random.uniform(0.75, 1.25), LONGEST_WAIT)
            if attempt and self._stopped.wait(max(wait, asked_to_wait)):
                break
            asked_to_wait, options = 0.0, self._options
            body = {"model": self.settings.model, "messages": list(messages), **options}
            try:
                response = self._client.post(self._url, json=body)
                if response.status_code == 200:
                    choice = response.json()["choices"][0]
                    (choice["message"].get("content") or "").strip()
                    return choice
            except (httpx.TransportError, ValueError, LookupError, TypeError, AttributeError) as error:
                failure = f"{type(error).__name__}: {error}"  # no answer, or none as OpenAI gives them
                continue
            failure = f"HTTP {response.status_code}: {' '.join(response.text.split())[:300]}"
            if response.status_code == 400 and self._leave_out(options, response.text):
                continue
            if response.status_code < 500 and response.status_code not in _PASSING:
                hint = f"; its key is read from {KEY_VARIABLE}" if response.status_code in (401, 403) else ""
                raise JudgeError(f"the judge at {self.settings.url} refuses the request: {failure}{hint}")
            asked_to_wait = _seconds(response.headers.get("Retry-After"))
        raise JudgeError(
            f"the judge at {self.settings.url} gave no answer in {self.settings.attempts} attempts, the last: {failure}"
        )

    def _leave_out(self, options: dict[str, Any], complaint: str) -> bool:
        """Send no more what a server complains of; return whether there is anything."""
        named = [name for name in options if name in complaint]
        if "logprobs" in named:
            named.append("top_logprobs")
        self._options = {name: value for name, value in self._options.items() if name not in named}
        return bool(named)


def _weight(tokens: Sequence[Mapping[str, Any]], names: tuple[str, str]) -> float | None:
    """The share of the first name in the probability of both, where the first token stands that is one of them."""
    for token in tokens:
        if token["token"].strip() not in names:
            continue
        found = {name: 0.0 for name in names}
        for other in token["top_logprobs"]:
            if (name := other["token"].strip()) in found:
                found[name] += math.exp(other["logprob"])
        total = sum(found.values())
        return found[names[0]] / total if 0 < total < math.inf else None
    return None


def _seconds(header: str | None) -> float:
    """How long a server asks to wait, if it says so by a number."""
    try:
        return min(max(float(header or 0), 0.0), LONGEST_WAIT)
    except ValueError:
        return 0.0
