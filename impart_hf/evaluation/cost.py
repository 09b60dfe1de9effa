"""Cost of a causal language model, computed from its shapes: parameters, FLOPs, bytes of key-value cache.

Prefill reads a prompt of one sequence and computes the logits of its last token, as `generate` does. A decode step
reads one more token, with the prompt in the cache.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedConfig, PreTrainedModel

from ..common.meta_model import meta_model
from ..modeling.model_files import HubOptions, fetch_config
from ..modeling.modeling_delta_compressed import is_classifier
from .defaults import PROMPT_TOKENS


@dataclass(frozen=True)
class ModelCost:
    """The cost of a model for one sequence, from its shapes.

    FLOPs count a multiplication and an addition as two, and only in matrix products (torch's FlopCounterMode).
    Attention is counted over all pairs of tokens that the implementation computes, including those that a causal mask
    hides.

    Attributes:
        parameters: number of parameters, shared ones counted once.
        parameters_without_embeddings: the same without the input embedding and the output projection.
        dtype: dtype of weights and cache, such as "bfloat16".
        weight_bytes: memory of all parameters in that dtype; a delta repository is smaller on disk.
        prompt_tokens: length of the prompt.
        prefill_flops_per_token: FLOPs of prefill, divided by the tokens of the prompt.
        decode_flops_per_token: FLOPs of a decode step after the prompt.
        kv_cache_bytes_per_token: for each layer, bytes of the cache per token; 0 for layers whose state does not grow
            with the text.
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
    """Make a model without weights, on torch's meta device.

    Args:
        source: local folder or Hub id of a dense model, a delta repository or a pruned model.
        dtype: dtype of the weights; None for the dtype in the model's configuration.
        revision: branch, tag or commit on the Hub.

    Raises:
        CheckpointError: if there is no such model.
        ValueError: if it is not a causal language model, or is quantised.
    """
    fetch_config(source, HubOptions(revision))  # called for its error messages
    config = AutoConfig.from_pretrained(source, revision=revision)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"'{source}' is a quantised checkpoint: give a model with float weights")
    _fix_rope(config.get_text_config())
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    try:
        # This implementation of experts works without real weights to route by, and its products are counted.
        model = meta_model(config, experts_implementation="batched_mm", **options)
    except ValueError as error:
        if type(config) in AutoModelForCausalLM._model_mapping:
            raise
        raise ValueError(
            f"'{source}' is a {config.model_type} model, not a causal language model: give another one"
        ) from error
    named = config.architectures or []
    known = any(name == type(model).__name__ or "CausalLM" in name or "LMHead" in name for name in named)
    if named and (is_classifier(type(model)) or not known):
        raise ValueError(f"'{source}' is a {named[0]}; `evaluate` measures causal language models only")
    model.name_or_path = source
    return model.eval()


def _fix_rope(config: PreTrainedConfig) -> None:
    """Set kinds of RoPE that read the length of a text to the usual one, because the meta device knows no lengths.

    No product of matrices depends on it.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    for kind in (parameters, *parameters.values()):  # some models have one for each kind of layer
        if isinstance(kind, dict) and kind.get("rope_type") in ("dynamic", "longrope"):
            kind["rope_type"] = "default"


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the number of positions of a model; None if its configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_positions(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> None:
    """Check that a model can read a prompt and decode new tokens after it.

    Raises:
        ValueError: if a number is below 1, or their sum exceeds the model's positions.
    """
    for count, what in ((prompt_tokens, "prompt"), (new_tokens, "continuation")):
        if count < 1:
            raise ValueError(f"the {what} must have at least 1 token, got {count}")
    positions = max_positions(model)
    if positions is not None and prompt_tokens + new_tokens > positions:
        room = positions - new_tokens
        advice = f"give a prompt of at most {room} tokens" if room > 0 else "ask for fewer new tokens"
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones need more than the {positions} positions "
            f"of '{model.name_or_path}': {advice}"
        )


def model_cost(model: PreTrainedModel, prompt_tokens: int = PROMPT_TOKENS) -> ModelCost:
    """Count the cost of a model; nothing is computed if it is on the meta device (`empty_model`).

    Args:
        model: a causal language model.
        prompt_tokens: length of the prompt.

    Raises:
        ValueError: if the model has too few positions for the prompt and one more token, or no known cache.
    """
    check_positions(model, prompt_tokens, 1)
    flops: list[int] = []
    with torch.inference_mode():
        prompt = torch.zeros(1, prompt_tokens, dtype=torch.int64, device=model.device)
        cache: Cache | None = None
        for tokens in (prompt, prompt[:, :1]):
            with FlopCounterMode(display=False) as counter:
                cache = step(model, tokens, cache)
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


@functools.cache
def _arguments(forward: Callable) -> tuple[str, dict[str, Any]]:
    """Return the name of a model's cache argument, and the argument that limits logits to the last token."""
    names = inspect.signature(forward).parameters
    cache = "cache_params" if "cache_params" in names else "past_key_values"  # Mamba has cache_params
    return cache, {"logits_to_keep": 1} if "logits_to_keep" in names else {}


def step(model: PreTrainedModel, tokens: torch.Tensor, cache: Cache | None) -> Cache:
    """Run the model on tokens, int64 (1, length), after those in the cache, and return the extended cache."""
    name, options = _arguments(type(model).forward)
    cache = model(input_ids=tokens, use_cache=True, **{name: cache}, **options).get(name)
    if not isinstance(cache, Cache):
        raise ValueError(f"'{model.name_or_path}' has no cache that transformers knows: its cost cannot be measured")
    return cache


def _bytes_per_token(layer: Any) -> int:
    keys = getattr(layer, "keys", None)
    return sum(t.nbytes for t in (keys, layer.values)) // keys.shape[-2] if isinstance(keys, torch.Tensor) else 0


def _embeddings(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return the weights of the input embedding and the output projection; one tensor if they are tied."""
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(module.weight): module.weight for module in modules if module is not None}.values())
