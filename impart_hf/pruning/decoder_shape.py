"""What the layers of each family of dense decoders consist of, and the tensors and parameter counts that follow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..modeling.configuration_pruned import PRUNED_PREFIX, is_pruned_type, pruned_config_class

# What width pruning removes: query heads, KV groups (the heads of keys and values), channels of the MLP.
HEADS, GROUPS, CHANNELS = UNITS = ("heads", "groups", "channels")


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder layer.

    Attributes:
        name: within the layer.
        rows, columns: the units that the weight's rows or columns consist of, part after part: (HEADS, GROUPS, GROUPS)
            for query, key and value in one matrix. Empty for the hidden vector, whose entries all layers share.
    """

    name: str
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @property
    def units(self) -> tuple[str, ...]:
        return self.rows or self.columns


_OUTPUT, _DOWN = Linear("self_attn.o_proj", columns=(HEADS,)), Linear("mlp.down_proj", columns=(CHANNELS,))
_SPLIT = (
    Linear("self_attn.q_proj", (HEADS,)),
    Linear("self_attn.k_proj", (GROUPS,)),
    Linear("self_attn.v_proj", (GROUPS,)),
    _OUTPUT,
    Linear("mlp.gate_proj", (CHANNELS,)),
    Linear("mlp.up_proj", (CHANNELS,)),
    _DOWN,
)
_FUSED = (
    Linear("self_attn.qkv_proj", (HEADS, GROUPS, GROUPS)),
    _OUTPUT,
    Linear("mlp.gate_up_proj", (CHANNELS, CHANNELS)),
    _DOWN,
)
_QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION_BIAS = ("attention_bias", (*_QUERY_KEY_VALUE, "self_attn.o_proj"))
_MLP_BIAS = ("mlp_bias", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True)
class Family:
    """The tensors of a family's decoder layers.

    Attributes:
        linears: the linear layers.
        norms: norms of the hidden vector.
        head_norms: norms of one head's vector, whose weights all heads share.
        biases: pairs of a field of config.json and the linear layers that have a bias if it is true; None for the
            field if they always have one.
    """

    linears: tuple[Linear, ...] = _SPLIT
    norms: tuple[str, ...] = _TWO_NORMS
    head_norms: tuple[str, ...] = ()
    biases: tuple[tuple[str | None, tuple[str, ...]], ...] = ()


# By the model type of a model that was not pruned. A family also needs its classes in modeling/modeling_pruned.py.
FAMILIES = {
    "llama": Family(biases=(_ATTENTION_BIAS, _MLP_BIAS)),
    "qwen2": Family(biases=((None, _QUERY_KEY_VALUE),)),
    "qwen3": Family(head_norms=_HEAD_NORMS, biases=(_ATTENTION_BIAS,)),
    "mistral": Family(),
    "gemma2": Family(norms=_FOUR_NORMS, biases=(_ATTENTION_BIAS,)),
    "gemma3_text": Family(norms=_FOUR_NORMS, head_norms=_HEAD_NORMS, biases=(_ATTENTION_BIAS,)),
    "phi3": Family(linears=_FUSED),
}


@dataclass(frozen=True)
class LayerWidth:
    """The widths of one decoder layer, named as in config.json: its heads, KV groups and channels."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int

    def count(self, unit: str) -> int:
        """Return how many units of a kind the layer has."""
        return dict(zip(UNITS, dataclasses.astuple(self), strict=True))[unit]


@dataclass(frozen=True)
class DecoderShape:
    """The sizes that determine the shape of every tensor in a model that can be pruned.

    Attributes:
        family: the key of its family in `FAMILIES`.
        tied: whether the input embeddings and the output projection are one matrix.
        biased: the names of the linear layers that have biases.
        layers: the widths of the decoder layers, in order.
    """

    family: str
    hidden_size: int
    head_dim: int
    vocab_size: int
    tied: bool
    biased: tuple[str, ...]
    layers: tuple[LayerWidth, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DecoderShape:
        """Return the shape that a config.json describes.

        Raises:
            ValueError: if it is not the configuration of a family that can be pruned, or is invalid.
        """
        model_type = config.get("model_type")
        family = pruned_config_class(model_type)
        if family is None:
            raise ValueError(
                f"model_type is {model_type!r:.60}, and only these can be pruned: {', '.join(FAMILIES)}, and what "
                "pruning has made of them"
            )
        if not is_pruned_type(model_type) and config.get("per_layer_config"):
            raise ValueError(f"config.json has per_layer_config, which only a {family.model_type} can have")
        try:
            # The configuration of a pruned model accepts a whole model's fields too, and checks every number.
            parsed = family.from_dict({k: v for k, v in config.items() if k != "model_type"})
        except Exception as error:  # transformers raises errors of many types for bad fields
            raise ValueError(f"config.json does not describe a {family.family_name} model: {error}") from error
        if getattr(parsed, "use_bidirectional_attention", None):
            raise ValueError(
                "use_bidirectional_attention is set, but only models that predict the next token are pruned"
            )
        name = family.model_type.removeprefix(PRUNED_PREFIX)
        biases = FAMILIES[name].biases
        return cls(
            family=name,
            hidden_size=parsed.hidden_size,
            head_dim=parsed.head_dim,
            vocab_size=parsed.vocab_size,
            tied=parsed.tie_word_embeddings,
            biased=tuple(n for field, names in biases if field is None or getattr(parsed, field) for n in names),
            layers=tuple(LayerWidth(*widths) for widths in parsed.widths),
        )

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of every decoder layer."""
        return FAMILIES[self.family].linears

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Their names within the layer."""
        return tuple(linear.name for linear in self.linears)

    def unit_size(self, unit: str) -> int:
        """Return the rows or columns of a weight that one unit has."""
        return 1 if unit == CHANNELS else self.head_dim

    def unit_parameters(self, unit: str) -> int:
        """Return the parameters of one unit: a group's are those of its keys and values, without its heads."""
        return self.unit_size(unit) * sum(
            linear.units.count(unit) * (self.hidden_size + (bool(linear.rows) and linear.name in self.biased))
            for linear in self.linears
        )

    def layer_tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a decoder layer's tensors, by their names within the layer."""
        width, family = self.layers[layer], FAMILIES[self.family]

        def entries(units: Sequence[str]) -> int:
            return sum(width.count(unit) * self.unit_size(unit) for unit in units) or self.hidden_size

        tensors: dict[str, tuple[int, ...]] = {}
        for linear in family.linears:
            size = entries(linear.rows), entries(linear.columns)
            tensors[f"{linear.name}.weight"] = size
            if linear.name in self.biased:
                tensors[f"{linear.name}.bias"] = size[:1]
        for names, length in ((family.norms, self.hidden_size), (family.head_norms, self.head_dim)):
            tensors |= {f"{name}.weight": (length,) for name in names}
        return tensors

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
