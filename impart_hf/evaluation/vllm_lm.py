"""Models as lm-eval runs them by vLLM. lm-eval and vLLM must be installed to import this module."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.models.vllm_causallms import VLLM
from vllm.platforms import current_platform

from ..modeling.delta_repository import BASE_MODEL_VARIABLE
from .task_scores import TaskSettings


class EngineLM(VLLM):
    """A model that vLLM runs; vLLM reads delta repositories and pruned models through our plugin."""

    def __init__(
        self,
        source: str,
        dtype: torch.dtype,
        revision: str | None,
        base_model: str | None,
        model_args: Mapping[str, Any],
        settings: TaskSettings,
    ):
        """Start an engine.

        Args:
            source, revision: folder or Hub id of the model, and its branch, tag or commit.
            dtype: dtype of weights and cache.
            base_model: folder or Hub id of the base of a delta repository, instead of the recorded one.
            model_args: further arguments of `VLLM`, which passes on what it does not know to vLLM's `LLM`.
            settings: `batch_size` and `seed` are used.
        """
        arguments: dict[str, Any] = {
            "dtype": str(dtype).removeprefix("torch."),
            "revision": revision,
            "tokenizer_revision": revision,
            "seed": settings.seed,
            # Compiling a model takes longer on a CPU than most tasks.
            "enforce_eager": current_platform.is_cpu(),
        }
        with _base(base_model):
            super().__init__(source, batch_size=settings.batch_size, **{**arguments, **model_args})

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer requests, and keep each answer at once under the request's own arguments.

        lm-eval's class keeps them under those that it gives to vLLM, by which no other run finds them.
        """
        hook: Any = self.cache_hook  # type: ignore[has-type]
        self.cache_hook = _UnderOwnArguments(hook, requests)
        try:
            return super().generate_until(requests, disable_tqdm)
        finally:
            self.cache_hook = hook

    def stop(self) -> None:
        """Stop the engine, whose processes and memory would stay until Python ends."""
        self.model.llm_engine.engine_core.shutdown()


class _UnderOwnArguments:
    """A hook of lm-eval's cache for the answers to some requests."""

    def __init__(self, hook: Any, requests: Sequence[Any]):
        self._hook = hook
        self._arguments: dict[str, Any] = {}
        for request in requests:
            prompt, options = request.args
            # Of one prompt with two kinds of options, an answer could be that to either.
            same = self._arguments.setdefault(prompt, options) == options
            self._arguments[prompt] = options if same else None

    def add_partial(self, attr: str, arguments: tuple[str, Any], answer: str) -> None:
        """Keep an answer; `arguments` are the prompt, and what vLLM was given."""
        if (options := self._arguments.get(arguments[0])) is not None:
            self._hook.add_partial(attr, (arguments[0], options), answer)


@contextmanager
def _base(base_model: str | None) -> Iterator[None]:
    """Within this context, processes that vLLM starts take the base of delta repositories from elsewhere."""
    before = os.environ.get(BASE_MODEL_VARIABLE)
    if base_model is not None:
        os.environ[BASE_MODEL_VARIABLE] = base_model
    try:
        yield
    finally:
        if base_model is not None:
            del os.environ[BASE_MODEL_VARIABLE]
            if before is not None:
                os.environ[BASE_MODEL_VARIABLE] = before
