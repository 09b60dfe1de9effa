"""ASGI middleware by which a request's `model` chooses its delta."""

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .refusals import RefusedRequestError

# The name that answers to the current request have as their model; None for the server's own.
answering_as: ContextVar[str | None] = ContextVar("answering_as", default=None)


class DeltaServer(Protocol):
    """What the middleware needs of the server's state."""

    def admitted(self, model: str | None) -> AbstractAsyncContextManager[None]:
        """Wait until a request with this model can be answered; that stays so until the context ends.

        Raises:
            RefusedRequestError: if it cannot.
        """


class RequestsByDelta:
    """Admits a request when its delta is loaded, and keeps it loaded until the answer is complete.

    The engine's own gate is not enough, because several prompts, or the steps of a beam search, are several requests to
    the engine.
    """

    def __init__(self, app: ASGIApp, server: Callable[[Scope], DeltaServer], passes: Callable[[str], bool]):
        """Wrap an application.

        Args:
            server: returns the state of the server that a scope belongs to.
            passes: whether requests to a path never wait.
        """
        self._app, self._server, self._passes = app, server, passes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or self._passes(scope["path"]):
            await self._app(scope, receive, send)
            return
        server = self._server(scope)
        model: str | None = None
        messages: list[Message] = []
        if _has_json(scope):
            body, messages = await _read(receive)
            model = _model_in(body)
        arriving = _Arriving(messages, receive)
        try:
            admitted = server.admitted(model)
            if not await arriving.unless_gone(admitted.__aenter__()):
                return
        except RefusedRequestError as refused:
            await _answer(send, refused)
            return
        token = answering_as.set(model)
        error: BaseException | None = None
        try:
            await self._app(scope, arriving, send)
        except BaseException as raised:
            error = raised
            raise
        finally:
            arriving.close()
            answering_as.reset(token)
            await admitted.__aexit__(type(error) if error else None, error, error.__traceback__ if error else None)


class _Arriving:
    """What a client sends: first the messages that were read already; a `receive` of ASGI."""

    def __init__(self, messages: list[Message], receive: Receive):
        self._messages, self._receive = messages, receive
        self._next: asyncio.Future[Message] | None = None

    async def unless_gone(self, waiting: Any) -> bool:
        """Await something; return False, and cancel it, if the client leaves before it is done."""
        task = asyncio.ensure_future(waiting)
        try:
            if self._messages and not self._messages[-1].get("more_body"):
                self._next = asyncio.ensure_future(self._receive())
                await asyncio.wait({task, self._next}, return_when=asyncio.FIRST_COMPLETED)
                if not task.done() and self._next.result()["type"] == "http.disconnect":
                    task.cancel()
            await task
        except asyncio.CancelledError:
            if not task.done():
                task.cancel()
                raise
            return False
        return True

    def close(self) -> None:
        """Stop listening."""
        if self._next is not None:
            self._next.cancel()

    async def __call__(self) -> Message:
        if self._messages:
            return self._messages.pop(0)
        if self._next is not None:
            following, self._next = self._next, None
            return await following
        return await self._receive()


def _has_json(scope: Scope) -> bool:
    for name, value in scope["headers"]:
        if name == b"content-type":
            return b"json" in value
    return True  # as vLLM reads it, or refuses it


async def _read(receive: Receive) -> tuple[bytes, list[Message]]:
    messages, parts = [], []
    while True:
        message = await receive()
        messages.append(message)
        parts.append(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return b"".join(parts), messages


def _model_in(body: bytes) -> str | None:
    """Return the model that a request's JSON names; None if there is none, which is vLLM's to judge."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    model = content.get("model") if isinstance(content, dict) else None
    return model if isinstance(model, str) and model else None


async def _answer(send: Send, refused: RefusedRequestError) -> None:
    data = json.dumps(refused.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
