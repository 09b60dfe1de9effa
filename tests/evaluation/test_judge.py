"""A judge over HTTP: verdicts, failures that pass, failures that do not, and the key."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from support.loopback_judge import Failure, LoopbackJudge, Question, leave_out_settings
from support.messages import naming

from impart_hf.evaluation.judge import Choice, Judge, JudgeError, JudgeSettings

CHAT = [{"role": "user", "content": "m or M?"}]


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_settings(monkeypatch)


def choose(judge: LoopbackJudge, **settings: Any) -> Choice:
    quick = {"first_wait": 0.01, "timeout": 5.0, "attempts": 4}
    return Judge(JudgeSettings(judge.url, "tester", **{**quick, **settings})).choose(CHAT, ("m", "M"))


@pytest.mark.parametrize(
    "answer, name", [("m", "m"), ("M", "M"), (" M\n", "M"), ("m.", None), ("m and M", None), ("", None), ("mM", None)]
)
def test_a_verdict_is_a_name_and_nothing_else(answer: str, name: str | None) -> None:
    with LoopbackJudge(lambda question: answer) as judge:
        assert choose(judge) == Choice(answer, name, None)
    (request,) = judge.requests
    assert request["model"] == "tester" and request["messages"] == CHAT
    assert request["temperature"] == 0 and request["logprobs"] is True and request["max_tokens"] == 16


@pytest.mark.parametrize("share", [0.75, 0.25, 1.0, 0.0])
def test_the_weight_is_the_share_of_the_first_name(share: float) -> None:
    with LoopbackJudge(lambda question: share, probabilities=True) as judge:
        found = choose(judge)
    assert found.name == ("m" if share > 0.5 else "M") and found.weight == pytest.approx(share)


@pytest.mark.parametrize("logprob", ["1e999", "1e300", "NaN", "null", '"x"', "-1e999"])
@pytest.mark.parametrize("token", ['"m"', "1"])
def test_probabilities_that_are_none(logprob: str, token: str) -> None:
    found = f'{{"token": {token}, "logprob": {logprob}}}'
    logprobs = f'{{"content": [{{"token": "m", "top_logprobs": [{found}]}}]}}'
    body = f'{{"choices": [{{"message": {{"content": "m"}}, "logprobs": {logprobs}}}]}}'
    with LoopbackJudge(lambda question: body.encode()) as judge:
        assert choose(judge) == Choice("m", "m", None)


@pytest.mark.parametrize(
    "failure",
    [
        Failure(429, Retry_After="0.01"),
        Failure(429, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"),
        Failure(500),
        Failure(503),
        Failure(0),
        Failure(200, seconds=2.0),
        b"no JSON",
        b'{"choices": []}',
        b'{"choices": [{"message": null}]}',
        b'{"choices": [{"message": {"content": [{"text": "m"}]}}]}',
        b"[]",
    ],
    ids=["429", "429 until", "500", "503", "closed", "slow", "text", "no choice", "no message", "parts", "list"],
)
def test_failures_that_pass(failure: Any) -> None:
    with LoopbackJudge(lambda question: "M" if question.number > 2 else failure) as judge:
        assert choose(judge, timeout=0.5).name == "M"
    assert len(judge.requests) == 3


def test_a_server_is_given_the_time_that_it_asks_for() -> None:
    with LoopbackJudge(lambda question: "M" if question.number > 1 else Failure(429, Retry_After="0.4")) as judge:
        started = time.monotonic()
        choose(judge)
        assert time.monotonic() - started >= 0.4


def test_a_server_that_stays_down() -> None:
    with LoopbackJudge(lambda question: Failure(503, "overloaded today")) as judge:
        with pytest.raises(JudgeError, match=naming(judge.url, 4, 503, "overloaded today")):
            choose(judge)
    assert len(judge.requests) == 4
    with pytest.raises(JudgeError, match=naming(judge.url, "ConnectError")):
        choose(judge)


@pytest.mark.parametrize(
    "failure, names",
    [
        (Failure(401, "bad key"), (401, "bad key", "JUDGE_API_KEY")),
        (Failure(404, "no model tester"), (404, "no model tester")),
        (Failure(400, "no chat"), (400, "no chat")),
        (Failure(302, Location="http://127.0.0.1:1/"), (302,)),
    ],
)
def test_refusals_are_not_repeated(failure: Failure, names: tuple[Any, ...]) -> None:
    with LoopbackJudge(lambda question: failure) as judge:
        with pytest.raises(JudgeError, match=naming(judge.url, names)):
            choose(judge)
    assert len(judge.requests) == 1


def test_servers_that_know_fewer_parameters() -> None:
    """Each complains of one at a time; what it does not know is not sent again."""

    def answer(question: Question) -> Any:
        unknown = next((name for name in ("logprobs", "max_tokens") if name in question.request), None)
        return Failure(400, f"Unsupported parameter: '{unknown}'") if unknown else "m"

    with LoopbackJudge(answer) as judge:
        client = Judge(JudgeSettings(judge.url, "tester", first_wait=0.01))
        assert client.choose(CHAT, ("m", "M")).name == client.choose(CHAT, ("m", "M")).name == "m"
    assert len(judge.requests) == 4
    assert set(judge.requests[-1]) == {"model", "messages", "temperature"}


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackJudge(lambda question: "m") as judge:
        choose(judge)
        monkeypatch.setenv("OPENAI_API_KEY", "another's")
        choose(judge)
        monkeypatch.setenv("JUDGE_API_KEY", "secret\n")
        choose(judge)
        judge.answer = lambda question: Failure(403)
        with pytest.raises(JudgeError) as caught:
            choose(judge)
    assert judge.keys == [None, None, "Bearer secret", "Bearer secret"]
    assert "secret" not in str(caught.value) + repr(Judge(JudgeSettings(judge.url, "tester")))


def test_a_stopped_judge_waits_no_longer() -> None:
    with LoopbackJudge(lambda question: Failure(503)) as judge:
        client = Judge(JudgeSettings(judge.url, "tester", first_wait=60.0))
        threading.Timer(0.3, client.stop).start()
        started = time.monotonic()
        with pytest.raises(JudgeError):
            client.choose(CHAT, ("m", "M"))
        assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "settings, names",
    [
        ({"url": "localhost:8000"}, "'localhost:8000'"),
        ({"url": "https:///v1"}, "'https:///v1'"),
        ({"url": "http://host/v1?key=x"}, "'http://host/v1?key=x'"),
        ({"url": "http://host\n/v1"}, r"host\n"),
        ({"url": "http://host:99999/v1"}, "65535"),
        ({"url": "http://host:x/v1"}, "'x'"),
        ({"model": ""}, "model"),
        ({"concurrency": 0}, ("concurrency", 0)),
        ({"attempts": 0}, ("attempts", 0)),
        ({"max_tokens": 0}, ("max_tokens", 0)),
        ({"timeout": 0.0}, ("timeout", 0.0)),
    ],
)
def test_bad_settings(settings: dict[str, Any], names: Any) -> None:
    with pytest.raises(ValueError, match=naming(names)):
        JudgeSettings(**{"url": "http://127.0.0.1:1/v1", "model": "tester", **settings})
