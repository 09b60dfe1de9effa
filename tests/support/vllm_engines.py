"""vLLM engines for the tests, in a process of their own: an engine binds its process to cores and never lets go.

    with EngineProcess() as engine:
        engine.start(folder)
        assert engine.tokens(PROMPTS) == greedy_tokens(reference, PROMPTS)

An `LLM` runs within that process, so that one start of Python and vLLM serves a whole module of tests.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from impart_hf import LowRankConfig, compress
from support.tiny_models import VOCABULARY, Pair

HEADS = {"head_dim": 32}  # vLLM's attention on CPUs wants no smaller ones
NEW_TOKENS = 8
PROMPTS = [list(range(5, 25)), [7, 100, 3, 50], [200] * 30 + [11]]
LONG = [(11 * i) % VOCABULARY for i in range(100)]  # long enough for whole blocks of it to be cached
# One core is as fast as two with models this small; tests of servers and of two workers change what they need to.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
_ANSWER_SECONDS = 300


class EngineError(Exception):
    """What went wrong in the engine's process: "TypeName: message"."""


class EngineProcess:
    """A process that holds one `LLM` at a time."""

    def __init__(self, **environment: str):
        """Start it; `environment` is added to its environment variables."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        # Set before it starts: much of it is read when modules are imported.
        with mock.patch.dict(os.environ, {**ENVIRONMENT, **environment}):
            self._process.start()
        theirs.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of a module there: with the holder of the `LLM` (attribute `llm`), then the arguments.

        Raises:
            EngineError: whatever it raised.
        """
        self._connection.send((function, args, kwargs))
        if not self._connection.poll(_ANSWER_SECONDS):
            self._process.kill()
            raise TimeoutError(f"{function.__name__} did not return within {_ANSWER_SECONDS} s")
        failed, value = self._connection.recv()
        if failed:
            raise EngineError(value)
        return value

    def start(self, model: Path | str, **options: Any) -> None:
        """Make an `LLM` of a model, in float32 and eager unless `options` say otherwise; the one before is let go."""
        self.run(_start, str(model), options)

    def tokens(self, prompts: list[list[int]] = PROMPTS, count: int = NEW_TOKENS, **options: Any) -> list[list[int]]:
        """What it generates greedily; `options` go to `LLM.generate`."""
        return self.run(_generate, prompts, count, options)


def greedy_tokens(
    model: PreTrainedModel, prompts: list[list[int]] = PROMPTS, count: int = NEW_TOKENS
) -> list[list[int]]:
    """What transformers generates greedily, prompt by prompt; the model forgets its end-of-sequence token."""
    model.generation_config.eos_token_id = None  # or it would stop, where vLLM is told not to
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        found.append(out[0, len(prompt) :].tolist())
    return found


def delta_of(pair: Pair, folder: Path, method: Any = None) -> Path:
    """Compress a pair, nearly without loss unless a method is given."""
    compress(str(pair.base), str(pair.finetuned), folder, method or LowRankConfig(compression_ratio=3))
    return folder


def tokens_of(folder: Path, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    """What transformers generates greedily with the model in a folder."""
    return greedy_tokens(AutoModelForCausalLM.from_pretrained(folder), prompts)


class _Holder:
    llm: Any = None
    deltas: Any = None  # a `DeltaSwitch`, for the tests that swap


def _serve(connection: Any) -> None:
    holder = _Holder()
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            connection.send((False, function(holder, *args, **kwargs)))
        except BaseException as error:
            traceback.print_exc()
            connection.send((True, f"{type(error).__name__}: {error}"))


def _start(holder: _Holder, model: str, options: dict[str, Any]) -> None:
    import gc

    from vllm import LLM

    holder.llm = holder.deltas = None
    gc.collect()
    gc.freeze()  # a start collects garbage several times, and need not look through all that imports have made
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "disable_log_stats": True}
    holder.llm = LLM(model, **{**settings, **options})


def _generate(holder: _Holder, prompts: list[list[int]], count: int, options: dict[str, Any]) -> list[list[int]]:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    outputs = holder.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False, **options
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def swap_to(
    holder: Any, repo: Path | str | None, revision: str | None = None
) -> tuple[str | None, str | None, tuple[str, ...]]:
    """Swap to a delta; its repository, commit and notes."""
    from impart_hf.serving import DeltaSwitch

    if holder.deltas is None:
        holder.deltas = DeltaSwitch(holder.llm)
    checked = holder.deltas.load(repo if repo is None else str(repo), revision)
    assert holder.deltas.loaded == checked.repo
    return checked.repo, checked.revision, checked.notes


def generate_by_delta(holder: Any, prompts: list[list[int]], deltas: list[str | None]) -> list[list[int]]:
    """What each prompt's delta says, by one call."""
    from vllm import SamplingParams

    from impart_hf.serving import DeltaSwitch

    if holder.deltas is None:
        holder.deltas = DeltaSwitch(holder.llm)
    parameters = [SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True) for _ in prompts]
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = holder.deltas.generate(given, deltas, parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
