"""A server whose requests have their own deltas in one batch, each as an adapter on the base (`--enable-lora`)."""

import asyncio
from argparse import Namespace
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from ..common.files import OutputError
from ..modeling.delta_record import DeltaFormatError
from ..modeling.delta_repository import WrongBaseError
from ..modeling.model_files import CheckpointError
from . import metrics
from .adapter_cache import AdapterCache
from .catalogue import BASE, Catalogue, NamedDelta
from .engine_base import DeltaRefusedError
from .offered_models import offer_by_name
from .refusals import refused, unknown

logger = init_logger("vllm.impart_hf")  # a child of vLLM's logger, because vLLM shows no others


class DeltaResolver(LoRAResolver):
    """Answers vLLM's question for an adapter by a name: with one made of the delta of that name."""

    def __init__(self, catalogue: Catalogue, cache: AdapterCache):
        self._catalogue, self._cache = catalogue, cache

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return a delta's adapter; None if no delta has the name.

        Raises:
            RefusedRequestError: if it cannot be made.
        """
        delta = self._catalogue.find(lora_name)
        if delta is None or delta.repo is None:
            return None
        try:
            folder = await asyncio.to_thread(self._cache.adapter_of, delta)
        except OutputError as error:
            logger.error("Adapter of delta %s: %s", lora_name, error)
            raise refused(500, str(error)) from error
        except (CheckpointError, DeltaFormatError, WrongBaseError, DeltaRefusedError, ValueError) as error:
            if self._catalogue.find(lora_name) is None:  # removed meanwhile
                return None
            raise refused(422, str(error)) from error
        # vLLM gives it a number of its own.
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(folder))


class AdapterServer:
    """The state that the routes share."""

    def __init__(self, engine: EngineClient, args: Namespace, models: OpenAIServingModels):
        """Offer deltas as adapters.

        Raises:
            ValueError: if a variable of the environment is not valid, or a delta has the name of another model.
        """
        self._models = models
        self._own_names = [model.name for model in models.base_model_paths]
        static = [adapter.name for adapter in args.lora_modules or []]
        self._catalogue = Catalogue.of_environment()
        self._catalogue.check_names({*self._own_names, *static} - {BASE})
        self._loaded: dict[str, tuple[NamedDelta, Any]] = {}  # by the name that requests gave, with its files' state
        self._loading: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.refusal: str | None = None
        try:
            cache = AdapterCache(engine.vllm_config)
        except (CheckpointError, DeltaFormatError, WrongBaseError, DeltaRefusedError) as error:
            self.refusal = str(error)
        else:
            models.lora_resolvers.insert(0, DeltaResolver(self._catalogue, cache))
            offer_by_name(models, self._not_loaded, lambda name: name == BASE)

    def _not_loaded(self) -> dict[str, str]:
        """Return the deltas on offer that vLLM does not list itself, because they are not loaded."""
        return {
            delta.name: delta.repo
            for delta in self._catalogue.offered().values()
            if delta.repo and delta.name not in self._models.lora_requests
        }

    def listing(self) -> dict[str, Any]:
        """Return the deltas on offer, and which of them are loaded as adapters."""
        entries = [
            {
                "id": d.name, "object": "delta", "repo": d.repo, "revision": d.revision,
                "loaded": d.repo is None or d.name in self._models.lora_requests,
            }
            for d in self._catalogue.offered().values()
        ]  # fmt: skip
        return {"object": "list", "loaded": None, "data": entries}

    async def load(self, name: str) -> dict[str, Any]:
        """Refuse to swap.

        Raises:
            RefusedRequestError: always.
        """
        raise refused(
            501, f"this server does not swap deltas, it has adapters: name '{name:.200}' as a request's model"
        )

    @asynccontextmanager
    async def admitted(self, model: str | None) -> AsyncIterator[None]:
        """Wait until the adapter that a request's model stands for is there; see `DeltaServer`."""
        if not self.refusal and model is not None and model not in self._own_names:
            async with self._loading[model]:
                await self._load(model)
        yield

    async def _load(self, model: str) -> None:
        delta = self._catalogue.find(model)
        state = None if delta is None else _state_of_files(delta)
        if model in self._loaded and self._loaded[model] != (delta, state):  # removed or replaced
            del self._loaded[model]
            await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=model))
        if delta is None:
            self._loading.pop(model, None)  # any name may be asked for
            if model not in self._models.lora_requests and len(self._models.lora_resolvers) == 1:
                raise unknown(
                    "model", model, [*self._own_names, *self._models.lora_requests, *self._catalogue.offered()]
                )
            return
        metrics.requests.labels(delta.name).inc()
        if delta.repo is None or model in self._models.lora_requests:
            return
        found = await self._models.resolve_lora(model)
        if isinstance(found, ErrorResponse):
            if self._catalogue.find(model) is None:
                raise unknown("model", model, [*self._own_names, *self._catalogue.offered()])
            raise refused(422, found.error.message)
        self._loaded[model] = delta, state


def _state_of_files(delta: NamedDelta) -> Any:
    """Return what differs if a folder's files are replaced; None for a Hub id."""
    try:
        files = sorted(Path(delta.repo or "").iterdir())
        return [(file.name, (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files]
    except OSError:
        return None
