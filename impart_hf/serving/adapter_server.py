"""A server whose requests have their own deltas in one batch, each as an adapter on the base (`--enable-lora`)."""

import asyncio
from argparse import Namespace
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

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


class AdapterServer:
    """The state that the routes share."""

    def __init__(self, engine: EngineClient, args: Namespace, models: OpenAIServingModels):
        """Offer deltas as adapters.

        Raises:
            ValueError: if a variable of the environment is not valid, or a delta has the name of another model.
        """
        self._engine, self._models = engine, models
        self._own_names = [model.name for model in models.base_model_paths]
        static = [adapter.name for adapter in args.lora_modules or []]
        self._catalogue = Catalogue.of_environment()
        self._catalogue.check_names({*self._own_names, *static} - {BASE})
        self._loaded: dict[str, tuple[NamedDelta, Any]] = {}  # by the name that requests gave, with its files' state
        self._loading: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # any name may be asked for
        # Apart from the threads that vLLM uses, because a download or an export takes its time.
        self._threads = ThreadPoolExecutor(4, "impart-hf-adapter")
        self.refusal: str | None = None
        try:
            if (args.api_server_count or 1) > 1:
                raise DeltaRefusedError("with --api-server-count above 1 two servers would number adapters alike")
            self._cache = AdapterCache(engine.vllm_config)
        except (CheckpointError, DeltaFormatError, WrongBaseError, DeltaRefusedError, ModuleNotFoundError) as error:
            self.refusal = str(error)
            logger.warning("No delta is served as an adapter: %s", error)
        else:
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
        offered = {} if self.refusal else self._catalogue.offered()
        entries = [
            {
                "id": d.name, "object": "delta", "repo": d.repo, "revision": d.revision,
                "loaded": d.repo is None or d.name in self._models.lora_requests,
            }
            for d in offered.values()
        ]  # fmt: skip
        return {"object": "list", "loaded": None, "data": entries}

    async def load(self, name: str) -> dict[str, Any]:
        """Refuse to swap.

        Raises:
            RefusedRequestError: always.
        """
        why = self.refusal or f"this server does not swap deltas, it has adapters: name '{name:.200}' as the model"
        raise refused(501, why)

    @asynccontextmanager
    async def admitted(self, model: str | None) -> AsyncIterator[None]:
        """Wait until the adapter that a request's model stands for is there; see `DeltaServer`."""
        if model is not None and model not in self._own_names:
            lock = self._loading.setdefault(model, asyncio.Lock())
            async with lock:
                await self._load(model)
        yield

    async def _load(self, model: str) -> None:
        """Load the adapter of a delta, or another one if its files have been replaced; forget that of one that is gone.

        Raises:
            RefusedRequestError: if no delta has the name, or it cannot be loaded.
        """
        loaded = self._models.lora_requests
        if (delta := self._catalogue.find(model)) is None:
            if self._loaded.pop(model, None) is not None:
                loaded.pop(model, None)
            if model not in loaded and not self._models.lora_resolvers:
                raise unknown("model", model, [*self._own_names, *loaded, *self._catalogue.offered()])
            return
        if self.refusal:
            raise refused(501, f"this server has no adapters of deltas: {self.refusal}")
        state = _state_of_files(delta)
        is_ours = model in self._loaded
        if delta.repo is not None and (is_ours or model not in loaded) and self._loaded.get(model) != (delta, state):
            # A number of its own, so that running requests keep the adapter that they have begun with.
            number, folder = self._models.lora_id_counter.inc(1), await self._made(model, delta)
            request = LoRARequest(lora_name=model, lora_int_id=number, lora_path=str(folder))
            try:
                await self._engine.add_lora(request)
            except (RuntimeError, ValueError) as error:
                if self._engine.errored:
                    raise refused(503, "the engine has stopped: restart the server") from error
                raise refused(422, f"the engine cannot load '{delta.name}': {error}") from error
            loaded[model], self._loaded[model] = request, (delta, state)
        metrics.requests.labels(self._catalogue.label(delta.name)).inc()

    async def _made(self, model: str, delta: NamedDelta) -> Path:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._cache.adapter_of, delta)
        except (CheckpointError, DeltaFormatError, WrongBaseError, DeltaRefusedError, ValueError) as error:
            if self._catalogue.find(model) is None:  # removed meanwhile
                raise unknown("model", model, [*self._own_names, *self._catalogue.offered()]) from error
            raise refused(422, str(error)) from error
        except OSError as error:
            logger.error("Adapter of delta %s: %s", delta.name, error)
            raise refused(500, str(error)) from error


def _state_of_files(delta: NamedDelta) -> Any:
    """Return what differs if a folder's files are replaced; None for a Hub id."""
    try:
        files = [(file.name, file.stat()) for file in sorted(Path(delta.repo or "").iterdir())]
    except OSError:
        return None
    # Tools that unpack or copy may set times of modification, but neither inodes nor times of change.
    return [(name, stat.st_ino, stat.st_ctime_ns, stat.st_mtime_ns, stat.st_size) for name, stat in files]
