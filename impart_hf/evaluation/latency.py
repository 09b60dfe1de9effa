"""Measurement of a causal language model's time and memory."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import Cache, PreTrainedModel

from .cost import check_positions, step
from .defaults import NEW_TOKENS, PROMPT_TOKENS
from .memory import PeakMemory, anonymous_bytes, return_freed_memory

T = TypeVar("T")


@dataclass(frozen=True)
class Latency:
    """Measured time and memory of one sequence.

    Attributes:
        device: the accelerator's name, or "cpu".
        prompt_tokens: number of prefilled tokens.
        new_tokens: number of tokens decoded after them, one at a time.
        repeats: number of runs; times are their median.
        prefill_seconds: time of prefill for the whole prompt.
        decode_tokens_per_second: rate of the decode steps; no token is chosen, and nothing else of `generate` runs.
        prefill_peak_bytes: peak memory of prefill in addition to the loaded model: activations and cache. On a CPU it
            is sampled; None if the system cannot measure it.
        decode_peak_bytes: the same for the decode steps, including the whole cache.
    """

    device: str
    prompt_tokens: int
    new_tokens: int
    repeats: int
    prefill_seconds: float
    decode_tokens_per_second: float
    prefill_peak_bytes: int | None
    decode_peak_bytes: int | None


def measure_latency(
    model: PreTrainedModel,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = 5,
    seed: int = 0,
) -> Latency:
    """Measure prefill and decode of one sequence of random tokens, after a warm-up run.

    Args:
        model: a loaded model, on the device where it is to be measured.
        prompt_tokens: length of the prompt.
        new_tokens: number of decode steps.
        repeats: number of timed runs, of which the median is taken; memory is measured in separate runs.
        seed: seed of the tokens.

    Raises:
        ValueError: if a number is below 1, or prompt and new tokens exceed the model's positions.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    check_positions(model, prompt_tokens, new_tokens)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (1, prompt_tokens + new_tokens), generator=generator).to(model.device)
    prompt, following = tokens[:, :prompt_tokens], tokens[:, prompt_tokens:].split(1, dim=1)

    def prefill() -> Cache:
        return step(model, prompt, None)

    def decode(cache: Cache) -> None:
        for token in following:
            cache = step(model, token, cache)

    seconds: dict[Callable, list[float]] = {prefill: [], decode: []}
    peaks: dict[Callable, list[int]] = {prefill: [], decode: []}
    with torch.inference_mode():
        decode(prefill())
        for _ in range(repeats):
            cache = _timed(prefill, seconds[prefill], model.device)
            _timed(functools.partial(decode, cache), seconds[decode], model.device)
        for _ in range(repeats if _memory_is_known(model.device) else 0):
            with _watch(model.device, peaks[prefill]):
                cache = prefill()
            held = sum(tensor.nbytes for layer in cache.layers for tensor in _cache_tensors(layer))
            with _watch(model.device, peaks[decode], held):
                decode(cache)
            del cache
    on_cuda = model.device.type == "cuda"
    return Latency(
        device=torch.cuda.get_device_name(model.device) if on_cuda else model.device.type,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        prefill_seconds=statistics.median(seconds[prefill]),
        decode_tokens_per_second=new_tokens / statistics.median(seconds[decode]),
        prefill_peak_bytes=max(peaks[prefill], default=None),
        decode_peak_bytes=max(peaks[decode], default=None),
    )


def _cache_tensors(layer: Any) -> list[torch.Tensor]:
    states = (getattr(layer, name, None) for name in ("keys", "values", "conv_states", "recurrent_states"))
    return [state for state in states if isinstance(state, torch.Tensor)]


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _timed(work: Callable[[], T], seconds: list[float], device: torch.device) -> T:
    _synchronize(device)
    started = time.perf_counter()
    result = work()
    _synchronize(device)
    seconds.append(time.perf_counter() - started)
    return result


def _memory_is_known(device: torch.device) -> bool:
    if device.type == "cpu":
        try:
            anonymous_bytes()
        except OSError:
            return False
    return device.type in ("cpu", "cuda")


@contextmanager
def _watch(device: torch.device, peaks: list[int], held: int = 0) -> Iterator[None]:
    """Append to `peaks` the largest growth of the device's memory within this context, plus `held` bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device) - start + held)
    else:
        return_freed_memory()
        with PeakMemory() as memory:
            yield
        peaks.append(memory.bytes + held)
