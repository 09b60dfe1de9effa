"""Models with different layer widths, the results of width pruning: one for each family of dense decoders.

A family's class is transformers' class and a few lines here that do the same for all of them: transformers' own
constructor runs, but builds each decoder layer by that layer's configuration. Modules, tensor names and forward passes
are transformers'.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedModel
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.phi3 import modeling_phi3 as phi3
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from .configuration_pruned import (
    LAYER_WIDTHS,
    PrunedConfig,
    PrunedGemma2Config,
    PrunedGemma3TextConfig,
    PrunedLlamaConfig,
    PrunedMistralConfig,
    PrunedPhi3Config,
    PrunedQwen2Config,
    PrunedQwen3Config,
)
from .pruned_card import pruned_model_card

if TYPE_CHECKING:
    _Base = PreTrainedModel
else:
    _Base = object


class LayerConfig:
    """The configuration of one decoder layer: the model's, as it is when it is read, but with the layer's widths.

    `per_layer_config[i]` is a copy. A layer reads this instead, because a change of the model's configuration, such as
    another attention implementation, must reach the layer.
    """

    def __init__(self, config: PrunedConfig, layer: int):
        self._config = config
        self._widths = {name: getattr(config.per_layer_config[layer], name) for name in LAYER_WIDTHS}

    def __getattr__(self, name: str) -> Any:
        if name in ("_config", "_widths") or name.startswith("__"):  # while it is copied, there are none yet
            raise AttributeError(name)
        return self._widths[name] if name in self._widths else getattr(self._config, name)


class PrunedDecoder(_Base):
    """A family's decoder, without an output projection, whose layers have their own widths."""

    config_class: type[PrunedConfig]
    # The family's decoder layer and rotary embedding, as transformers names them in the constructor.
    layer_class: ClassVar[type[nn.Module]]
    rotary_class: ClassVar[type[nn.Module]]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.register_for_auto_class("AutoModel")

    def __init__(self, config: PrunedConfig):
        def layer(config: PrunedConfig, number: int) -> nn.Module:
            return self.layer_class(LayerConfig(config, number), number)

        def rotary(config: PrunedConfig) -> nn.Module:
            # Some kinds of RoPE read the number of heads without using it, and cannot read it from the model's
            # configuration. That from before pruning will do, since head_dim is the same for all layers.
            return self.rotary_class(config.before_pruning)

        _construct(
            super().__init__, self, config, {self.layer_class.__name__: layer, self.rotary_class.__name__: rotary}
        )


class PrunedLanguageModel(_Base):
    """A family's causal language model with the widths of a `PrunedConfig`; names and forward pass are the same.

    Everything that works with the family's modules works here: generation and its caches, attention implementations,
    training, PEFT, device maps. `save_pretrained` writes the reader's files into the checkpoint, so that it also loads
    with `trust_remote_code=True` if impart-hf is not installed.
    """

    config_class: type[PrunedConfig]
    decoder_class: ClassVar[type[PrunedDecoder]]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.register_for_auto_class("AutoModelForCausalLM")

    def __init__(self, config: PrunedConfig):
        family = self.decoder_class.__bases__[-1]
        _construct(super().__init__, self, config, {family.__name__: self.decoder_class})

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # push_to_hub and save_pretrained(push_to_hub=True) both call this. By now, transformers has written a
        # README.md with the requested tags and the metadata that the repository on the Hub had before.
        config = Path(working_dir, "config.json")
        if config.is_file():  # with adapters attached, only the adapters are pushed
            readme = Path(working_dir, "README.md")
            metadata = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
            fields = json.loads(config.read_text("utf-8"))
            readme.write_text(pruned_model_card(fields, repo_id, self.num_parameters(), metadata), "utf-8")
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def _construct(constructor: Callable, model: nn.Module, config: PrunedConfig, names: dict[str, Any]) -> None:
    """Run a constructor of transformers in which these names of its module mean something else.

    So the constructor stays transformers', whatever it makes beside the layers, and the module itself unchanged.
    """
    function: Any = constructor.__func__  # type: ignore[attr-defined]
    own_names = {**function.__globals__, **names}
    FunctionType(function.__code__, own_names, closure=function.__closure__)(model, config)


class PrunedLlamaModel(PrunedDecoder, llama.LlamaModel):
    """`LlamaModel` whose decoder layers have their own widths."""

    config_class = PrunedLlamaConfig
    layer_class, rotary_class = llama.LlamaDecoderLayer, llama.LlamaRotaryEmbedding


