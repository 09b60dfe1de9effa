"""Other architectures, dtypes and file formats than the usual: what the repository stands for is what loads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_models import (
    VOCABULARY,
    Pair,
    edit_json,
    edit_tensors,
    fine_tune,
    is_norm,
    load_tensors,
    make_model,
    save_model,
    save_pair,
    tiny_config,
    to_bin,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from impart_hf import DareConfig, DeltaCompressedConfig, ImPartConfig, LowRankConfig, compress
from impart_hf.cli.main import main
from impart_hf.modeling.delta_repository import DeltaRepository
from impart_hf.modeling.model_files import CheckpointError, HubOptions

NEARLY_LOSSLESS = LowRankConfig(compression_ratio=3)
METHODS = [ImPartConfig(compression_ratio=4), DareConfig(compression_ratio=4), LowRankConfig(compression_ratio=4)]
KINDS = ["llama", "llama-tied", "mistral", "qwen2", "gemma2", "mixtral", "gpt-oss", "gpt-neox", "mamba"]
IDS = torch.arange(5, 45).view(2, 20)


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def opened(repository: Path, base: Path | None = None) -> DeltaRepository:
    config = DeltaCompressedConfig.from_pretrained(repository)
    return DeltaRepository(str(repository), config, HubOptions(), None if base is None else str(base))


def decoded(repository: Path, base: Path | None = None) -> dict[str, torch.Tensor]:
    """What the repository stands for, decoded without transformers."""
    tensors = opened(repository, base)
    return {name: tensors.tensor(name) for name in tensors.names()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether the tensors have the same names, dtypes and entries."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def state(folder: Path, **kwargs: Any) -> dict[str, torch.Tensor]:
    return load(folder, **kwargs).state_dict()


def make_repository(pair: Pair, folder: Path, method: Any = NEARLY_LOSSLESS) -> Path:
    compress(str(pair.base), str(pair.finetuned), folder, method)
    return folder


def as_dense(repository: Path, finetuned: Path, folder: Path) -> Path:
    """A plain checkpoint of what the repository stands for, with the fine-tune's config."""
    folder.mkdir()
    save_file(decoded(repository), folder / "model.safetensors", {"format": "pt"})
    shutil.copy(finetuned / "config.json", folder)
    return folder


def distance(one: Path, other: Path) -> torch.Tensor:
    """How far the logits of two models are from each other."""
    with torch.no_grad():
        return (load(one)(IDS).logits.float() - load(other)(IDS).logits.float()).norm()


# Architectures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("kind", KINDS)
def test_what_loads_is_what_is_stored(pair_of: Callable[[str], Pair], tmp_path: Path, kind: str, method: Any) -> None:
    pair = pair_of(kind)
    repository = make_repository(pair, tmp_path / "delta", method)
    loaded, info = load(repository, output_loading_info=True)
    assert not any(info.values())
    assert isinstance(loaded, type(load(pair.finetuned)))
    assert equal(loaded.state_dict(), state(as_dense(repository, pair.finetuned, tmp_path / "dense")))
    encoded = {name.removesuffix(".delta") for name in load_tensors(repository) if name.endswith(".delta")}
    assert encoded == {name for name, t in load_tensors(pair.base).items() if t.shape[-2:].numel() >= 4096}
    assert loaded.generate(IDS, max_new_tokens=3).shape == (2, 23)


@pytest.mark.parametrize("kind", KINDS)
def test_nearly_lossless_is_near_the_finetune(pair_of: Callable[[str], Pair], tmp_path: Path, kind: str) -> None:
    pair = pair_of(kind)
    repository = make_repository(pair, tmp_path / "delta")
    # A router near a tie may send a token elsewhere, so that is all that can be asked of experts.
    share = 0.3 if kind in ("mixtral", "gpt-oss") else 0.1
    assert distance(repository, pair.finetuned) < share * distance(pair.base, pair.finetuned)


