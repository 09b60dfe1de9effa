"""What a causal language model costs: parameters, FLOPs, bytes of key-value cache, and measured time and memory.

Prefill reads a prompt of one sequence and computes the logits of its last token, as `generate` does; a decode step
reads one more token with the prompt in the cache.
"""

import functools
import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel

from ..modeling.checkpoints import CheckpointError, HubOptions, fetch_file
from .defaults import NEW_TOKENS, PROMPT_TOKENS
from .memory import PeakMemory, anonymous_bytes, return_freed_memory

T = TypeVar("T")


@dataclass(frozen=True)
class Latency:
    """Time and memory of one sequence, measured.

    Attributes:
        device: the accelerator's name, or "cpu".
        prompt_tokens: tokens that were prefilled.
        new_tokens: tokens that were decoded after them, one at a time.
        repeats: runs whose median the times are.
        prefill_seconds: of the whole prompt.
        decode_tokens_per_second: of the decode steps alone; no token is chosen, nothing else of `generate` is run.
        prefill_peak_bytes: memory in use at most during prefill, beyond the loaded model: activations and cache. On
            a CPU it is sampled, and None where the system does not say.
        decode_peak_bytes: the same of the decode steps, the whole cache included.
    """

    device: str
    prompt_tokens: int
    new_tokens: int
    repeats: int
    prefill_seconds: float
    decode_tokens_per_second: float
    prefill_peak_bytes: int | None
    decode_peak_bytes: int | None


@dataclass(frozen=True)
class ModelCost:
    """What a model costs by its shapes alone, for one sequence.

    FLOPs count a multiplication and an addition as two, in products of matrices alone (torch's FlopCounterMode).
    Attention is counted over all pairs of tokens that the implementation computes, those that a causal mask hides
    included.

    Attributes:
        parameters: all, those that are shared counted once.
        parameters_without_embeddings: without the input embedding and the output projection.
        dtype: of weights and cache, e.g. "bfloat16".
        weight_bytes: of all parameters in that dtype, as they lie in memory; a delta repository is smaller on disk.
        prompt_tokens: length of the prompt.
        prefill_flops_per_token: of prefill, divided by the tokens of the prompt.
        decode_flops_per_token: of a decode step that follows the prompt.
        kv_cache_bytes_per_token: by layer, of a token that the layer's cache holds; 0 for layers whose state does not
            grow with the text.
    """

    parameters: int
    parameters_without_embeddings: int
    dtype: str
    weight_bytes: int
    prompt_tokens: int
    prefill_flops_per_token: float
    decode_flops_per_token: int
    kv_cache_bytes_per_token: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def empty_model(source: str, dtype: torch.dtype | None = None, revision: str | None = None) -> PreTrainedModel:
    """The model without weights, on torch's meta device.

    Args:
        source: local folder or Hub id: a dense model, a delta repository or a pruned model.
        dtype: of its weights; None for the dtype that its configuration names.
        revision: branch, tag or commit on the Hub.

    Raises:
        CheckpointError: if there is no such model.
        ValueError: if it is no causal language model, or quantised.
    """
    if fetch_file(source, "config.json", HubOptions(revision)) is None:
        raise CheckpointError(f"'{source}' has no config.json: it is not a transformers checkpoint")
    config = AutoConfig.from_pretrained(source, revision=revision)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"'{source}' is a quantised checkpoint; give a model with float weights")
    try:
        with torch.device("meta"):
            # Of the ways to run experts, the one whose products are counted and that needs no numbers to route by.
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, experts_implementation="batched_mm", **({} if dtype is None else {"dtype": dtype})
            )
    except ValueError as error:
        if type(config) in AutoModelForCausalLM._model_mapping:
            raise
        raise ValueError(f"'{source}' is a {config.model_type} model, and no causal language model") from error
    named = config.architectures or []
    if named and not any(
        name == type(model).__name__ or "CausalLM" in name or "LMHead" in name or name == "DeltaCompressedForCausalLM"
        for name in named
    ):
        raise ValueError(f"'{source}' is a {named[0]}, and no causal language model")
    model.name_or_path = source
    return model.eval()


