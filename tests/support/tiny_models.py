"""Tiny random models with the real transformers classes: a base, and a fine-tune that differs from it by a real delta.

    pair = save_pair(tmp_path, tiny_config("llama"))
    compress(str(pair.base), str(pair.finetuned), tmp_path / "delta", LowRankConfig(compression_ratio=4))

The delta of every matrix is low-rank plus a little noise, so that compressing it means something; norms and biases
change as well. Everything follows from seeds.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BioGptConfig,
    BloomConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    HeliumConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from impart_hf.modeling.checkpoints import config_for
from impart_hf.modeling.modeling_delta_compressed import inner_class

VOCABULARY = 320
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
CHAT_TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
_SENTENCE = "A fine-tuned model is its base model and a small difference, and the difference is what a file keeps. "

# Large weights: with the usual 0.02 a model this small says nearly the same whatever is asked.
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "tie_word_embeddings": False,
}
_KINDS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": 16}),
    "qwen2": (Qwen2Config, {}),  # biases on query, key and value
    "qwen3": (Qwen3Config, {}),  # norms on query and key
    "gemma": (GemmaConfig, {"tie_word_embeddings": True}),
    "gemma2": (Gemma2Config, {"tie_word_embeddings": True, "head_dim": 32, "sliding_window": 16}),
    "gemma3": (Gemma3TextConfig, {"tie_word_embeddings": True, "sliding_window": 16}),
    "helium": (HeliumConfig, {}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16}),
    "gpt-neox": (GPTNeoXConfig, {}),  # transformers renames its output projection
    "mamba": (MambaConfig, {"state_size": 8}),  # no attention
    "mamba2": (Mamba2Config, {"state_size": 8, "head_dim": 16, "num_heads": 8, "n_groups": 1}),  # infinity in a field
    "phi3": (Phi3Config, {}),  # query, key and value are one matrix, gate and up another
    "phi": (PhiConfig, {}),  # its output projection has a bias
    "gpt2": (GPT2Config, {"tie_word_embeddings": True}),  # Conv1D in place of linear layers
    "bloom": (BloomConfig, {"tie_word_embeddings": True}),
    "biogpt": (BioGptConfig, {"tie_word_embeddings": True}),  # its output projection has another name than lm_head
    "qwen2-moe": (
        Qwen2MoeConfig,
        {
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "gemma3-vision": (
        Gemma3Config,
        {
            "text_config": {**_SHAPE, "head_dim": 32, "sliding_window": 16, "tie_word_embeddings": True},
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 319,
            "boi_token_index": 317,
            "eoi_token_index": 318,
            "tie_word_embeddings": True,
        },
    ),
}


@dataclass(frozen=True)
class Pair:
    """Folders of a base and of its fine-tune, each as `save_pretrained` writes it, tokenizer included."""

    base: Path
    finetuned: Path


def tiny_config(kind: str = "llama", **changes: Any) -> PreTrainedConfig:
    """A configuration of one of the architectures in `_KINDS`: hidden 64, two layers, four heads on two key heads."""
    cls, fields = _KINDS[kind]
    return cls(**{**_SHAPE, **fields, **changes})


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A real byte-level BPE tokenizer of `VOCABULARY` tokens with a chat template."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator([_SENTENCE], trainer)
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **names)


def make_model(config: PreTrainedConfig, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A randomly initialised model; the caller's random state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model_class = inner_class(config)
        model = model_class._from_config(config_for(model_class, copy.deepcopy(config))).to(dtype).eval()
    model.config.dtype = dtype
    return model


def fine_tune(
    base: PreTrainedModel, seed: int = 1, strength: float = 0.1, only: Callable[[str], bool] = lambda name: True
) -> PreTrainedModel:
    """A copy of the model with a delta on its parameters.

    Args:
        base: left unchanged.
        seed: of the delta.
        strength: norm of the delta relative to that of the weights.
        only: which parameters change, by name; all, if not given.
    """
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only(name):
                before = parameter.float()
                delta = _delta(before.shape, generator)
                size = before.norm() if before.any() else before.numel() ** 0.5
                parameter.copy_(before + strength * size / delta.norm() * delta)
    return model


def _delta(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Rank four with falling singular values, and noise of a few percent."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) < 2:
        return noise
    left = torch.randn(*shape[:-1], 4, generator=generator) * torch.tensor([1.0, 0.6, 0.4, 0.2])
    right = torch.randn(*shape[:-2], 4, shape[-1], generator=generator)
    return left @ right + 0.05 * noise


def save_model(model: PreTrainedModel, folder: Path, **kwargs: Any) -> Path:
    """Save a model and its tokenizer; `kwargs` go to the model's `save_pretrained`."""
    model.save_pretrained(folder, **kwargs)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_pair(
    folder: Path,
    config: PreTrainedConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    only: Callable[[str], bool] = lambda name: True,
    **kwargs: Any,
) -> Pair:
    """A base and its fine-tune below `folder`; `kwargs` go to `save_pretrained`, for instance max_shard_size."""
    base = make_model(config, seed, dtype)
    finetuned = fine_tune(base, seed + 1, only=only)
    return Pair(save_model(base, folder / "base", **kwargs), save_model(finetuned, folder / "finetuned", **kwargs))


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in a folder, by the names they have there."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a checkpoint that has one safetensors file."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path.with_suffix(".new"), {"format": "pt"})
    os.replace(path.with_suffix(".new"), path)


def rewrite(path: Path, data: bytes) -> None:
    """Give a file new contents, leaving the old file to those who have it mapped.

    transformers does not wait for its loading threads when one of them fails; they would crash on a truncated file.
    """
    new = path.with_name(path.name + ".new")
    new.write_bytes(data)
    os.replace(new, path)


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; a field set to None is taken out."""
    value = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}, indent=2) + "\n", "utf-8")


def to_bin(folder: Path, *, shards: int = 1, zipped: bool = True) -> None:
    """Replace a checkpoint's safetensors by the pytorch_model.bin files of old; not `zipped` is from before 1.6."""
    tensors = load_tensors(folder)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        path.unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        filename = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin" if shards > 1 else "pytorch_model.bin"
        part = {name: tensors[name] for name in names[number::shards]}
        torch.save(part, folder / filename, _use_new_zipfile_serialization=zipped)
        weight_map.update(dict.fromkeys(part, filename))
    if shards > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold files of the same names and bytes."""
    names = [sorted(p.name for p in folder.iterdir()) for folder in (one, other)]
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


def is_norm(name: str) -> bool:
    """Whether a parameter is a norm's weight."""
    return re.search(r"norm", name) is not None
