"""Width-pruned models and their oracle: the dense model in which everything that was removed contributes nothing.

    pruned, dense = pruned_and_dense()

Both compute the same function. The pruned one holds rows and columns of the dense one's matrices, cut out here by
plain indexing; the dense one keeps its size, and the columns of o_proj and down_proj that would read a removed head or
channel are zero. A wrong head, a wrong order or a wrong KV group shows in the logits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from impart_hf.modeling.configuration_pruned import PRUNED_CONFIGS, PrunedConfig
from support.tiny_models import make_model, tiny_config
from support.without_impart_hf import WITHOUT_IMPART_HF

IDS = torch.randint(4, 320, (2, 20), generator=torch.Generator().manual_seed(0))
HEAD_DIM = 8
INTERMEDIATE = 64


@dataclass(frozen=True)
class Kept:
    """What stays of a layer: KV groups, the query heads of each of them (by their place in it), channels."""

    groups: tuple[int, ...]
    queries: tuple[int, ...]
    channels: tuple[int, ...]


# Eight heads, two on each KV head. One layer is left as it is, one is left with a single head.
KEPT = (
    Kept((0, 2, 3), (0, 1), tuple(range(0, INTERMEDIATE, 2))),
    Kept((1,), (1,), (3, 5, 8, 13, 21, 34, 55)),
    Kept((0, 1, 2, 3), (0,), tuple(range(11, INTERMEDIATE))),
    Kept((0, 1, 2, 3), (0, 1), tuple(range(INTERMEDIATE))),
)
# Eight heads with keys and values of their own.
KEPT_MHA = (
    Kept((0, 2, 3, 6, 7), (0,), tuple(range(1, INTERMEDIATE, 3))),
    Kept((5,), (0,), (63,)),
    Kept(tuple(range(8)), (0,), tuple(range(40))),
)


_SLIDING, _FULL = "sliding_attention", "full_attention"
_GEMMA = {"hidden_size": 48, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 20.0, "sliding_window": 6}
# Every family, by model type, with what is special about it: the kind of `tiny_config`, and fields.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"hidden_size": 48, "attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": 6, "hidden_size": 48}),
    "gemma2": ("gemma2", {**_GEMMA, "final_logit_softcapping": 10.0}),
    "gemma3_text": (
        "gemma3",
        {
            **_GEMMA,
            "layer_types": [_SLIDING, _FULL, _SLIDING, _SLIDING],
            "rope_parameters": {
                _FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                _SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": (
        "phi3",
        {
            "sliding_window": 6,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [2.0] * 2,
                "long_factor": [4.0] * 2,
            },
        },
    ),
}


def dense_config(kept: tuple[Kept, ...] = KEPT, family: str = "llama", **changes: Any) -> PreTrainedConfig:
    """The dense model's configuration; `changes` are fields of it."""
    grouped = kept is not KEPT_MHA
    fields = {"num_attention_heads": 8, "num_key_value_heads": 4 if grouped else 8, "head_dim": HEAD_DIM}
    fields |= {"intermediate_size": INTERMEDIATE, "num_hidden_layers": len(kept)}
    kind, special = FAMILIES[family]
    return tiny_config(kind, **{**fields, **special, **changes})


def pruned_config(kept: tuple[Kept, ...] = KEPT, family: str = "llama", **changes: Any) -> PrunedConfig:
    """The pruned model's configuration."""
    return PRUNED_CONFIGS[f"pruned_{family}"].with_widths(
        dense_config(kept, family, **changes),
        num_attention_heads=[len(k.groups) * len(k.queries) for k in kept],
        num_key_value_heads=[len(k.groups) for k in kept],
        intermediate_size=[len(k.channels) for k in kept],
    )


@torch.no_grad()
def pruned_and_dense(
    kept: tuple[Kept, ...] = KEPT,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    family: str = "llama",
    **changes: Any,
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A pruned model and the dense one that computes the same; `changes` are fields of the configuration."""
    dense = make_model(dense_config(kept, family, **changes), seed, dtype)
    for name, parameter in dense.named_parameters():  # biases start as zeros, norms as ones: nothing would show
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.add_(0.3 * noise.to(dtype))
    pruned = make_model(pruned_config(kept, family, **changes), seed, dtype)
    weights = {name: cut(name, tensor, kept, dense.config) for name, tensor in dense.state_dict().items()}
    pruned.load_state_dict(weights)
    for layer, keep in zip(dense.model.layers, kept, strict=True):
        rows = head_rows(_query_heads(keep, dense.config))
        removed = torch.ones(layer.self_attn.o_proj.in_features, dtype=torch.bool)
        removed[rows] = False
        layer.self_attn.o_proj.weight[:, removed] = 0
        removed = torch.ones(layer.mlp.down_proj.in_features, dtype=torch.bool)
        removed[list(keep.channels)] = False
        layer.mlp.down_proj.weight[:, removed] = 0
    return pruned, dense


def cut(name: str, tensor: torch.Tensor, kept: tuple[Kept, ...], config: PreTrainedConfig) -> torch.Tensor:
    """What stays of one of the dense model's tensors."""
    if not name.startswith("model.layers."):
        return tensor
    keep = kept[int(name.split(".")[2])]
    linear, what = name.split(".")[-2:]
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if linear == "qkv_proj":
        queries, rest = head_rows(_query_heads(keep, config)), head_rows(keep.groups)
        keys = [heads * HEAD_DIM + row for row in rest]
        return tensor[[*queries, *keys, *(groups * HEAD_DIM + row for row in keys)]]
    if linear == "gate_up_proj":
        return tensor[[*keep.channels, *(INTERMEDIATE + channel for channel in keep.channels)]]
    if linear == "q_proj":
        return tensor[head_rows(_query_heads(keep, config))]
    if linear in ("k_proj", "v_proj"):
        return tensor[head_rows(keep.groups)]
    if linear == "o_proj" and what == "weight":
        return tensor[:, head_rows(_query_heads(keep, config))]
    if linear in ("gate_proj", "up_proj"):
        return tensor[list(keep.channels)]
    if linear == "down_proj" and what == "weight":
        return tensor[:, list(keep.channels)]
    return tensor


def head_rows(heads: tuple[int, ...]) -> list[int]:
    """The rows of a projection that belong to heads."""
    return [head * HEAD_DIM + i for head in heads for i in range(HEAD_DIM)]


def _query_heads(keep: Kept, config: PreTrainedConfig) -> tuple[int, ...]:
    size = config.num_attention_heads // config.num_key_value_heads
    return tuple(group * size + query for group in keep.groups for query in keep.queries)


def run_without_impart_hf(script: str, modules: Path, *args: str) -> str:
    """Run a script that cannot import impart_hf, with a cache of remote code of its own; returns what it printed."""
    env = {**os.environ, "HF_HOME": str(modules / "hf_home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_IMPART_HF + script, *args]
    modules.mkdir(exist_ok=True)
    done = subprocess.run(command, env=env, cwd=modules, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def load_pruned(folder: Path, **kwargs: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@torch.no_grad()
def logits(model: torch.nn.Module, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=IDS, **kwargs).logits


def assert_same(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def greedy(model: PreTrainedModel, ids: torch.Tensor = IDS, **kwargs: Any) -> list[list[int]]:
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "min_new_tokens": 12, **kwargs}
    return model.generate(ids, do_sample=False, **kwargs)[:, ids.shape[1] :].tolist()


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts of different lengths, the shorter one padded on the left."""
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :7], mask[0, :7] = 3, 0
    return ids, mask
