"""Swapping deltas over HTTP: routes that vLLM's API server has with `VLLM_PLUGINS=impart_hf`.

GET /v1/deltas        lists the deltas that can be loaded, and the one that is
POST /v1/deltas/load  {"delta": NAME}; NAME "base" for the base's own weights

The routes require the server's own API key. Errors have the same form as the server's own.
"""

import asyncio
import json
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

from ..modeling.delta_record import DeltaFormatError
from ..modeling.delta_repository import WrongBaseError
from ..modeling.model_files import CheckpointError
from .catalogue import BASE, DELTAS_VARIABLE, Catalogue, NamedDelta
from .deltas import DeltaRefusedError
from .gate import Gate
from .swap import AsyncDeltaSwitch, EngineUnsoundError, SwapError, SwapInProgressError

logger = init_logger("vllm.impart_hf")  # a child of vLLM's logger, because vLLM shows no others
router = APIRouter()
LOAD_PATH = "/v1/deltas/load"


class DeltaEndpoints:
    """The object that vLLM's entry point group `vllm.endpoint_plugins` expects."""

    name = "impart_hf"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)
        app.add_middleware(HoldRequests)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Prepare the server for swaps.

        Raises:
            ValueError: if the list of deltas in the environment is not valid.
        """
        assert engine_client is not None  # there is always one if text is generated
        state.impart_hf = _Server(engine_client, args)


class HoldRequests:
    """ASGI middleware that admits no request during a swap, and makes a swap wait for the admitted ones.

    The engine's own gate is not enough, because several prompts, or the steps of a beam search, are several requests to
    the engine.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A swap must not wait for the request that starts it. Its path may begin with a --root-path.
        waits = scope["type"] == "http" and scope["method"] == "POST" and not scope["path"].endswith(LOAD_PATH)
        if waits:
            server: _Server = scope["app"].state.impart_hf
            async with server.requests.request():
                await self._app(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _Server:
    """The state that the routes share.

    Attributes:
        requests: the gate for all requests that may generate text.
        loaded: name of the delta that is served; None if a failed swap left the engine without weights.
        refusal: why this server cannot swap; None if it can.
    """

    def __init__(self, engine: EngineClient, args: Namespace):
        self._engine = engine
        self.requests = Gate()
        self.refusal: str | None = None
        started_on = None
        self.loaded: str | None = BASE
        try:
            if (args.api_server_count or 1) > 1:
                raise DeltaRefusedError("with --api-server-count above 1 no server knows of the others' requests")
            self._switch = AsyncDeltaSwitch(engine)
            files = self._switch.checker.files
            if files.is_delta:
                name = (args.served_model_name or [Path(files.model).name])[0]
                name = files.model if name == BASE else name
                started_on, self.loaded = NamedDelta(name, files.model, files.options.revision), name
            self.requests = self._switch.requests
        except (CheckpointError, DeltaFormatError, WrongBaseError, DeltaRefusedError) as error:
            self.refusal = str(error)
        self._catalogue = Catalogue(os.environ.get(DELTAS_VARIABLE, ""), started_on)

    def listing(self) -> dict[str, Any]:
        entries = [
            {"id": d.name, "object": "delta", "repo": d.repo, "revision": d.revision, "loaded": d.name == self.loaded}
            for d in self._catalogue.offered().values()
        ]
        return {"object": "list", "loaded": self.loaded, "data": entries}

    async def load(self, name: str) -> tuple[int, dict[str, Any]]:
        """Return HTTP status and body of the answer; a swap that has begun is finished even if the client is gone."""
        return await asyncio.shield(asyncio.ensure_future(self._load(name)))

    async def _load(self, name: str) -> tuple[int, dict[str, Any]]:
        if self.refusal:
            return _error(501, f"this server cannot swap deltas: {self.refusal}")
        offered = self._catalogue.offered()
        if name not in offered:
            # As ASCII, because a name may hold characters that cannot be encoded in an answer.
            return _error(
                404, f"there is no delta {name!a:.200}; choose one of {', '.join(offered)}", deltas=list(offered)
            )
        if self._engine.errored:
            return _error(503, "the engine has stopped: restart the server")
        delta, started = offered[name], time.perf_counter()
        try:
            checked = await self._switch.load(delta.repo, delta.revision)
        except SwapInProgressError as error:
            return _error(409, str(error))
        except (CheckpointError, DeltaFormatError, WrongBaseError, DeltaRefusedError) as error:
            return _error(422, str(error))
        except (SwapError, EngineUnsoundError) as error:
            if isinstance(error, EngineUnsoundError):
                self.loaded = None
            logger.error("Swap to delta %s: %s", name, error)
            return _error(500, str(error))
        except (EngineDeadError, RuntimeError):
            if not self._engine.errored:
                raise
            return _error(503, "the engine has stopped: restart the server")
        self.loaded = name
        seconds = time.perf_counter() - started
        logger.info("Swapped to delta %s in %.2f s", name, seconds)
        notes = list(checked.notes)
        return 200, {
            "loaded": name, "repo": checked.repo, "revision": checked.revision, "seconds": seconds, "notes": notes,
        }  # fmt: skip


@router.get("/v1/deltas")
async def list_deltas(request: Request) -> JSONResponse:
    """List the deltas that can be loaded, and the one that is."""
    server: _Server = request.app.state.impart_hf
    return JSONResponse(server.listing())


@router.post(LOAD_PATH)
async def load_delta(request: Request) -> JSONResponse:
    """Swap to a delta: running requests finish on the old one, new requests wait."""
    server: _Server = request.app.state.impart_hf
    try:
        body = json.loads(await request.body())
        if not isinstance(body, dict) or set(body) != {"delta"} or not isinstance(body["delta"], str):
            raise ValueError("not an object with the single key 'delta'")
    except (ValueError, RecursionError) as error:
        return _response(*_error(400, f'the body must be {{"delta": NAME}}: {error}'))
    return _response(*await server.load(body["delta"]))


def _response(status: int, body: dict[str, Any]) -> JSONResponse:
    return JSONResponse(body, status)


_KINDS = {400: "BadRequestError", 404: "NotFoundError", 409: "ConflictError", 422: "UnprocessableEntityError"}


def _error(status: int, message: str, **more: Any) -> tuple[int, dict[str, Any]]:
    kind = _KINDS.get(status, "InternalServerError")
    return status, {"error": {"message": message, "type": kind, "param": None, "code": status, **more}}
