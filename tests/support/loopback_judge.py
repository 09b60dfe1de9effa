"""A judge on 127.0.0.1 with OpenAI's interface for chats, whose answers a test chooses.

with LoopbackJudge(lambda question: "m") as judge:
    Judge(JudgeSettings(judge.url, "tester"))
"""

from __future__ import annotations

import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from impart_hf.evaluation.alpaca import CHECK

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def leave_out_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove settings of this machine that would reach a judge's client."""
    for name in ("JUDGE_API_KEY", *_PROXIES, *map(str.upper, _PROXIES)):
        monkeypatch.delenv(name, raising=False)


class Question:
    """What a judge is asked: the two answers by the names that the question gives them, and the whole request."""

    def __init__(self, request: dict[str, Any], number: int):
        self.request, self.number = request, number
        self.text = request["messages"][-1]["content"]
        self.answers = {
            name: json.loads(answer) for name, answer in re.findall(r"^Answer of (\w+):\n(.*)$", self.text, re.M)
        }

    def name_of(self, answer: str) -> str:
        """The name of the first answer that contains a text."""
        return next(name for name, text in self.answers.items() if answer in text)


class Failure:
    """An HTTP error, or with status 0 a connection that is closed after `seconds` without an answer."""

    def __init__(self, status: int, message: str = "no", seconds: float = 0.0, **headers: str):
        self.status, self.message, self.seconds, self.headers = status, message, seconds, headers


class LoopbackJudge:
    """The server, usable as a context manager.

    `requests` lists the bodies of all requests, `keys` their Authorization headers, in the order of arrival;
    `at_once` is the most requests that were answered at one time. The question by which `PairwiseJudge.check` tries a
    judge is no part of these: `checks` counts it, and `fails_check` answers it, rightly if None.
    """

    def __init__(self, answer: Callable[[Question], Any], probabilities: bool = False):
        """Make a judge.

        Args:
            answer: gives the text of the answer; or the probability of "m", of which the text follows; or a `Failure`;
                or a whole response's body as bytes.
            probabilities: answer with the probabilities of "m" and "M".
        """
        self.answer, self.probabilities = answer, probabilities
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.at_once = self.now = self.checks = 0
        self.fails_check: Any = None
        self.lock = threading.Lock()
        self.url = ""
        self._server: Any = None

    def __enter__(self) -> LoopbackJudge:
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"judge": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def response(self, answer: str | float) -> dict[str, Any]:
        """The body of a response in OpenAI's form."""
        first = answer if isinstance(answer, float) else None
        text = answer if isinstance(answer, str) else "m" if answer > 0.5 else "M"
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None}
        if self.probabilities and text in ("m", "M"):
            shares = {"m": first if first is not None else 0.9 if text == "m" else 0.1}
            shares["M"] = 1 - shares["m"]
            # Half of all goes to other tokens, as with a real judge.
            top = [{"token": name, "logprob": math.log(share / 2)} for name, share in shares.items() if share > 0]
            token = {"token": text, "logprob": math.log(shares[text] / 2)}
            choice["logprobs"] = {"content": [{**token, "top_logprobs": [*top, {"token": "The", "logprob": -0.7}]}]}
        return {"id": "x", "object": "chat.completion", "choices": [choice]}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet when a client goes away; tests kill clients on purpose."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    judge: LoopbackJudge

    def do_POST(self) -> None:
        """Answer a request."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        judge = self.judge
        question = Question(body, 0)
        if set(question.answers.values()) == {CHECK.answer, CHECK.reference}:
            judge.checks += 1
            self._answer(judge.fails_check or question.name_of(CHECK.answer))
            return
        with judge.lock:
            judge.requests.append(body)
            judge.keys.append(self.headers.get("Authorization"))
            number = len(judge.requests)
            judge.now += 1
            judge.at_once = max(judge.at_once, judge.now)
        try:
            if self.path != "/v1/chat/completions":
                self._send(404, b"no such path")
                return
            self._answer(judge.answer(Question(body, number)))
        finally:
            with judge.lock:
                judge.now -= 1

    def _answer(self, found: Any) -> None:
        if isinstance(found, Failure):
            time.sleep(found.seconds)
            if found.status:
                headers = {name.replace("_", "-"): value for name, value in found.headers.items()}
                self._send(found.status, json.dumps({"error": {"message": found.message}}).encode(), headers)
            else:
                self.close_connection = True
        else:
            self._send(200, found if isinstance(found, bytes) else json.dumps(self.judge.response(found)).encode())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Write no access log; see `LoopbackJudge.requests`."""
