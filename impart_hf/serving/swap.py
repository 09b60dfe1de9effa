"""Swapping the delta of a running engine, from Python."""

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .deltas import CheckedDelta, DeltaChecker
from .gate import Gate, gated

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.engine.protocol import EngineClient

T = TypeVar("T")
_LOOK_SECONDS = 0.5  # between looks at whether the engine is alive


class SwapError(RuntimeError):
    """A swap that did not happen; the engine serves what it served before."""


class SwapInProgressError(SwapError):
    """A second swap while the first is not done."""


class EngineUnsoundError(RuntimeError):
    """A swap that failed and could not be undone: the engine has no weights that are worth serving."""


class DeltaSwitch:
    """Loads one delta after the other into a running `LLM`.

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
        """
        Raises:
            DeltaRefusedError: if the engine was started with adapters or a draft model.
            CheckpointError, DeltaFormatError, WrongBaseError: if the engine's own files are gone or changed.
        """
        self._llm = llm
        self._checker = DeltaChecker(llm.llm_engine.vllm_config)
        self._busy = threading.Lock()
        self.loaded = self._checker.files.model if self._checker.files.is_delta else None

    def load(self, repo: str | None, revision: str | None = None) -> CheckedDelta:
        """Give the engine the weights of a delta repository on its base.

        Args:
            repo: folder or Hub id of the delta repository; None for the base's own weights.
            revision: branch, tag or commit on the Hub.

        Returns:
            What was loaded, its commit and notes included.

        Raises:
            CheckpointError, DeltaFormatError, WrongBaseError, DeltaRefusedError: as `DeltaChecker.check` does, before
                anything is done to the engine.
            SwapInProgressError: if another thread's swap is not done yet.
            SwapError: if requests are still running, or if loading failed; the engine serves what it did before.
            EngineUnsoundError: if loading failed and the old weights cannot be read any more either.
        """
        if not self._busy.acquire(blocking=False):
            raise SwapInProgressError("another swap is in progress")
        try:
            return self._load(repo, revision)
        finally:
            self._checker.scratch.clear()
            self._busy.release()

    def _load(self, repo: str | None, revision: str | None) -> CheckedDelta:
        engine = self._llm.llm_engine
        if engine.has_unfinished_requests():
            raise SwapError("requests are still running: let generate() or wait_for_completion() return first")
        checked = self._checker.check(repo, revision)
        answers = self._llm.collective_rpc("impart_hf_load_delta", args=_arguments(checked))
        self._llm.reset_prefix_cache(reset_connector=_has_connector(engine.vllm_config))
        _raise_on_failure(answers, checked)
        self.loaded = checked.repo
        return checked


class AsyncDeltaSwitch:
    """`DeltaSwitch` for vLLM's asynchronous engine: requests that run finish on the old delta, new ones wait.

    The engine's `generate` and `encode` are put behind a gate. vLLM's own way to pause does not do: a request that was
    preempted, because the KV cache was full, counts as a new one to it, and would go on with other weights.

    Attributes:
        checker: of the deltas that the engine may load.
        requests: a gate for whatever consists of several calls to the engine; closed before the engine's own.
    """

    def __init__(self, engine: "EngineClient"):
        """Raises: as `DeltaSwitch`."""
        self._engine = engine
        self.checker = DeltaChecker(engine.vllm_config)
        self.requests, self._calls = Gate(), Gate()
        for name in ("generate", "encode"):
            setattr(engine, name, gated(getattr(engine, name), self._calls))
        self._swap: asyncio.Task[CheckedDelta] | None = None

    @property
    def swapping(self) -> bool:
        """Whether a swap has begun that is not done yet."""
        return self._swap is not None and not self._swap.done()

    async def load(self, repo: str | None, revision: str | None = None) -> CheckedDelta:
        """Give the engine the weights of a delta repository on its base; as `DeltaSwitch.load`.

        What has begun is brought to its end even if the caller is cancelled. After an `EngineUnsoundError` requests
        wait until a later swap succeeds.

        Raises:
            SwapInProgressError: if another swap is not done yet.
            EngineDeadError: vLLM's, if the engine has died.
        """
        if self.swapping:
            raise SwapInProgressError("another swap is in progress")
        self._swap = asyncio.ensure_future(self._check_and_load(repo, revision))
        self._swap.add_done_callback(lambda swap: swap.cancelled() or swap.exception())  # nobody may be there to ask
        return await asyncio.shield(self._swap)

    async def _check_and_load(self, repo: str | None, revision: str | None) -> CheckedDelta:
        try:
            checked = await asyncio.to_thread(self.checker.check, repo, revision)
            await self._load(checked)
            return checked
        finally:
            self.checker.scratch.clear()

    async def _load(self, checked: CheckedDelta) -> None:
        resume = True
        try:
            for gate in (self.requests, self._calls):
                await self._unless_dead(gate.close())
            await self._unless_dead(self._engine.pause_generation(mode="wait"))
            call = self._engine.collective_rpc("impart_hf_load_delta", args=_arguments(checked))
            answers = await self._unless_dead(call)
            connector = _has_connector(self._engine.vllm_config)
            await self._unless_dead(self._engine.reset_prefix_cache(reset_connector=connector))
            _raise_on_failure(answers, checked)
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
        """The answer to a call, which would never come from an engine that dies meanwhile."""
        task = asyncio.ensure_future(call)
        while not task.done():
            await asyncio.wait({task}, timeout=_LOOK_SECONDS)
            if self._engine.errored and not task.done():
                task.cancel()
                raise self._engine.dead_error
        return task.result()


def _arguments(checked: CheckedDelta) -> tuple[str | None, str | None, str | None]:
    """Of the workers' `load_delta`."""
    return checked.repo, checked.revision, checked.dense


def _has_connector(vllm_config: Any) -> bool:
    """Whether blocks of the KV cache are kept outside the engine, too."""
    return vllm_config.kv_transfer_config is not None


def _raise_on_failure(answers: Sequence[dict[str, Any]], wanted: CheckedDelta) -> None:
    """Look at the workers' answers to `load_delta`.

    Raises:
        SwapError, EngineUnsoundError: if one failed.
    """
    what = wanted.repo or "the base"
    for answer in answers:
        if answer["error"] and not answer["sound"]:
            raise EngineUnsoundError(
                f"'{what}' could not be loaded ({answer['error']}), and neither could the weights that were served "
                f"before ({answer['undoing']}): put their files back and swap again, or restart the engine"
            )
        if answer["error"]:
            raise SwapError(f"'{what}' could not be loaded, the old weights are back: {answer['error']}")
