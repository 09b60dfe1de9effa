"""Requests that wait for their delta: what the application behind gets, and what clients get that it does not serve."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import Any

import pytest

pytest.importorskip("starlette")

from impart_hf.serving.named_requests import RequestsByDelta, answering_as
from impart_hf.serving.refusals import RefusedRequestError


class Stage:
    """A server of ours around an application that notes what it gets."""

    def __init__(self) -> None:
        self.open, self.inside, self.left = asyncio.Event(), [], []
        self.seen, self.sent = [], []
        self.fails = False
        self.application = RequestsByDelta(self.app, lambda scope: self, lambda path: path == "/passes")

    @asynccontextmanager
    async def admitted(self, model: str | None):
        if model in ("unknown", "broken"):
            raise RefusedRequestError(404 if model == "unknown" else 422, {"error": model})
        await self.open.wait()
        self.inside.append(model or "default")
        try:
            yield
        finally:
            self.left.append(model or "default")

    async def app(self, scope: dict, receive: Any, send: Any) -> None:
        body, more = b"", scope["type"] == "http"
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.seen.append((scope.get("path"), body, answering_as.get(), list(self.inside)))
        if self.fails:
            raise LookupError("app")
        await send({"type": "http.response.start", "status": 200})

    async def post(self, parts: list[bytes], path: str = "/v1/completions", kind: str = "application/json") -> None:
        messages = [{"type": "http.request", "body": p, "more_body": i < len(parts) - 1} for i, p in enumerate(parts)]
        self.gone = asyncio.Event()

        async def receive() -> dict:
            if messages:
                return messages.pop(0)
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            self.sent.append(message)

        headers = [(b"content-type", kind.encode())] if kind else []
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        await self.application(scope, receive, send)


def body_of(model: Any) -> bytes:
    return json.dumps({"prompt": "Aé" * 50, "model": model}).encode()


def run(story: Any) -> Stage:
    async def told() -> Stage:
        stage = Stage()
        await asyncio.wait_for(story(stage), 10)
        return stage

    return asyncio.run(told())


def test_the_body_arrives_as_it_was_sent() -> None:
    async def story(stage: Stage) -> None:
        stage.open.set()
        data = body_of("math")
        await stage.post([data[:10], data[10:40], data[40:]])

    stage = run(story)
    assert stage.seen == [("/v1/completions", body_of("math"), "math", ["math"])]
    assert stage.left == ["math"] and answering_as.get() is None


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"[" * 100_000, b'{"model": 3}', b'{"model": ""}', b'{"x": 1}'])
def test_bodies_without_a_model_are_for_the_default(body: bytes) -> None:
    async def story(stage: Stage) -> None:
        stage.open.set()
        await stage.post([body])

    stage = run(story)
    assert stage.seen[0][1:] == (body, None, ["default"])


def test_other_content_is_not_read_first() -> None:
    async def story(stage: Stage) -> None:
        stage.open.set()
        await stage.post([b"a", b"b"], kind="multipart/form-data; boundary=x")

    assert run(story).seen[0][1:] == (b"ab", None, ["default"])


def test_refusals() -> None:
    async def story(stage: Stage) -> None:
        stage.open.set()
        await stage.post([body_of("unknown")])
        await stage.post([body_of("broken")])

    stage = run(story)
    assert stage.seen == [] and stage.inside == []
    starts = [message for message in stage.sent if message["type"] == "http.response.start"]
    assert [message["status"] for message in starts] == [404, 422]
    assert [json.loads(m["body"]) for m in stage.sent if "body" in m] == [{"error": "unknown"}, {"error": "broken"}]


def test_a_client_that_leaves_while_it_waits() -> None:
    async def story(stage: Stage) -> None:
        waiting = asyncio.create_task(stage.post([body_of("math")]))
        await asyncio.sleep(0.02)
        stage.gone.set()
        await waiting
        stage.open.set()
        await asyncio.sleep(0.02)

    stage = run(story)
    assert stage.seen == [] and stage.inside == [] and stage.sent == []


def test_an_error_of_the_application_leaves_the_turn() -> None:
    async def story(stage: Stage) -> None:
        stage.open.set()
        stage.fails = True
        with pytest.raises(LookupError):
            await stage.post([body_of("math")])

    stage = run(story)
    assert stage.left == ["math"] and answering_as.get() is None


def test_what_passes() -> None:
    async def story(stage: Stage) -> None:
        await stage.post([body_of("math")], path="/passes")

    assert run(story).seen[0][2:] == (None, [])
