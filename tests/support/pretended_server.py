"""A server with the routes that scripts/tenant_load.py asks, in a thread, and without any model."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web


class PretendedServer:
    """Says what it is told to; a context manager.

    Attributes:
        url: where it listens, on 127.0.0.1.
        seen: the bodies of all requests.
    """

    def __init__(self, say: Callable[[dict[str, Any], str], str], *, holds: int = 0):
        """Set it up.

        Args:
            say: returns the text for a request's body and its prompt. For an empty one the answer breaks off, and
                what is raised is an answer with status 500.
            holds: nothing is answered until so many requests have come.
        """
        self._say, self._holds = say, holds
        self.seen: list[dict[str, Any]] = []
        self._ready = threading.Event()

    def __enter__(self) -> PretendedServer:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(30)

    async def _run(self) -> None:
        self._loop, self._done, self._enough = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        app = web.Application()
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._done.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append(body)
        if len(self.seen) >= self._holds:
            self._enough.set()
        await self._enough.wait()
        try:
            text = self._say(body, body["messages"][0]["content"] if "messages" in body else body["prompt"])
        except Exception as error:
            return web.json_response({"error": {"message": str(error)}}, status=500)
        usage = {"completion_tokens": body["max_tokens"]}
        if not body.get("stream"):
            return web.json_response({"choices": [_choice(body, text, "message")], "usage": usage})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in text:
            line = {"choices": [_choice(body, part, "delta")]}
            await response.write(b"data: %s\n\n" % json.dumps(line).encode())
        if text:
            await response.write(b"data: %s\n\n" % json.dumps({"choices": [], "usage": usage}).encode())
            await response.write(b"data: [DONE]\n\n")
        return response


def _choice(body: dict[str, Any], text: str, spoken: str) -> dict[str, Any]:
    """A choice of an answer, or of a part of one; tokens are characters."""
    said = {spoken: {"content": text}} if "messages" in body else {"text": text}
    return said | ({"token_ids": [ord(character) for character in text]} if body.get("return_token_ids") else {})
