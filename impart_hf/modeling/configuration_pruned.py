"""Configurations of pruned models, whose layers may differ in their widths: one for each family of dense decoders.

A family's class is transformers' configuration of the family and `PrunedConfig`, which does everything. Its model type
is the family's with "pruned_" before it.
"""

import copy
import reprlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

# The layer widths: the fields that width pruning changes per layer.
LAYER_WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
# transformers loops over all layers when it reads per_layer_config: a damaged number must not make that take hours.
_MOST_LAYERS = 10_000
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")
PRUNED_PREFIX = "pruned_"  # of the model types

if TYPE_CHECKING:
    _Base = PreTrainedConfig
else:  # a subclass of PreTrainedConfig would put that class's defaults before those of the families
    _Base = object


class PrunedConfig(_Base):
    """A family's configuration whose layers may differ in attention heads, KV heads and intermediate size.

    The widths of single layers are in transformers' `per_layer_config`, {"3": {"num_attention_heads": 6}, ...}. The
    family's own fields describe the model before width pruning, and hold for all widths that `per_layer_config` does
    not list. Reading a field that differs between layers (`config.num_attention_heads`) raises transformers'
    AmbiguousGlobalPerLayerAttributeError, because code that uses one number for all layers would be wrong for this
    model. Read `widths` instead, or `per_layer_config[i]`, which is the configuration of layer i.

    Attributes:
        family_name: the family's name for people.
        head_dim: dimensions of a head, the same in all layers, and not changed by pruning.
        pruning: the model's history, {"base_model", "base_parameters", "steps": [...]}; None if it has none.

    Raises:
        ValueError: if a size is not a positive integer, heads are not a multiple of KV heads, or `per_layer_config`
            holds anything but widths of existing layers.
    """

    family_name: ClassVar[str]
    # The family's fields, some of which may be None in one family and not in another.
    hidden_size: Any
    num_hidden_layers: Any
    num_attention_heads: Any
    num_key_value_heads: Any
    intermediate_size: Any
    head_dim: Any
    pruning: dict[str, Any] | None

    def __init_subclass__(cls, *args, **kwargs):
        super().__init_subclass__(*args, **kwargs)
        # A dataclass compares field by field, but reading a field that differs between layers raises.
        cls.__eq__ = PreTrainedConfig.__eq__  # type: ignore[assignment]
        cls.register_for_auto_class("AutoConfig")

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
        """Check RoPE on the widths before pruning: the checks of some kinds of RoPE read the number of heads."""
        super(PrunedConfig, self.before_pruning).validate_rope()

    @property
    def before_pruning(self) -> "PrunedConfig":
        """A configuration in which every layer has the widths from before width pruning."""
        config = copy.copy(self)
        config.per_layer_config = None
        return config

    @property
    def widths(self) -> list[tuple[int, int, int]]:
        """Attention heads, KV heads and intermediate size of every layer."""
        return [tuple(getattr(layer, name) for name in LAYER_WIDTHS) for layer in self.per_layer_config]  # type: ignore

    @classmethod
    def model_classes(cls) -> tuple[str, str]:
        """Return the names of the classes in modeling_pruned.py: the decoder's, and with an output projection."""
        name = cls.__name__.removesuffix("Config")
        return f"{name}Model", f"{name.removesuffix('Text')}ForCausalLM"

    @classmethod
    def auto_classes(cls) -> dict[str, str]:
        """Return `auto_map`: where the Auto classes find the family's classes in a repository."""
        decoder, language_model = cls.model_classes()
        return {
            "AutoConfig": f"configuration_pruned.{cls.__name__}",
            "AutoModel": f"modeling_pruned.{decoder}",
            "AutoModelForCausalLM": f"modeling_pruned.{language_model}",
        }

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as any configuration; `auto_map` names the files that are saved beside it, wherever it came from."""
        self.auto_map = self.auto_classes()
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Build from a dict as any configuration; the dict is not changed, those in it neither.

        Raises:
            ValueError: also for fields of the wrong type, where transformers raises an error of another class.
        """
        try:
            return super().from_dict(copy.deepcopy(dict(config_dict)), **kwargs)
        except StrictDataclassError as error:
            raise ValueError(textwrap.shorten(str(error), 290)) from error

    @classmethod
    def with_widths(
        cls,
        config: PreTrainedConfig,
        *,
        num_attention_heads: Sequence[int],
        num_key_value_heads: Sequence[int],
        intermediate_size: Sequence[int],
    ) -> "PrunedConfig":
        """Make the configuration of a model after width pruning, ready to be written.

        Args:
            config: the family's configuration before; its fields stay, also those that the widths replace. A
                `PrunedConfig` keeps the fields of the model before its own pruning.
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
        fields["architectures"] = [cls.model_classes()[1]]
        fields["auto_map"] = cls.auto_classes()
        return cls.from_dict(fields)


@strict
class PrunedLlamaConfig(PrunedConfig, LlamaConfig):
    """A `LlamaConfig` whose layers may differ in their widths; see `PrunedConfig`."""

    model_type = "pruned_llama"
    family_name = "LLaMA"
    pruning: dict[str, Any] | None = None


@strict
class PrunedQwen2Config(PrunedConfig, Qwen2Config):
    """A `Qwen2Config` whose layers may differ in their widths; see `PrunedConfig`."""

    model_type = "pruned_qwen2"
    family_name = "Qwen2"
    pruning: dict[str, Any] | None = None
    head_dim: int | None = None


@strict
class PrunedQwen3Config(PrunedConfig, Qwen3Config):
    """A `Qwen3Config` whose layers may differ in their widths; see `PrunedConfig`."""

    model_type = "pruned_qwen3"
    family_name = "Qwen3"
    pruning: dict[str, Any] | None = None


@strict
class PrunedMistralConfig(PrunedConfig, MistralConfig):
    """A `MistralConfig` whose layers may differ in their widths; see `PrunedConfig`."""

    model_type = "pruned_mistral"
    family_name = "Mistral"
    pruning: dict[str, Any] | None = None


@strict
class PrunedGemma2Config(PrunedConfig, Gemma2Config):
    """A `Gemma2Config` whose layers may differ in their widths; see `PrunedConfig`."""

    model_type = "pruned_gemma2"
    family_name = "Gemma 2"
    pruning: dict[str, Any] | None = None


@strict
class PrunedGemma3TextConfig(PrunedConfig, Gemma3TextConfig):
    """A `Gemma3TextConfig` whose layers may differ in their widths; see `PrunedConfig`."""

    model_type = "pruned_gemma3_text"
    family_name = "Gemma 3"
    pruning: dict[str, Any] | None = None


@strict
class PrunedPhi3Config(PrunedConfig, Phi3Config):
    """A `Phi3Config` whose layers may differ in their widths; see `PrunedConfig`."""

    model_type = "pruned_phi3"
    family_name = "Phi-3"
    pruning: dict[str, Any] | None = None
    head_dim: int | None = None


# The configurations of all families, by the model types of pruned models.
PRUNED_CONFIGS: dict[str, type[PrunedConfig]] = {
    config.model_type: config
    for config in (
        PrunedLlamaConfig,
        PrunedQwen2Config,
        PrunedQwen3Config,
        PrunedMistralConfig,
        PrunedGemma2Config,
        PrunedGemma3TextConfig,
        PrunedPhi3Config,
    )
}


def pruned_config_class(model_type: Any) -> type[PrunedConfig] | None:
    """Return the configuration of a family, by its own model type or that of its pruned models; None if unknown.

    Args:
        model_type: from a config.json: it may be anything.
    """
    if not isinstance(model_type, str):
        return None
    return PRUNED_CONFIGS.get(f"{PRUNED_PREFIX}{model_type.removeprefix(PRUNED_PREFIX)}")


def is_pruned_type(model_type: Any) -> bool:
    """Return whether a model type, which may be anything, is that of models with widths by layer."""
    return isinstance(model_type, str) and model_type in PRUNED_CONFIGS


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
                    f"per_layer_config: layer {layer} has {reprlib.repr(name)}, but layers of a pruned model may "
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
