"""Swapping the delta of a running engine, from Python."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from .deltas import CheckedDelta, DeltaChecker
from .gate import Gate, gated

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.engine.protocol import EngineClient

T = TypeVar("T")
_POLL_SECONDS = 0.5  # between checks that the engine is alive


class SwapError(RuntimeError):
    """A swap that did not happen; the engine continues to serve the old weights."""


class SwapInProgressError(SwapError):
    """A swap was requested while another one is in progress."""


class EngineUnsoundError(RuntimeError):
    """A swap that failed and could not be undone; the engine has no usable weights."""


class DeltaSwitch:
    """Loads one delta after another into a running `LLM`.

        llm = LLM("meta-llama/Llama-2-13b-hf")
        deltas = DeltaSwitch(llm)
        deltas.load("user/math-delta")
        llm.generate(...)
        deltas.load(None)  # the base itself

    The engine may have been started on the base or on any delta of it.

    Attributes:
        loaded: folder or Hub id of the delta that the engine serves; None for the base itself.
    """

    def __init__(self, llm: "LLM"):
        """Set up swaps for an engine.

        Raises:
            DeltaRefusedError: if the engine was started with adapters or a draft model.
            CheckpointError, DeltaFormatError, WrongBaseError: if the engine's own files are missing or changed.
        """
        self._llm = llm
        self._checker = DeltaChecker(llm.llm_engine.vllm_config)
        self._busy = threading.Lock()
        self.loaded = self._checker.files.model if self._checker.files.is_delta else None

    def load(self, repo: str | None, revision: str | None = None) -> CheckedDelta:
        """Load the weights of a delta repository on the engine's base.

        Args:
            repo: folder or Hub id of the delta repository; None for the base's own weights.
            revision: branch, tag or commit on the Hub.

        Returns:
            The loaded delta, with its commit, notes, and how many tensors were loaded.

        Raises:
            CheckpointError, DeltaFormatError, WrongBaseError, DeltaRefusedError: as `DeltaChecker.check`, before the
                engine is touched.
            SwapInProgressError: if another thread's swap is in progress.
            SwapError: if requests are still running, or if loading failed; the engine continues to serve the old
                weights.
            EngineUnsoundError: if loading failed and the old weights can no longer be read either.
        """
        if not self._busy.acquire(blocking=False):
            raise SwapInProgressError("another swap is in progress")
        try:
            return self._load(repo, revision)
        finally:
            self._checker.scratch.clear()
            self._busy.release()

    def generate(
        self, prompts: Sequence[Any], deltas: Sequence[str | None], sampling_params: Any = None, **options: Any
    ) -> list[Any]:
        """Generate with a delta for each prompt: those of one delta together, those of the loaded one first.

        Args:
            prompts: as for `LLM.generate`.
            deltas: for each prompt, folder or Hub id of a delta repository; None for the base.
            sampling_params: as for `LLM.generate`: for all prompts, or a list with those of each.
            options: further arguments of `LLM.generate`.

        Returns:
            The outputs, in the prompts' order.

        Raises:
            ValueError: if there are not as many deltas, or lists of parameters, as prompts.
            Exception: as for `load`. Nothing is returned then; the engine serves what it had loaded last.
        """
        each = isinstance(sampling_params, list)
        if len(deltas) != len(prompts) or (each and len(sampling_params) != len(prompts)):
            raise ValueError(
                f"give a delta, and one of a list of sampling parameters, for each of {len(prompts)} prompts"
            )
        outputs: dict[int, Any] = {}
        places = [os.path.abspath(delta) if delta and os.path.isdir(delta) else delta for delta in deltas]
        for place in sorted(dict.fromkeys(places), key=lambda place: place != self.loaded):
            if place != self.loaded:
                self.load(place)
            numbers = [number for number, own in enumerate(places) if own == place]
            parameters = [sampling_params[number] for number in numbers] if each else sampling_params
            found = self._llm.generate([prompts[number] for number in numbers], parameters, **options)
            outputs |= dict(zip(numbers, found, strict=True))
        return [outputs[number] for number in range(len(prompts))]

    def _load(self, repo: str | None, revision: str | None) -> CheckedDelta:
        engine = self._llm.llm_engine
        if engine.has_unfinished_requests():
            raise SwapError("requests are still running: let generate() or wait_for_completion() return first")
        checked = self._checker.check(repo, revision)
        answers = self._llm.collective_rpc("impart_hf_load_delta", args=_arguments(checked))
        self._llm.reset_prefix_cache(reset_connector=_has_connector(engine.vllm_config))
        loaded = _loaded(checked, answers)
        self.loaded = loaded.repo
        return loaded


class AsyncDeltaSwitch:
    """`DeltaSwitch` for vLLM's asynchronous engine: running requests finish on the old delta, new requests wait.

    The engine's `generate` and `encode` are put behind a gate. vLLM's own pause is not enough: vLLM counts a request
    that was preempted, because the KV cache was full, as a new one, which would then continue with other weights.

    Attributes:
        checker: the checker of deltas for this engine.
        requests: a gate for requests that make several calls to the engine; it is closed before the engine's own gate.
    """

    def __init__(self, engine: "EngineClient"):
        """Set up swaps for an engine; raises what `DeltaSwitch` raises."""
        self._engine = engine
        self.checker = DeltaChecker(engine.vllm_config)
        self.requests, self._calls = Gate(), Gate()
        for name in ("generate", "encode"):
            setattr(engine, name, gated(getattr(engine, name), self._calls))
        self._swap: asyncio.Task[CheckedDelta] | None = None

    @property
    def swapping(self) -> bool:
        """Whether a swap is in progress."""
        return self._swap is not None and not self._swap.done()

    async def load(
        self, repo: str | None, revision: str | None = None, loaded: Callable[[], None] | None = None
    ) -> CheckedDelta:
        """Load the weights of a delta repository on the engine's base; as `DeltaSwitch.load`.

        A swap that has begun is finished even if the caller is cancelled. After an `EngineUnsoundError` requests wait
        until a later swap succeeds.

        Args:
            repo, revision: as for `DeltaSwitch.load`.
            loaded: called when the weights are in place and no request has been admitted yet.

        Raises:
            SwapInProgressError: if another swap is in progress.
            EngineDeadError: vLLM's error, if the engine has died.
        """
        if self.swapping:
            raise SwapInProgressError("another swap is in progress")
        self._swap = asyncio.ensure_future(self._check_and_load(repo, revision, loaded))
        # The caller may be gone, so the error is read here.
        self._swap.add_done_callback(lambda swap: swap.cancelled() or swap.exception())
        return await asyncio.shield(self._swap)

    async def _check_and_load(
        self, repo: str | None, revision: str | None, loaded: Callable[[], None] | None
    ) -> CheckedDelta:
        try:
            checked = await asyncio.to_thread(self.checker.check, repo, revision)
            return await self._load(checked, loaded)
        finally:
            self.checker.scratch.clear()

    async def _load(self, checked: CheckedDelta, loaded: Callable[[], None] | None) -> CheckedDelta:
        resume = True
        try:
            for gate in (self.requests, self._calls):
                await self._unless_dead(gate.close())
            await self._unless_dead(self._engine.pause_generation(mode="wait"))
            call = self._engine.collective_rpc("impart_hf_load_delta", args=_arguments(checked))
            answers = await self._unless_dead(call)
            connector = _has_connector(self._engine.vllm_config)
            await self._unless_dead(self._engine.reset_prefix_cache(reset_connector=connector))
            result = _loaded(checked, answers)
            if loaded is not None:
                loaded()
            return result
        except EngineUnsoundError:
            resume = False
            raise
        finally:
            if resume:
                try:
                    await self._unless_dead(self._engine.resume_generation())
                finally:
                    for gate in (self._calls, self.requests):
                        gate.open()

    async def _unless_dead(self, call: Coroutine[Any, Any, T]) -> T:
        """Return the result of a call to the engine; raise the engine's error if it dies before it answers."""
        task = asyncio.ensure_future(call)
        while not task.done():
            await asyncio.wait({task}, timeout=_POLL_SECONDS)
            if self._engine.errored and not task.done():
                task.cancel()
                raise self._engine.dead_error
        return task.result()


def _arguments(checked: CheckedDelta) -> tuple[str | None, str | None, str | None]:
    """Return the arguments of the workers' `load_delta`."""
    return checked.repo, checked.revision, checked.dense


def _has_connector(vllm_config: Any) -> bool:
    """Return whether blocks of the KV cache are also kept outside the engine."""
    return vllm_config.kv_transfer_config is not None


def _loaded(checked: CheckedDelta, answers: Sequence[dict[str, Any]]) -> CheckedDelta:
    """Return a delta as the workers have loaded it, of whose answers to `load_delta` none may have an error.

    Raises:
        SwapError, EngineUnsoundError: if a worker failed.
    """
    name = checked.repo or "the base"
    for answer in answers:
        if answer["error"] and not answer["sound"]:
            raise EngineUnsoundError(
                f"'{name}' could not be loaded ({answer['error']}), and neither could the weights that were served "
                f"before ({answer['undoing']}): restore their files and swap again, or restart the engine"
            )
        if answer["error"]:
            raise SwapError(f"'{name}' could not be loaded, the old weights are back: {answer['error']}")
    return replace(checked, tensors=max(answer["tensors"] for answer in answers))
