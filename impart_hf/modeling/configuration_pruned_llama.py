"""Configuration of a pruned LLaMA, whose layers may differ in their widths."""

import reprlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, PreTrainedConfig

# The layer widths: the fields that width pruning changes per layer.
LAYER_WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
# transformers loops over all layers when it reads per_layer_config: a damaged number must not make that take hours.
_MOST_LAYERS = 10_000
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")


@strict
class PrunedLlamaConfig(LlamaConfig):
    """A `LlamaConfig` whose layers may differ in attention heads, KV heads and intermediate size.

    The widths of single layers are in transformers' `per_layer_config`, {"3": {"num_attention_heads": 6}, ...}. The
    fields of `LlamaConfig` describe the model before width pruning, and hold for all widths that `per_layer_config`
    does not list. Reading a field that differs between layers (`config.num_attention_heads`) raises transformers'
    AmbiguousGlobalPerLayerAttributeError, because code that uses one number for all layers would be wrong for this
    model. Read `widths` instead.

    Attributes:
        pruning: the model's history, {"base_model", "base_parameters", "steps": [...]}; None if it has none.

    Raises:
        ValueError: if a size is not a positive integer, heads are not a multiple of KV heads, or `per_layer_config`
            holds anything but widths of existing layers.
    """

    model_type = "pruned_llama"

    pruning: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            heads = self.num_attention_heads
            if heads < 1 or self.hidden_size % heads:
                raise ValueError(f"set head_dim: hidden_size {self.hidden_size} is not a multiple of {heads} heads")
            self.head_dim = self.hidden_size // heads
        # Check first: transformers accepts any attribute of a layer, and fails late on wrong types.
        _check_widths(vars(self), kwargs.get("per_layer_config"))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Check the sizes when transformers makes or saves the configuration; heads need not divide hidden_size."""
        fields = self.to_dict()
        _check_widths(fields, fields.get("per_layer_config"))

    def validate_rope(self):
        """Check RoPE on a layer's configuration: the checks of some kinds of RoPE read the number of heads."""
        LlamaConfig.validate_rope(self.per_layer_config[0])

    def __eq__(self, other):
        # A dataclass compares field by field, but reading a field that differs between layers raises.
        return PreTrainedConfig.__eq__(self, other)

    @property
    def widths(self) -> list[tuple[int, int, int]]:
        """Attention heads, KV heads and intermediate size of every layer."""
        return [tuple(getattr(layer, name) for name in LAYER_WIDTHS) for layer in self.per_layer_config]  # type: ignore

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Build from a dict as any configuration.

        Raises:
            ValueError: also for fields of the wrong type, where transformers raises an error of another class.
        """
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"config.json of a pruned LLaMA: {textwrap.shorten(str(error), 250)}") from error

    @classmethod
    def from_llama(
        cls,
        config: LlamaConfig,
        *,
        num_attention_heads: Sequence[int],
        num_key_value_heads: Sequence[int],
        intermediate_size: Sequence[int],
    ) -> "PrunedLlamaConfig":
        """Make the configuration of a LLaMA after width pruning, ready to be written.

        Args:
            config: the configuration before; its fields stay, also those that the widths replace. A
                `PrunedLlamaConfig` keeps the fields of the model before its own pruning.
            num_attention_heads, num_key_value_heads, intermediate_size: one value for every layer.

        Raises:
            ValueError: if there are not as many values as layers, or the widths are impossible.
        """
        widths = dict(zip(LAYER_WIDTHS, (num_attention_heads, num_key_value_heads, intermediate_size), strict=True))
        for name, values in widths.items():
            if len(values) != config.num_hidden_layers:
                raise ValueError(f"{name} has {len(values)} values for {config.num_hidden_layers} layers")
        fields = config.to_dict()
        for name in ("model_type", "transformers_version"):
            fields.pop(name, None)
        fields["per_layer_config"] = {
            layer: {name: values[layer] for name, values in widths.items() if values[layer] != fields[name]}
            for layer in range(config.num_hidden_layers)
        }
        fields["architectures"] = ["PrunedLlamaForCausalLM"]
        fields["auto_map"] = {
            "AutoConfig": "configuration_pruned_llama.PrunedLlamaConfig",
            "AutoModel": "modeling_pruned_llama.PrunedLlamaModel",
            "AutoModelForCausalLM": "modeling_pruned_llama.PrunedLlamaForCausalLM",
        }
        return cls.from_dict(fields)


def _check_widths(fields: Mapping[str, Any], layers: Any) -> None:
    """Check the model's sizes and every layer's widths.

    Args:
        fields: the configuration's fields.
        layers: its `per_layer_config`, from a file or a user: it may be anything.
    """
    for name in (*_SIZES, *LAYER_WIDTHS):
        _check_size(name, fields[name], "")
    if fields["num_hidden_layers"] > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {fields['num_hidden_layers']}, more than {_MOST_LAYERS}")
    if fields["head_dim"] % 2:
        raise ValueError(f"head_dim {fields['head_dim']} is odd: rotary embeddings need an even number")
    _check_heads(fields, "")
    if layers is None:
        return
    if not isinstance(layers, Mapping):
        raise ValueError(f"per_layer_config is {reprlib.repr(layers)}, not an object with layers as keys")
    seen: set[int] = set()
    for key, widths in layers.items():
        layer = _layer_number(key, fields["num_hidden_layers"])
        if layer in seen:
            raise ValueError(f"per_layer_config names layer {layer} twice")
        seen.add(layer)
        if not isinstance(widths, Mapping):
            raise ValueError(f"per_layer_config: layer {layer} has {reprlib.repr(widths)}, not an object of widths")
        for name, value in widths.items():
            if name not in LAYER_WIDTHS:
                raise ValueError(
                    f"per_layer_config: layer {layer} has {reprlib.repr(name)}, but layers of a pruned LLaMA may "
                    f"differ only in {', '.join(LAYER_WIDTHS)}"
                )
            _check_size(name, value, f"per_layer_config: layer {layer}: ")
        _check_heads({**fields, **widths}, f"per_layer_config: layer {layer}: ")


def _layer_number(key: Any, layers: int) -> int:
    """Return the layer number that a key of per_layer_config names: an integer, or a string of digits."""
    is_number = isinstance(key, int) and not isinstance(key, bool)
    is_digits = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20
    if not (is_number or is_digits) or not 0 <= int(key) < layers:
        raise ValueError(f"per_layer_config names layer {reprlib.repr(key)}; the model has layers 0 to {layers - 1}")
    return int(key)


def _check_size(name: str, value: Any, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}{name} is {reprlib.repr(value)}, not an integer of at least 1")


def _check_heads(widths: Mapping[str, Any], where: str) -> None:
    heads, kv_heads = widths["num_attention_heads"], widths["num_key_value_heads"]
    if heads % kv_heads:
        raise ValueError(f"{where}num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")


PrunedLlamaConfig.register_for_auto_class("AutoConfig")

__all__ = ["PrunedLlamaConfig"]
