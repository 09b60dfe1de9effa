"""LLaMA with layers of different widths, as width pruning leaves it."""

import json
from pathlib import Path

from huggingface_hub import ModelCard
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from .configuration_pruned_llama import PrunedLlamaConfig
from .pruned_llama_card import pruned_model_card


class PrunedLlamaModel(LlamaModel):
    """`LlamaModel` with every decoder layer built from its own widths; the forward pass is `LlamaModel`'s."""

    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig):
        """Build the layers; like `LlamaModel`, which cannot be asked to: it builds all from one set of widths."""
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(_decoder_layer(config, number) for number in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # Any layer's configuration will do, as head_dim is one for all; some kinds of RoPE also read the number of
        # heads, though they make no use of it, and cannot read it from the model's.
        self.rotary_emb = LlamaRotaryEmbedding(config=config.per_layer_config[0])  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    """`LlamaForCausalLM` with the widths of a `PrunedLlamaConfig`; tensor names and forward pass are the same.

    Everything that works on a LLaMA by its modules works on this one: generation and its caches, attention
    implementations, training, PEFT, device maps. `save_pretrained` writes the reader's files into the checkpoint, so
    that it also loads with `trust_remote_code=True` where impart-hf is not installed.
    """

    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = PrunedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # Where push_to_hub and save_pretrained(push_to_hub=True) meet. transformers has put a README.md into the
        # folder, with the tags asked for and with what the repository on the Hub said of itself before.
        config = Path(working_dir, "config.json")
        if config.is_file():  # with adapters attached, only these are pushed
            readme = Path(working_dir, "README.md")
            metadata = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
            fields = json.loads(config.read_text("utf-8"))
            readme.write_text(pruned_model_card(fields, repo_id, self.num_parameters(), metadata), "utf-8")
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def _decoder_layer(config: PrunedLlamaConfig, number: int) -> LlamaDecoderLayer:
    layer = LlamaDecoderLayer(config.per_layer_config[number], number)  # type: ignore[arg-type]
    # A layer's own configuration is a copy. What is set on the model's later, such as the attention implementation,
    # must reach the layer.
    layer.self_attn.config = layer.mlp.config = config
    return layer


PrunedLlamaModel.register_for_auto_class("AutoModel")
PrunedLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["PrunedLlamaForCausalLM", "PrunedLlamaModel"]