class PrunedLlamaForCausalLM(PrunedLanguageModel, llama.LlamaForCausalLM):
    """`LlamaForCausalLM` with the widths of a `PrunedLlamaConfig`."""

    config_class = PrunedLlamaConfig
    decoder_class = PrunedLlamaModel


class PrunedQwen2Model(PrunedDecoder, qwen2.Qwen2Model):
    """`Qwen2Model` whose decoder layers have their own widths."""

    config_class = PrunedQwen2Config
    layer_class, rotary_class = qwen2.Qwen2DecoderLayer, qwen2.Qwen2RotaryEmbedding


class PrunedQwen2ForCausalLM(PrunedLanguageModel, qwen2.Qwen2ForCausalLM):
    """`Qwen2ForCausalLM` with the widths of a `PrunedQwen2Config`."""

    config_class = PrunedQwen2Config
    decoder_class = PrunedQwen2Model


class PrunedQwen3Model(PrunedDecoder, qwen3.Qwen3Model):
    """`Qwen3Model` whose decoder layers have their own widths."""

    config_class = PrunedQwen3Config
    layer_class, rotary_class = qwen3.Qwen3DecoderLayer, qwen3.Qwen3RotaryEmbedding


class PrunedQwen3ForCausalLM(PrunedLanguageModel, qwen3.Qwen3ForCausalLM):
    """`Qwen3ForCausalLM` with the widths of a `PrunedQwen3Config`."""

    config_class = PrunedQwen3Config
    decoder_class = PrunedQwen3Model


class PrunedMistralModel(PrunedDecoder, mistral.MistralModel):
    """`MistralModel` whose decoder layers have their own widths."""

    config_class = PrunedMistralConfig
    layer_class, rotary_class = mistral.MistralDecoderLayer, mistral.MistralRotaryEmbedding


class PrunedMistralForCausalLM(PrunedLanguageModel, mistral.MistralForCausalLM):
    """`MistralForCausalLM` with the widths of a `PrunedMistralConfig`."""

    config_class = PrunedMistralConfig
    decoder_class = PrunedMistralModel


class PrunedGemma2Model(PrunedDecoder, gemma2.Gemma2Model):
    """`Gemma2Model` whose decoder layers have their own widths."""

    config_class = PrunedGemma2Config
    layer_class, rotary_class = gemma2.Gemma2DecoderLayer, gemma2.Gemma2RotaryEmbedding


class PrunedGemma2ForCausalLM(PrunedLanguageModel, gemma2.Gemma2ForCausalLM):
    """`Gemma2ForCausalLM` with the widths of a `PrunedGemma2Config`."""

    config_class = PrunedGemma2Config
    decoder_class = PrunedGemma2Model


class PrunedGemma3TextModel(PrunedDecoder, gemma3.Gemma3TextModel):
    """`Gemma3TextModel` whose decoder layers have their own widths."""

    config_class = PrunedGemma3TextConfig
    layer_class, rotary_class = gemma3.Gemma3DecoderLayer, gemma3.Gemma3RotaryEmbedding


class PrunedGemma3ForCausalLM(PrunedLanguageModel, gemma3.Gemma3ForCausalLM):
    """`Gemma3ForCausalLM` with the widths of a `PrunedGemma3TextConfig`."""

    config_class = PrunedGemma3TextConfig
    decoder_class = PrunedGemma3TextModel


class PrunedPhi3Model(PrunedDecoder, phi3.Phi3Model):
    """`Phi3Model` whose decoder layers have their own widths."""

    config_class = PrunedPhi3Config
    layer_class, rotary_class = phi3.Phi3DecoderLayer, phi3.Phi3RotaryEmbedding


class PrunedPhi3ForCausalLM(PrunedLanguageModel, phi3.Phi3ForCausalLM):
    """`Phi3ForCausalLM` with the widths of a `PrunedPhi3Config`."""

    config_class = PrunedPhi3Config
    decoder_class = PrunedPhi3Model


# The families' classes without and with an output projection.
PRUNED_DECODERS: tuple[type[PrunedDecoder], ...] = (
    PrunedLlamaModel,
    PrunedQwen2Model,
    PrunedQwen3Model,
    PrunedMistralModel,
    PrunedGemma2Model,
    PrunedGemma3TextModel,
    PrunedPhi3Model,
)
PRUNED_LANGUAGE_MODELS: tuple[type[PrunedLanguageModel], ...] = (
    PrunedLlamaForCausalLM,
    PrunedQwen2ForCausalLM,
    PrunedQwen3ForCausalLM,
    PrunedMistralForCausalLM,
    PrunedGemma2ForCausalLM,
    PrunedGemma3ForCausalLM,
    PrunedPhi3ForCausalLM,
)
