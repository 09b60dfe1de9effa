"""A server that has one delta loaded at a time, and swaps by itself when it is the turn of requests for another."""

import asyncio
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

from ..modeling.delta_record import DeltaFormatError
from ..modeling.delta_repository import WrongBaseError
from ..modeling.model_files import CheckpointError
from . import metrics
from .catalogue import BASE, Catalogue, NamedDelta
from .deltas import CheckedDelta
from .engine_base import DeltaRefusedError
from .gate import Gate
from .named_requests import answering_as
from .offered_models import offer_by_name
from .refusals import RefusedRequestError, refused, unknown
from .swap import AsyncDeltaSwitch, EngineUnsoundError, SwapError
from .turns import MAX_WAIT_VARIABLE, MIN_RESIDENCE_VARIABLE, Turns, seconds_from

logger = init_logger("vllm.impart_hf")  # a child of vLLM's logger, because vLLM shows no others


class SwapServer:
    """The state that the routes share.

    Attributes:
        turns: which delta is loaded, and what waits for others.
        default: name of the delta for requests that name no delta: the one that the engine was started on, or that a
            client has loaded since.
        refusal: why this server cannot swap; None if it can.
    """

    def __init__(self, engine: EngineClient, args: Namespace, models: OpenAIServingModels):
        self._engine = engine
        self.refusal: str | None = None
        started_on, requests = None, Gate()
        self.default = BASE
        self._own_names = [model.name for model in models.base_model_paths]
        try:
            if (args.api_server_count or 1) > 1:
                raise DeltaRefusedError("with --api-server-count above 1 no server knows of the others' requests")
            self._switch = AsyncDeltaSwitch(engine)
            files = self._switch.checker.files
            if files.is_delta:
                name = (args.served_model_name or [Path(files.model).name])[0]
                name = files.model if name == BASE else name
                started_on, self.default = NamedDelta(name, files.model, files.options.revision), name
            requests = self._switch.requests
        except (CheckpointError, DeltaFormatError, WrongBaseError, DeltaRefusedError) as error:
            self.refusal = str(error)
        self._catalogue = Catalogue.of_environment(started_on)
        self._catalogue.check_names(set(self._own_names) - {self.default, BASE})
        self.turns = Turns(
            requests,
            self._take_turn,
            self.default,
            max_wait=seconds_from(MAX_WAIT_VARIABLE, 10.0),
            min_residence=seconds_from(MIN_RESIDENCE_VARIABLE, 0.5),
        )
        self._loaded_at = time.monotonic()
        self._swapping, self._asked_for = asyncio.Lock(), False
        if not self.refusal:
            # The middleware sees to it that the request's delta is loaded.
            offer_by_name(
                models, self._offered_models, lambda name: name == answering_as.get() or name in self._offered_models()
            )

    def _offered_models(self) -> dict[str, str]:
        """Return the deltas that requests may name, with their folders or Hub ids."""
        offered = self._catalogue.offered().values()
        return {delta.name: delta.repo for delta in offered if delta.repo and delta.name not in self._own_names}

    def listing(self) -> dict[str, Any]:
        loaded = self.turns.loaded
        entries = [
            {"id": d.name, "object": "delta", "repo": d.repo, "revision": d.revision, "loaded": d.name == loaded}
            for d in self._catalogue.offered().values()
        ]
        return {"object": "list", "loaded": loaded, "data": entries}

    @asynccontextmanager
    async def admitted(self, model: str | None) -> AsyncIterator[None]:
        """Wait until the delta that a request's model stands for is loaded, and keep it loaded; see `DeltaServer`."""
        wanted = self._delta_of(model)
        async with self.turns.request(wanted):
            self._count(wanted())
            yield

    def _delta_of(self, model: str | None) -> Callable[[], str]:
        """Return what returns the delta that a model's name in a request stands for now.

        Raises:
            RefusedRequestError: if it is neither the server's own nor that of a delta.
        """
        if self.refusal or model is None or model in self._own_names:  # without swaps, vLLM knows what it serves
            return lambda: self.default
        # Folders of deltas need not be read for what is loaded already.
        if model == self.turns.loaded:
            return lambda: model
        if (found := self._catalogue.find(model)) is not None:
            return lambda: found.name
        raise unknown("model", model, [*self._own_names, *self._catalogue.offered()])

    def _count(self, delta: str) -> None:
        """Count a request, and what waits behind it."""
        metrics.requests.labels(self._catalogue.label(delta)).inc()
        metrics.waiting.clear()
        for name, number in self.turns.waiting().items():
            metrics.waiting.labels(self._catalogue.label(name)).inc(number)

    async def load(self, name: str) -> dict[str, Any]:
        """Swap because a client wants it, and return the body of the answer; one that has begun is finished.

        Raises:
            RefusedRequestError: if it cannot be loaded.
        """
        if self._asked_for:
            raise refused(409, "another swap is in progress")
        self._asked_for = True
        swap = asyncio.ensure_future(self._load(name))
        swap.add_done_callback(lambda done: done.cancelled() or done.exception())  # the client may be gone
        return await asyncio.shield(swap)

    async def _load(self, name: str) -> dict[str, Any]:
        try:
            started = time.perf_counter()
            delta = self._catalogue.find(name)  # it may be named by its folder or Hub id
            checked = await self._swap(delta.name if delta else name, by_client=True)
            assert checked is not None
            return {
                "loaded": name, "repo": checked.repo, "revision": checked.revision,
                "seconds": time.perf_counter() - started, "tensors": checked.tensors, "notes": list(checked.notes),
            }  # fmt: skip
        finally:
            self._asked_for = False

    async def _take_turn(self, name: str) -> None:
        """Load a delta if it is not loaded yet; errors as for `_swap`."""
        await self._swap(name, by_client=False)

    async def _swap(self, name: str, by_client: bool) -> CheckedDelta | None:
        """Load a delta.

        Args:
            by_client: whether a client asked for it, so that it is loaded again if it is loaded, and the default.

        Returns:
            The delta; None if it was loaded, and no client asked.

        Raises:
            RefusedRequestError: if it cannot be.
        """
        try:
            async with self._swapping:
                if not by_client and self.turns.loaded == name:
                    return None
                started = time.perf_counter()
                checked = await self._exchanged(name, by_client)
                seconds = time.perf_counter() - started
        except RefusedRequestError as error:
            if error.status != 404:  # any name may be asked for
                metrics.failed_swaps.labels(self._catalogue.label(name)).inc()
            raise
        logger.info("Swapped to delta %s in %.2f s", name, seconds)
        metrics.swaps.labels(self._catalogue.label(name)).inc()
        metrics.swap_seconds.observe(seconds)
        return checked

    async def _exchanged(self, name: str, is_default: bool) -> CheckedDelta:
        if self.refusal:
            raise refused(501, f"this server cannot swap deltas: {self.refusal}")
        if (delta := self._catalogue.find(name)) is None:
            raise unknown("delta", name, self._catalogue.offered())
        if self._engine.errored:
            raise refused(503, "the engine has stopped: restart the server")
        try:
            return await self._switch.load(delta.repo, delta.revision, lambda: self._now_loaded(name, is_default))
        except EngineUnsoundError as error:
            self.turns.now_loaded(None)
            logger.error("Swap to delta %s: %s", name, error)
            raise refused(500, str(error)) from error
        except (CheckpointError, DeltaFormatError, WrongBaseError, DeltaRefusedError, SwapError) as error:
            if self._catalogue.find(name) is None:  # removed meanwhile
                raise unknown("delta", name, self._catalogue.offered()) from error
            if not isinstance(error, SwapError):
                raise refused(422, str(error)) from error
            logger.error("Swap to delta %s: %s", name, error)
            raise refused(500, str(error)) from error
        except (EngineDeadError, RuntimeError) as error:
            if not self._engine.errored:
                raise
            raise refused(503, "the engine has stopped: restart the server") from error

    def _now_loaded(self, name: str, is_default: bool) -> None:
        """Note what is loaded, before a request is admitted."""
        if is_default:
            self.default = name
        now, before = time.monotonic(), self.turns.loaded
        if before is not None:
            metrics.residence_seconds.labels(self._catalogue.label(before)).inc(now - self._loaded_at)
        self._loaded_at = now
        self.turns.now_loaded(name)
