"""Base and adapter as one model, against PEFT's merge of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import lora, merged, save_adapter, with_adapter
from support.messages import naming
from support.tiny_models import VOCABULARY, edit_json, load_tensors, make_model, save_model, tiny_config
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from impart_hf.adapters.adapted_model import AdaptedModel
from impart_hf.adapters.open import open_finetune
from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.modeling.model_files import CheckpointError, HubOptions

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, tuple[str, peft.PeftConfig]] = {
    "lora": ("llama", lora()),
    "ranks and scales by layer": (
        "llama",
        lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 64}),
    ),
    "dora": ("llama", lora(use_dora=True)),
    "all biases": ("qwen2", lora(bias="all")),
    "biases of its layers": ("qwen2", lora(target_modules=["q_proj"], bias="lora_only")),
    "bias in lora": ("qwen2", lora(target_modules=["q_proj"], lora_bias=True)),
    "whole modules": ("llama", lora(modules_to_save=["lm_head", "embed_tokens", "norm"])),
    "embeddings": ("llama", lora(target_modules=["embed_tokens", "q_proj", "lm_head"])),
    "tokens": ("llama", lora(target_modules=["q_proj"], trainable_token_indices=[1, 2])),
    "tokens, tied": ("llama-tied", lora(target_modules=["q_proj"], trainable_token_indices=[1, 2])),
    "whole modules, tied": ("llama-tied", lora(modules_to_save=["lm_head", "embed_tokens"])),
    "whole modules, tied in training": ("llama-tied", lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "beside experts": ("mixtral", lora(target_modules=["q_proj"])),
    "experts, stored one by one": ("mixtral", lora(target_modules=["q_proj"], target_parameters=EXPERTS)),
    "experts, stored as a stack": ("gpt-oss", lora(target_modules=["q_proj"], target_parameters=EXPERTS)),
    "names that transformers changes": ("gpt-neox", lora(modules_to_save=["lm_head"])),
    "no attention": ("mamba", lora(target_modules=["in_proj", "x_proj"])),
    "ia3": (
        "llama",
        peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        ),
    ),
    "loha": ("llama", peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["k_proj"], init_weights=False)),
    "lokr": ("llama", peft.LoKrConfig(task_type="CAUSAL_LM", r=4, target_modules=["k_proj"], init_weights=False)),
    "adalora": ("llama", peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=10, target_modules=["k_proj"])),
    "tokens alone": ("llama-tied", peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[1, 2])),
}


def opened(base: Path, adapter: Path) -> AdaptedModel:
    model = open_finetune(str(adapter), HubOptions(), Checkpoint(str(base), HubOptions()))
    assert isinstance(model, AdaptedModel)
    return model


def assert_equal(model: AdaptedModel, folder: Path) -> None:
    """Check names, dtypes, shapes and every bit, twice: a merge leaves nothing behind."""
    wanted = load_tensors(folder)
    assert set(model.names()) == wanted.keys()
    assert model.weight_bytes == sum(tensor.nbytes for tensor in wanted.values())
    for _ in range(2):
        for name, tensor in wanted.items():
            assert (model.shape(name), model.dtype(name)) == (tuple(tensor.shape), tensor.dtype), name
            assert torch.equal(model.tensor(name), tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_pefts_merge(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    architecture, config = KINDS[kind]
    base = save_model(make_model(tiny_config(architecture), dtype=dtype), tmp_path / "base")
    adapter = save_adapter(base, config, tmp_path / "adapter")
    model = opened(base, adapter)
    assert_equal(model, merged(base, adapter, tmp_path / "merged"))
    before = load_tensors(base)
    assert any(not torch.equal(model.tensor(name), tensor) for name, tensor in before.items())
    config_of_merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config
    assert model.tied == bool(config_of_merged.tie_word_embeddings)


def test_layers_that_are_stored_transposed(tmp_path: Path) -> None:
    """GPT-2's Conv1D."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64))
    base = save_model(gpt2, tmp_path / "base")
    config = lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    adapter = save_adapter(base, config, tmp_path / "adapter")
    assert_equal(opened(base, adapter), merged(base, adapter, tmp_path / "merged"))


@pytest.mark.parametrize("saved", [[], ["embed_tokens", "lm_head"]])
def test_tokens_that_were_added(tmp_path: Path, saved: list[str]) -> None:
    """PEFT stores resized embeddings whole, whether they were trained or not."""
    base = save_model(make_model(tiny_config("llama")), tmp_path / "base")
    config = lora(modules_to_save=saved or None)
    adapter = save_adapter(base, config, tmp_path / "adapter", tokens=VOCABULARY + 3)
    model = opened(base, adapter)
    assert model.config["vocab_size"] == VOCABULARY + 3
    assert_equal(model, merged(base, adapter, tmp_path / "merged", tokens=VOCABULARY + 3))


