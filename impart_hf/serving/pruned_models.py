"""vLLM's models with layers of different widths: a class for every family that can be pruned."""

import contextlib
import copy
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn


class _Family(NamedTuple):
    """Where vLLM has what a pruned family is made of, as names below `vllm.model_executor.models`.

    Attributes:
        model: the class of the language model.
        layer: the class of its decoder layers.
        found_at: the module or class, and its attribute, where the model finds the decoder layer's class; None if it
            takes it as the argument `layer_type`.
        fields: further fields of a layer's configuration.
        ignored: fields that must not be set, as vLLM would leave out without a word what they ask for.
        in_float16: whether it can be computed in float16. vLLM's own check knows the family's model type alone.
    """

    model: str
    layer: str
    found_at: tuple[str, str] | None = None
    fields: dict[str, Any] = {}
    ignored: tuple[str, ...] = ()
    in_float16: bool = True


_LLAMA, _LLAMA_LAYER = "llama:LlamaForCausalLM", "llama:LlamaDecoderLayer"
_FAMILIES = {
    "PrunedLlamaForCausalLM": _Family(_LLAMA, _LLAMA_LAYER),
    "PrunedMistralForCausalLM": _Family("mistral:MistralForCausalLM", "mistral:MistralDecoderLayer"),
    "PrunedPhi3ForCausalLM": _Family("phi3:Phi3ForCausalLM", _LLAMA_LAYER),
    # vLLM's Qwen2 has no head_dim: it divides hidden_size by the heads, which is wrong once heads are removed. Its
    # LLaMA computes the same with biases on query, key and value, and also takes windows on some of the layers.
    "PrunedQwen2ForCausalLM": _Family(_LLAMA, _LLAMA_LAYER, fields={"qkv_bias": True}),
    "PrunedQwen3ForCausalLM": _Family(
        "qwen3:Qwen3ForCausalLM",
        "qwen3:Qwen3DecoderLayer",
        ("qwen3:Qwen3Model", "decoder_layer_type"),
        ignored=("attention_bias",),  # its part on o_proj
    ),
    "PrunedGemma2ForCausalLM": _Family(
        "gemma2:Gemma2ForCausalLM", "gemma2:Gemma2DecoderLayer", ("gemma2", "Gemma2DecoderLayer"), in_float16=False
    ),
    "PrunedGemma3ForCausalLM": _Family(
        "gemma3:Gemma3ForCausalLM", "gemma3:Gemma3DecoderLayer", ("gemma3", "Gemma3DecoderLayer"), in_float16=False
    ),
}
PRUNED_ARCHITECTURES = tuple(_FAMILIES)


def pruned_class(architecture: str) -> type[nn.Module]:
    """Return vLLM's class for a pruned model, whose layers have the widths that `per_layer_config` gives them.

    It is a subclass of vLLM's class for the family; vLLM gives each layer a KV cache for its own heads.

    Args:
        architecture: one of `PRUNED_ARCHITECTURES`.
    """
    family = _FAMILIES[architecture]
    inner = _resolve(family.model)
    layer = _layer_class(_resolve(family.layer), architecture)

    def init(self: nn.Module, *, vllm_config: Any, prefix: str = "") -> None:
        check_dtype(vllm_config.model_config.dtype, architecture)
        if family.found_at is None:
            inner.__init__(self, vllm_config=vllm_config, prefix=prefix, layer_type=layer)
        else:
            with _replaced(*family.found_at, layer):
                inner.__init__(self, vllm_config=vllm_config, prefix=prefix)

    return type(architecture, (inner,), {"__init__": init, "__module__": __name__})


def _resolve(name: str) -> Any:
    """Return a module of vLLM's models, or what it has under a name, as `llama:LlamaForCausalLM`."""
    return pkgutil.resolve_name(f"vllm.model_executor.models.{name}")


def _layer_class(inner: type[nn.Module], architecture: str) -> type[nn.Module]:
    """Return a decoder layer with the widths that the model's configuration gives its layer number."""
    from vllm.distributed import get_tensor_model_parallel_world_size
    from vllm.model_executor.models.utils import extract_layer_index

    signature = inspect.signature(inner.__init__)

    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        config = given.arguments.get("config") or given.arguments["vllm_config"].model_config.hf_config
        number = extract_layer_index(given.arguments["prefix"])
        layer = copy.copy(config.per_layer_config[number])
        check_ignored(layer, architecture)
        _check_parallel(layer, number, get_tensor_model_parallel_world_size())
        for name, value in _FAMILIES[architecture].fields.items():
            setattr(layer, name, value)
        given.arguments["config"] = layer
        inner.__init__(*given.args, **given.kwargs)

    return type(f"Pruned{inner.__name__}", (inner,), {"__init__": init, "__module__": __name__})


@contextlib.contextmanager
def _replaced(place: str, attribute: str, layer: type[nn.Module]) -> Iterator[None]:
    """Let vLLM find another class of decoder layers in a place, while a model is built.

    These models name the class in the middle of their constructor, whose only alternative is a copy of it. vLLM's
    decorator for compilation has wrapped it, so that it cannot be run with other names either. If vLLM renames the
    class, this raises an AttributeError; if it looks elsewhere, its own layers raise transformers'
    AmbiguousGlobalPerLayerAttributeError. Another model that is built meanwhile, by another thread, becomes what it
    would have been: all its layers have the model's configuration.
    """
    holder = _resolve(place)
    before = getattr(holder, attribute)
    setattr(holder, attribute, layer)
    try:
        yield
    finally:
        setattr(holder, attribute, before)


def check_dtype(dtype: torch.dtype, architecture: str) -> None:
    """Check that a family can be computed in a dtype.

    Raises:
        ValueError: if not.
    """
    if dtype == torch.float16 and not _FAMILIES[architecture].in_float16:
        raise ValueError(
            f"{architecture} is numerically unstable in float16: serve it with --dtype bfloat16 or float32"
        )


def check_ignored(layer: Any, architecture: str) -> None:
    """Check that vLLM's class computes all that a layer's configuration asks for.

    Raises:
        ValueError: if not; the message names the field.
    """
    if ignored := [name for name in _FAMILIES[architecture].ignored if getattr(layer, name, False)]:
        raise ValueError(f"{ignored[0]} is set, part of which vLLM's {_FAMILIES[architecture].model} leaves out")


def _check_parallel(layer: Any, number: int, processes: int) -> None:
    """Check that a layer can be divided among the processes of tensor parallelism.

    Raises:
        ValueError: if not; the message names the layer and its widths.
    """
    heads, kv_heads, channels = layer.num_attention_heads, layer.num_key_value_heads, layer.intermediate_size
    if heads % processes or channels % processes or (kv_heads % processes and processes % kv_heads):
        raise ValueError(
            f"layer {number} of this pruned model has {heads} attention heads, {kv_heads} KV heads and {channels} "
            f"channels, which cannot be divided among --tensor-parallel-size {processes}: heads and channels must be "
            "multiples of it, KV heads multiples or divisors; use fewer processes"
        )