@pytest.mark.parametrize("kind", KINDS)
def test_unchanged_tensors_are_the_bases(tmp_path: Path, kind: str) -> None:
    changes = {"gpt-neox": ".layers.1.attention.", "mamba": ".layers.1.mixer."}.get(kind, ".layers.1.self_attn.")
    pair = save_pair(tmp_path, tiny_config(kind), only=lambda name: changes in name)
    repository = make_repository(pair, tmp_path / "delta", ImPartConfig(compression_ratio=8))
    base, tensors = load_tensors(pair.base), decoded(repository)
    changed = {name for name in base if not torch.equal(base[name], load_tensors(pair.finetuned)[name])}
    assert changed and all(changes in name for name in changed)
    assert all(torch.equal(tensors[name], base[name]) for name in base if name not in changed)
    stored = set(load_tensors(repository)) - {"base_checksums", "crc32"}
    assert {name.removesuffix(".delta") for name in stored} == changed, "the rest takes no bytes"
    plain = state(pair.base)
    for name, tensor in state(repository).items():
        assert changes in name or torch.equal(tensor, plain[name])


def test_tied_output_is_tied(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    for kind in ("llama-tied", "gemma2"):
        loaded = load(make_repository(pair_of(kind), tmp_path / kind))
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert "lm_head.weight" not in opened(tmp_path / kind).names()
    loaded = load(make_repository(pair_of("llama"), tmp_path / "llama"))
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


def test_infinity_in_the_configuration(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    """Mamba2's `time_step_limit`, which every command reads."""
    repository = make_repository(pair_of("mamba2"), tmp_path / "delta")
    limit = load(pair_of("mamba2").finetuned).config.time_step_limit
    assert limit[1] == float("inf") and load(repository).config.time_step_limit == limit
    for command in (["inspect"], ["verify"], ["reconstruct", str(tmp_path / "dense")]):
        assert main([command[0], str(repository), *command[1:]]) == 0
    assert load(tmp_path / "dense").config.time_step_limit == limit
    assert equal(state(tmp_path / "dense"), state(repository))


def test_experts(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    """Mixtral's file has a matrix for each expert, which transformers stacks; GPT-OSS's has the stack."""
    mixtral = make_repository(pair_of("mixtral"), tmp_path / "mixtral")
    tensors = decoded(mixtral)
    prefix = "model.layers.1.block_sparse_moe.experts"
    experts = load(mixtral).model.layers[1].mlp.experts
    for number in range(4):
        both = torch.cat([tensors[f"{prefix}.{number}.{w}.weight"] for w in ("w1", "w3")])
        assert torch.equal(experts.gate_up_proj[number], both)
        assert torch.equal(experts.down_proj[number], tensors[f"{prefix}.{number}.w2.weight"])

    gpt_oss = make_repository(pair_of("gpt-oss"), tmp_path / "gpt-oss")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert name + ".delta" in load_tensors(gpt_oss)
    base, finetuned = (
        load_tensors(folder)[name].float() for folder in (pair_of("gpt-oss").base, pair_of("gpt-oss").finetuned)
    )
    assert base.shape == (4, 64, 256)
    stack = decoded(gpt_oss)[name]
    assert torch.equal(load(gpt_oss).model.layers[1].mlp.experts.gate_up_proj, stack)
    for ours, theirs, before in zip(stack.float(), finetuned, base, strict=True):
        assert (ours - theirs).norm() < 0.1 * (theirs - before).norm(), "every expert has its own delta"


# Files --------------------------------------------------------------------------------------------------------------

FILES: dict[str, Callable[[Path], None]] = {
    "bin": to_bin,
    "bin of old": lambda folder: to_bin(folder, zipped=False),
    "sharded bin": lambda folder: to_bin(folder, shards=3),
    "sharded bin of old": lambda folder: to_bin(folder, shards=3, zipped=False),
    "sharded": lambda folder: load(folder).save_pretrained(folder, max_shard_size="100KB"),
}


def other_files(folder: Path, copy: Path, kind: str) -> Path:
    """A copy of a checkpoint with the same tensors in other files."""
    shutil.copytree(folder, copy)
    if kind == "sharded":
        (copy / "model.safetensors").unlink()
        load(folder).save_pretrained(copy, max_shard_size="100KB")
        assert (copy / "model.safetensors.index.json").exists()
    else:
        FILES[kind](copy)
        assert not list(copy.glob("*.safetensors"))
    return copy


@pytest.mark.parametrize("kind", FILES)
def test_weight_files(tiny_pair: Pair, tiny_repository: Path, tmp_path: Path, kind: str) -> None:
    other = Pair(*(other_files(getattr(tiny_pair, n), tmp_path / n, kind) for n in ("base", "finetuned")))
    expected = state(tiny_repository)
    assert equal(state(tiny_repository, base_model=str(other.base)), expected), "read as the base"
    for base, finetuned in ((tiny_pair.base, other.finetuned), (other.base, tiny_pair.finetuned)):
        folder = tmp_path / "delta"
        shutil.rmtree(folder, ignore_errors=True)
        repository = make_repository(Pair(base, finetuned), folder)
        assert distance(repository, tiny_pair.finetuned) < 0.1 * distance(tiny_pair.base, tiny_pair.finetuned)
        assert equal(decoded(repository), state(repository))


def test_sharded_delta_file(tiny_pair: Pair, tiny_repository: Path, tmp_path: Path) -> None:
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / "delta", NEARLY_LOSSLESS, max_shard_size=20_000)
    assert len(list((tmp_path / "delta").glob("delta_model-*.safetensors"))) > 2
    assert equal(state(tmp_path / "delta"), decoded(tmp_path / "delta"))
    load(tmp_path / "delta").save_pretrained(tmp_path / "again")
    assert equal(state(tmp_path / "again"), state(tmp_path / "delta"))
    next((tmp_path / "again").glob("delta_model-00002*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="delta_model-00002"):
        load(tmp_path / "again")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_nothing_in_a_bin_is_executed(tiny_pair: Pair, tiny_repository: Path, tmp_path: Path, zipped: bool) -> None:
    base = shutil.copytree(tiny_pair.base, tmp_path / "base")
    to_bin(base)
    evil = {**load_tensors(tiny_pair.base), "evil": Payload(tmp_path / "executed")}
    torch.save(evil, base / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        load(tiny_repository, base_model=str(base))
    assert not (tmp_path / "executed").exists()


# Dtypes and vocabularies --------------------------------------------------------------------------------------------


def test_base_in_float16_finetune_in_bfloat16(tmp_path: Path) -> None:
    exact = make_model(tiny_config("llama"))  # its bfloat16 values are float16 values as well, but for the smallest
    base = save_model(exact.half(), tmp_path / "base")
    only_attention = fine_tune(load(base).to(torch.bfloat16), only=lambda name: "self_attn" in name)
    pair = Pair(base, save_model(only_attention, tmp_path / "finetuned"))
    repository = make_repository(pair, tmp_path / "delta")
    tensors, finetuned = decoded(repository), load_tensors(pair.finetuned)
    assert {t.dtype for t in load_tensors(base).values()} == {torch.float16}
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert all(torch.equal(tensors[name], finetuned[name]) for name in finetuned if "self_attn" not in name)
    assert equal(state(repository), tensors)
    assert load(repository).dtype == torch.bfloat16 and load(repository).config.dtype == torch.bfloat16
    assert distance(repository, pair.finetuned) < 0.1 * distance(base, pair.finetuned)


def test_base_in_float32_finetune_in_float16(tmp_path: Path) -> None:
    base = save_model(make_model(tiny_config("llama"), dtype=torch.float32), tmp_path / "base")
    pair = Pair(base, save_model(fine_tune(load(base)).half(), tmp_path / "finetuned"))
    repository = make_repository(pair, tmp_path / "delta")
    assert equal(state(repository), decoded(repository))
    assert load(repository).dtype == torch.float16
    assert distance(repository, pair.finetuned) < 0.1 * distance(base, pair.finetuned)


def test_norms_in_float32(tiny_pair: Pair, tmp_path: Path) -> None:
    pair = Pair(tiny_pair.base, shutil.copytree(tiny_pair.finetuned, tmp_path / "finetuned"))
    edit_tensors(pair.finetuned, lambda t: t.update({n: v.float() * 1.001 for n, v in t.items() if is_norm(n)}))
    repository = make_repository(pair, tmp_path / "delta")
    tensors, finetuned = decoded(repository), load_tensors(pair.finetuned)
    assert {n for n, t in tensors.items() if t.dtype == torch.float32} == {n for n in tensors if is_norm(n)}
    assert all(torch.equal(tensors[name], finetuned[name]) for name in tensors if is_norm(name))
    for dtype in ("auto", torch.float32):
        plain = state(pair.finetuned, dtype=dtype)
        for name, tensor in state(repository, dtype=dtype).items():
            assert tensor.dtype == plain[name].dtype
            assert not is_norm(name) or torch.equal(tensor, plain[name])


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_grown_vocabulary(tmp_path: Path, kind: str) -> None:
    base = make_model(tiny_config(kind))
    finetuned = fine_tune(base)
    finetuned.resize_token_embeddings(VOCABULARY + 5)
    pair = Pair(save_model(base, tmp_path / "base"), save_model(finetuned, tmp_path / "finetuned"))
    repository = make_repository(pair, tmp_path / "delta")
    tensors, expected, before = decoded(repository), load_tensors(pair.finetuned), load_tensors(pair.base)
    grown = [name for name in tensors if tensors[name].shape != before[name].shape]
    assert grown == [name for name in expected if name in ("lm_head.weight", "model.embed_tokens.weight")]
    for name in grown:
        assert tensors[name].shape == (VOCABULARY + 5, 64)
        assert torch.equal(tensors[name][VOCABULARY:], expected[name][VOCABULARY:])
        assert (tensors[name] - expected[name]).norm() < 0.1 * (before[name] - expected[name][:VOCABULARY]).norm()
    loaded = load(repository)
    assert loaded.config.vocab_size == VOCABULARY + 5
    assert equal({n: t for n, t in loaded.state_dict().items() if n in tensors}, tensors)
    assert loaded(IDS).logits.shape == (2, 20, VOCABULARY + 5)
    loaded.save_pretrained(tmp_path / "again")
    assert equal(state(tmp_path / "again"), loaded.state_dict())


# Checkpoints of old -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torch_dtype", ["bfloat16", None])
def test_configuration_of_old(tiny_pair: Pair, tmp_path: Path, torch_dtype: str | None) -> None:
    pair = Pair(*(shutil.copytree(getattr(tiny_pair, n), tmp_path / n) for n in ("base", "finetuned")))
    for folder in (pair.base, pair.finetuned):
        edit_json(folder / "config.json", dtype=None, torch_dtype=torch_dtype, transformers_version="4.31.0")
    repository = make_repository(pair, tmp_path / "delta")
    assert load(repository).dtype == load(pair.finetuned).dtype == torch.bfloat16
    assert equal(state(repository), decoded(repository))
    load(repository).merge_and_unload().save_pretrained(tmp_path / "dense")
    assert equal(state(tmp_path / "dense"), state(repository))


def add_buffers(tensors: dict[str, torch.Tensor]) -> None:
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(8)


def store_output(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


@pytest.mark.parametrize("where", ["base", "finetuned", "both"])
@pytest.mark.parametrize(
    ("kind", "edit"), [("llama", add_buffers), ("llama-tied", store_output), ("gemma2", store_output)]
)
def test_tensors_that_no_model_loads(
    pair_of: Callable[[str], Pair], tmp_path: Path, where: str, kind: str, edit: Callable[[Any], None]
) -> None:
    made = pair_of(kind)
    pair = Pair(*(shutil.copytree(getattr(made, n), tmp_path / n) for n in ("base", "finetuned")))
    stated = None if kind == "gemma2" else kind == "llama-tied"  # Gemma leaves it to the class's default
    for name in ("base", "finetuned") if where == "both" else (where,):
        edit_tensors(getattr(pair, name), edit)
        edit_json(getattr(pair, name) / "config.json", tie_word_embeddings=stated)
    repository = make_repository(pair, tmp_path / "delta")
    assert decoded(repository).keys() == load_tensors(made.base).keys()
    loaded, info = load(repository, output_loading_info=True)
    assert not any(info.values())
    assert equal(loaded.state_dict(), state(as_dense(repository, pair.finetuned, tmp_path / "dense")))
    assert distance(repository, made.finetuned) < 0.1 * distance(made.base, made.finetuned)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (kind != "llama")


def test_a_tied_finetune_of_an_untied_base(tmp_path: Path) -> None:
    base = make_model(tiny_config("llama"))
    tied = make_model(tiny_config("llama-tied"))
    tied.load_state_dict({**base.state_dict(), "lm_head.weight": base.model.embed_tokens.weight})
    pair = Pair(save_model(base, tmp_path / "base"), save_model(fine_tune(tied), tmp_path / "finetuned"))
    loaded = load(make_repository(pair, tmp_path / "delta"))
    assert isinstance(loaded, LlamaForCausalLM) and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert distance(tmp_path / "delta", pair.finetuned) < 0.1 * distance(pair.base, pair.finetuned)
