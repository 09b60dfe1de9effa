"""LLaMA with different layer widths, the result of width pruning."""

import json
from pathlib import Path

from huggingface_hub import ModelCard
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from .configuration_pruned_llama import PrunedLlamaConfig
from .pruned_llama_card import pruned_model_card


class PrunedLlamaModel(LlamaModel):
    """`LlamaModel` whose decoder layers have their own widths; the forward pass is `LlamaModel`'s."""

    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig):
        """Build the modules as `LlamaModel.__init__` does, which would build all layers with one set of widths."""
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(_decoder_layer(config, number) for number in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # Some kinds of RoPE read the number of heads without using it, and cannot read it from the model's
        # configuration. Any layer's will do, since head_dim is the same for all.
        self.rotary_emb = LlamaRotaryEmbedding(config=config.per_layer_config[0])  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    """`LlamaForCausalLM` with the widths of a `PrunedLlamaConfig`; tensor names and forward pass are the same.

    Everything that works with the modules of a LLaMA works here: generation and its caches, attention implementations,
    training, PEFT, device maps. `save_pretrained` writes the reader's files into the checkpoint, so that it also loads
    with `trust_remote_code=True` if impart-hf is not installed.
    """

    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = PrunedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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


def _decoder_layer(config: PrunedLlamaConfig, number: int) -> LlamaDecoderLayer:
    layer = LlamaDecoderLayer(config.per_layer_config[number], number)  # type: ignore[arg-type]
    # A layer's configuration is a copy, but changes of the model's, such as the attention implementation, must reach
    # the layer.
    layer.self_attn.config = layer.mlp.config = config
    return layer


PrunedLlamaModel.register_for_auto_class("AutoModel")
PrunedLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["PrunedLlamaForCausalLM", "PrunedLlamaModel"]
