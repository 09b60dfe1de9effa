"""The layer widths of a LLaMA-shaped model, and the tensors and parameter counts that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..modeling.configuration_pruned import PrunedLlamaConfig

# The matrices of a decoder layer. Heads are rows of the first three and columns of the fourth; channels are rows of the
# fifth and sixth and columns of the last.
LINEAR = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_MODEL_TYPES = ("llama", "pruned_llama")


@dataclass(frozen=True)
class LayerWidth:
    """The widths of one decoder layer."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class LlamaShape:
    """The sizes that determine the shape of every tensor in a LLaMA-shaped model.

    Attributes:
        tied: whether the input embeddings and the output projection are one matrix.
        attention_bias, mlp_bias: whether the linear layers of attention and MLP have biases.
        layers: the widths of the decoder layers, in order.
    """

    hidden_size: int
    head_dim: int
    vocab_size: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    layers: tuple[LayerWidth, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LlamaShape:
        """Return the shape that a config.json describes.

        Raises:
            ValueError: if it is not the configuration of a LLaMA, pruned or not, or is invalid.
        """
        model_type = config.get("model_type")
        if model_type not in _MODEL_TYPES:
            raise ValueError(f"model_type is '{model_type}', not LLaMA-shaped ({' or '.join(_MODEL_TYPES)})")
        if model_type == "llama" and config.get("per_layer_config"):
            raise ValueError("config.json has per_layer_config, which only a pruned_llama can have")
        try:
            # PrunedLlamaConfig accepts a plain LLaMA's fields too, and checks every number.
            parsed = PrunedLlamaConfig.from_dict({k: v for k, v in config.items() if k != "model_type"})
        except Exception as error:  # transformers raises errors of many types for bad fields
            raise ValueError(f"config.json does not describe a LLaMA: {error}") from error
        return cls(
            hidden_size=parsed.hidden_size,
            head_dim=parsed.head_dim,
            vocab_size=parsed.vocab_size,
            tied=parsed.tie_word_embeddings,
            attention_bias=parsed.attention_bias,
            mlp_bias=parsed.mlp_bias,
            layers=tuple(LayerWidth(*widths) for widths in parsed.widths),
        )

    def layer_tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a decoder layer's tensors, by their names within the layer."""
        width, hidden = self.layers[layer], self.hidden_size
        heads, kv_heads = width.num_attention_heads * self.head_dim, width.num_key_value_heads * self.head_dim
        inner = width.intermediate_size
        attention = [(heads, hidden), (kv_heads, hidden), (kv_heads, hidden), (hidden, heads)]
        mlp = [(inner, hidden), (inner, hidden), (hidden, inner)]
        tensors: dict[str, tuple[int, ...]] = {}
        for name, size in zip(LINEAR, attention + mlp, strict=True):
            tensors[f"{name}.weight"] = size
            if self.attention_bias if name.startswith("self_attn") else self.mlp_bias:
                tensors[f"{name}.bias"] = size[:1]
        return tensors | {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors of the checkpoint, by name."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(len(self.layers)):
            shapes |= {f"{layer_prefix(layer)}{name}": size for name, size in self.layer_tensors(layer).items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def layer_parameters(self, layer: int) -> int:
        """Return the number of parameters of one decoder layer."""
        return sum(map(math.prod, self.layer_tensors(layer).values()))

    @property
    def decoder_parameters(self) -> int:
        """Parameters of all decoder layers; pruning ratios are shares of this number."""
        return sum(map(self.layer_parameters, range(len(self.layers))))

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; tied embeddings count once."""
        return sum(map(math.prod, self.tensors().values()))


def layer_prefix(layer: int) -> str:
    """Return the prefix of the names of a decoder layer's tensors."""
    return f"model.layers.{layer}."