def test_an_embedding_alone_on_a_base_that_ties_it(tmp_path: Path) -> None:
    """The output projection keeps the base's values, as before the merge; PEFT's merge would change it, too."""
    base = save_model(make_model(tiny_config("llama-tied"), dtype=torch.float32), tmp_path / "base")
    adapter = save_adapter(base, lora(target_modules=["embed_tokens", "q_proj"]), tmp_path / "adapter")
    model = opened(base, adapter)
    assert not model.tied and model.config["tie_word_embeddings"] is False and "lm_head.weight" in model.names()
    assert torch.equal(model.tensor("lm_head.weight"), load_tensors(base)["model.embed_tokens.weight"])
    ids = torch.arange(8).view(1, -1)
    with torch.no_grad():
        wanted = with_adapter(base, adapter)(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base)
        plain.config.tie_word_embeddings = False
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.clone())
        plain.load_state_dict({name: model.tensor(name) for name in model.names()}, strict=False)
        torch.testing.assert_close(plain(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_the_adapter_beside_a_model_is_on_that_model(tmp_path: Path) -> None:
    """As transformers reads a folder with both."""
    base = save_model(make_model(tiny_config("llama")), tmp_path / "base")
    own = save_model(make_model(tiny_config("llama"), seed=3), tmp_path / "own")
    save_adapter(own, lora(), own)
    assert (own / "config.json").exists() and (own / "adapter_config.json").exists()
    wanted = AutoModelForCausalLM.from_pretrained(own)
    model = opened(base, own)
    assert model.base.source == str(own)
    name = "model.layers.0.mlp.up_proj.weight"
    layer = wanted.get_submodule(name.removesuffix(".weight"))
    delta = (layer.lora_B.default.weight @ layer.lora_A.default.weight * layer.scaling["default"]).float()
    torch.testing.assert_close(
        model.tensor(name).float(), layer.base_layer.weight.float() + delta, rtol=0.01, atol=0.01
    )


def test_a_config_without_weights_beside_an_adapter(tmp_path: Path) -> None:
    base = save_model(make_model(tiny_config("llama")), tmp_path / "base")
    adapter = save_adapter(base, lora(), tmp_path / "adapter")
    (adapter / "config.json").write_bytes((base / "config.json").read_bytes())
    assert_equal(opened(base, adapter), merged(base, adapter, tmp_path / "merged"))


CHANGES: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, ("PROMPT_TUNING",)),
    "a classifier": ({"task_type": "SEQ_CLS"}, ("of a classifier", "merge_and_unload")),
    "a tagger": ({"task_type": "TOKEN_CLS"}, ("TOKEN_CLS",)),
    "repeated layers": ({"layer_replication": [[0, 2], [0, 2]]}, ("layer_replication",)),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, ("init_lora_weights", "'pissa_niter_4'")),
    "layers that the model lacks": ({"target_modules": ["c_attn"]}, ("c_attn",)),
    "layers that it does not adapt": ({"target_modules": ["q_proj"]}, ("k_proj",)),
    "a setting of the wrong type": ({"r": "four"}, ()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_adapters_that_cannot_be_merged(tmp_path: Path, change: str) -> None:
    base = save_model(make_model(tiny_config("llama")), tmp_path / "base")
    adapter = save_adapter(base, lora(), tmp_path / "adapter")
    fields, names = CHANGES[change]
    edit_json(adapter / "adapter_config.json", **fields)
    with pytest.raises(CheckpointError, match=naming(adapter, "adapter", *names)):
        opened(base, adapter)


@pytest.mark.parametrize(
    "prefix", ["base_model.model._orig_mod.", "_orig_mod.base_model.model.", "module.base_model.model."]
)
def test_names_from_inside_a_wrapper(tmp_path: Path, prefix: str) -> None:
    """As torch.compile and DistributedDataParallel leave them."""
    base = save_model(make_model(tiny_config("llama")), tmp_path / "base")
    adapter = save_adapter(base, lora(target_modules=["q_proj"], modules_to_save=["norm"]), tmp_path / "adapter")
    merged(base, adapter, tmp_path / "merged")
    path = adapter / "adapter_model.safetensors"
    save_file({name.replace("base_model.model.", prefix, 1): tensor for name, tensor in load_file(path).items()}, path)
    assert_equal(opened(base, adapter), tmp_path / "merged")


def test_adapters_of_other_bases(tmp_path: Path) -> None:
    base = save_model(make_model(tiny_config("llama")), tmp_path / "base")
    wide = save_model(make_model(tiny_config("llama", intermediate_size=192)), tmp_path / "wide")
    adapter = save_adapter(wide, lora(), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=naming(adapter, "up_proj")):
        opened(base, adapter)
    grown = save_adapter(base, lora(target_modules=["embed_tokens"]), tmp_path / "grown", tokens=VOCABULARY + 3)
    path = grown / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "base_layer" not in name}, path)
    with pytest.raises(CheckpointError, match=naming(grown, VOCABULARY + 3, base)):
        opened(base, grown)


def test_adapters_with_damaged_files(tmp_path: Path) -> None:
    base = save_model(make_model(tiny_config("llama")), tmp_path / "base")
    adapter = save_adapter(base, lora(), tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=naming(adapter)):
        opened(base, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=naming(adapter, "adapter_model.safetensors")):
        opened(base, adapter)
