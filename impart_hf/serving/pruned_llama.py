"""vLLM's LLaMA, with layers of different widths."""

from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.llama import LlamaForCausalLM as VllmLlama
from vllm.model_executor.models.utils import extract_layer_index


class PrunedLlamaDecoderLayer(LlamaDecoderLayer):
    """A decoder layer with the widths that the configuration gives its layer number."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None, **kwargs: Any):
        config = config or vllm_config.model_config.hf_config
        number = extract_layer_index(prefix)
        layer = config.per_layer_config[number]
        _check_parallel(layer, number, vllm_config.parallel_config.tensor_parallel_size)
        super().__init__(vllm_config, prefix, config=layer, **kwargs)


class PrunedLlamaForCausalLM(VllmLlama):
    """`LlamaForCausalLM` built from a `PrunedLlamaConfig`; vLLM gives each layer a KV cache for its own heads."""

    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = PrunedLlamaDecoderLayer
    ):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)


def _check_parallel(layer: Any, number: int, processes: int) -> None:
    """Check that a layer can be divided among the processes of tensor parallelism.

    Raises:
        ValueError: if not; the message names the layer and its widths.
    """
    heads, kv_heads, channels = layer.num_attention_heads, layer.num_key_value_heads, layer.intermediate_size
    if heads % processes or channels % processes or (kv_heads % processes and processes % kv_heads):
        raise ValueError(
            f"layer {number} of this pruned LLaMA has {heads} attention heads, {kv_heads} KV heads and {channels} "
            f"channels, which cannot be divided among --tensor-parallel-size {processes}: heads and channels must be "
            "multiples of it, KV heads multiples or divisors; use fewer processes"
        )