def max_positions(model: PreTrainedModel) -> int | None:
    """How many positions the model has; None if its configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_positions(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> None:
    """See that a model can read a prompt and decode so many tokens after it.

    Raises:
        ValueError: if a number is below 1, or both together are more than the model has positions.
    """
    for count, what in ((prompt_tokens, "prompt"), (new_tokens, "continuation")):
        if count < 1:
            raise ValueError(f"the {what} must have at least 1 token, got {count}")
    positions = max_positions(model)
    if positions is not None and prompt_tokens + new_tokens > positions:
        room = positions - new_tokens
        advice = f"give a prompt of {room} tokens or less" if room > 0 else "there is no room for a prompt"
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones need more than the {positions} positions "
            f"of '{model.name_or_path}': {advice}"
        )


def model_cost(model: PreTrainedModel, prompt_tokens: int = PROMPT_TOKENS) -> ModelCost:
    """Count what a model costs; nothing is computed if it lies on the meta device (`empty_model`).

    Args:
        model: a causal language model.
        prompt_tokens: length of the prompt.

    Raises:
        ValueError: if the model has not as many positions as the prompt and one more token need.
    """
    check_positions(model, prompt_tokens, 1)
    flops: list[int] = []
    with torch.inference_mode():
        prompt = torch.zeros(1, prompt_tokens, dtype=torch.int64, device=model.device)
        cache: Cache | None = None
        for tokens in (prompt, prompt[:, :1]):
            with FlopCounterMode(display=False) as counter:
                cache = _step(model, tokens, cache)
            flops.append(counter.get_total_flops())
    assert cache is not None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelCost(
        parameters=parameters,
        parameters_without_embeddings=parameters - sum(weight.numel() for weight in _embeddings(model)),
        dtype=str(model.dtype).removeprefix("torch."),
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        prompt_tokens=prompt_tokens,
        prefill_flops_per_token=flops[0] / prompt_tokens,
        decode_flops_per_token=flops[1],
        kv_cache_bytes_per_token=tuple(_bytes_per_token(layer) for layer in cache.layers),
    )


def measure_latency(
    model: PreTrainedModel,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = 5,
    seed: int = 0,
) -> Latency:
    """Measure prefill and decode of one sequence of random tokens, after a run that is not counted.

    Args:
        model: a loaded model, on the device where it is to be measured.
        prompt_tokens: length of the prompt.
        new_tokens: decode steps.
        repeats: runs of each, of which the median is taken; memory is measured in runs of its own.
        seed: of the tokens.

    Raises:
        ValueError: if a number is below 1, or prompt and new tokens are more than the model has positions.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    check_positions(model, prompt_tokens, new_tokens)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (1, prompt_tokens + new_tokens), generator=generator).to(model.device)
    prompt, following = tokens[:, :prompt_tokens], tokens[:, prompt_tokens:].split(1, dim=1)

    def prefill() -> Cache:
        return _step(model, prompt, None)

    def decode(cache: Cache) -> None:
        for token in following:
            cache = _step(model, token, cache)

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


@functools.cache
def _arguments(forward: Callable) -> tuple[str, dict[str, Any]]:
    """What a model calls its cache, and the argument that makes it compute the last token's logits alone."""
    names = inspect.signature(forward).parameters
    cache = "cache_params" if "cache_params" in names else "past_key_values"  # the first is Mamba's
    return cache, {"logits_to_keep": 1} if "logits_to_keep" in names else {}


def _step(model: PreTrainedModel, tokens: torch.Tensor, cache: Cache | None) -> Cache:
    """Read tokens, int64 (1, length), after those in the cache; the cache with them in it."""
    name, options = _arguments(type(model).forward)
    cache = model(input_ids=tokens, use_cache=True, **{name: cache}, **options).get(name)
    if not isinstance(cache, Cache):
        raise ValueError(f"'{model.name_or_path}' keeps no cache that transformers knows: decoding cannot be measured")
    return cache


def _cache_tensors(layer: Any) -> list[torch.Tensor]:
    found = (getattr(layer, name, None) for name in ("keys", "values", "conv_states", "recurrent_states"))
    return [value for value in found if isinstance(value, torch.Tensor)]


def _bytes_per_token(layer: Any) -> int:
    keys = getattr(layer, "keys", None)
    return sum(t.nbytes for t in (keys, layer.values)) // keys.shape[-2] if isinstance(keys, torch.Tensor) else 0


def _embeddings(model: PreTrainedModel) -> list[torch.Tensor]:
    """The weights of the input embedding and the output projection, one if they are tied."""
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(module.weight): module.weight for module in modules if module is not None}.values())


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
    """Append the largest growth of the device's memory, and what was `held` before on account of the same work."""
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
