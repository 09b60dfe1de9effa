"""Deltas over HTTP: what vLLM's API server has with `VLLM_PLUGINS=impart_hf`.

A request's `model` chooses its delta; swaps happen by themselves. Besides, there are two routes:

GET /v1/deltas        lists the deltas that can be loaded, and the one that is
POST /v1/deltas/load  {"delta": NAME}; NAME "base" for the base's own weights: loads a delta at once, and from then on
                      requests that name the server's own model are for it

The routes require the server's own API key. Errors have the same form as the server's own.
"""

import json
from argparse import Namespace

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from .adapter_server import AdapterServer
from .named_requests import RequestsByDelta
from .refusals import RefusedRequestError, refused
from .swap_server import SwapServer

router = APIRouter()
LOAD_PATH = "/v1/deltas/load"


class DeltaEndpoints:
    """The object that vLLM's entry point group `vllm.endpoint_plugins` expects."""

    name = "impart_hf"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)
        app.add_middleware(
            RequestsByDelta,
            server=lambda scope: scope["app"].state.impart_hf,
            # A swap must not wait for the request that starts it. Its path may begin with a --root-path.
            passes=lambda path: path.endswith(LOAD_PATH),
        )

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Prepare the server: for adapters if the engine has them, otherwise for swaps.

        Raises:
            ValueError: if a variable of the environment is not valid, or a delta has the name of the server's model.
        """
        assert engine_client is not None  # there is always one if text is generated
        by_adapters = engine_client.vllm_config.lora_config is not None
        state.impart_hf = (AdapterServer if by_adapters else SwapServer)(
            engine_client, args, state.openai_serving_models
        )


@router.get("/v1/deltas")
async def list_deltas(request: Request) -> JSONResponse:
    """List the deltas that can be loaded, and the one that is."""
    server: SwapServer | AdapterServer = request.app.state.impart_hf
    return JSONResponse(server.listing())


@router.post(LOAD_PATH)
async def load_delta(request: Request) -> JSONResponse:
    """Swap to a delta: running requests finish on the old one, new requests wait."""
    server: SwapServer | AdapterServer = request.app.state.impart_hf
    try:
        body = json.loads(await request.body())
        if not isinstance(body, dict) or set(body) != {"delta"} or not isinstance(body["delta"], str):
            raise ValueError("not an object with the single key 'delta'")
        return JSONResponse(await server.load(body["delta"]))
    except (ValueError, RecursionError) as error:
        refusal = refused(400, f'the body must be {{"delta": NAME}}: {error}')
    except RefusedRequestError as error:
        refusal = error
    return JSONResponse(refusal.body, refusal.status)
