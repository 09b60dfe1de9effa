"""Base and fine-tune in files that name and arrange the same model differently: what loads is the fine-tune."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.disguises import DISGUISES, SAVED, with_prefix
from support.loaded_models import captured_log, decode_all, load, logits
from support.messages import naming
from support.refusals import refuses, run
from support.tiny_models import (
    Pair,
    edit_json,
    edit_tensors,
    fine_tune,
    load_tensors,
    make_model,
    save_model,
    tiny_config,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from impart_hf import DareConfig, ImPartRdConfig, LowRankConfig, compress
from impart_hf.compression.compatibility import IncompatibleModelsError
from impart_hf.methods import MethodConfig
from impart_hf.modeling.checkpoints import HubOptions
from impart_hf.repository.open import open_repository
from impart_hf.repository.reconstruct import reconstruct
from impart_hf.repository.verify import verify

KINDS = ["llama", "llama-tied", "gpt2", "bloom", "gpt-neox", "biogpt", "mixtral", "qwen2-moe", "gemma3-vision"]
FAST = ["llama-tied", "gpt2", "mixtral"]
# So small that every tensor is stored as it is: what loads then equals the fine-tune in every bit.
SMALL = {"vocab_size": 100, "hidden_size": 24, "intermediate_size": 48}
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def small_config(kind: str) -> PreTrainedConfig:
    if kind != "gemma3-vision":
        return tiny_config(kind, **SMALL)
    config = tiny_config(kind, image_token_index=99, boi_token_index=97, eoi_token_index=98).to_dict()
    config["text_config"].update(SMALL, head_dim=16)
    config["vision_config"].update(hidden_size=32, intermediate_size=48)
    return type(tiny_config(kind))(**{name: value for name, value in config.items() if name != "model_type"})


def saved(model: PreTrainedModel, folder: Path, disguise: str) -> Path:
    save_model(model, folder, **SAVED.get(disguise, {}))
    DISGUISES[disguise](folder)
    return folder


def same_state(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def check_exact(pair: Pair, expected: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Compress, verify and load; the model is returned."""
    run(pair, folder, LowRankConfig(compression_ratio=2))
    verify(open_repository(str(folder), HubOptions()))
    loaded, info = load(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert same_state(loaded, expected)
    return loaded


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_the_fine_tune_disguised(tmp_path: Path, kind: str, disguise: str) -> None:
    base = make_model(small_config(kind))
    tuned = fine_tune(base)
    pair = Pair(saved(base, tmp_path / "base", "as saved"), saved(tuned, tmp_path / "tuned", disguise))
    check_exact(pair, tuned, tmp_path / "delta")


@pytest.mark.slow
@pytest.mark.parametrize("other", ["as saved", "without prefix", "as in memory"])
@pytest.mark.parametrize("disguise", [name for name in DISGUISES if name != "as saved"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_disguised(tmp_path: Path, kind: str, disguise: str, other: str) -> None:
    base = make_model(small_config(kind))
    tuned = fine_tune(base)
    pair = Pair(saved(base, tmp_path / "base", disguise), saved(tuned, tmp_path / "tuned", other))
    check_exact(pair, tuned, tmp_path / "delta")


@pytest.mark.parametrize("kind", ["mixtral", "qwen2-moe"])
@pytest.mark.parametrize("fused", ["base", "tuned"])
def test_experts_fused_in_one_of_both(tmp_path: Path, kind: str, fused: str) -> None:
    """The delta is of the base's own form: a record for each expert's matrix, or for the stack."""
    base = make_model(tiny_config(kind))
    tuned = fine_tune(base)
    folders = {name: tmp_path / name for name in ("base", "tuned")}
    for name, model in (("base", base), ("tuned", tuned)):
        saved(model, folders[name], "as in memory" if name == fused else "as saved")
    run(Pair(folders["base"], folders["tuned"]), tmp_path / "delta", LowRankConfig(compression_ratio=3))
    stored = load_tensors(folders["base"])
    assert decode_all(tmp_path / "delta").keys() == stored.keys()
    experts = {name.removesuffix(".delta") for name in load_tensors(tmp_path / "delta") if "experts." in name}
    assert experts == {name for name in stored if "experts." in name}
    for name, tensor in load(tmp_path / "delta").state_dict().items():
        before, after = base.state_dict()[name].float(), tuned.state_dict()[name].float()
        assert (tensor - after).norm() <= 0.1 * (before - after).norm(), name


def test_a_pair_in_one_layout_has_no_extra_fields(tiny_repository: Path) -> None:
    fields = {"absent_tensors", "row_counts", "base_tensors"}
    assert not fields & json.loads((tiny_repository / "config.json").read_text()).keys()


# Tensors that no model reads ----------------------------------------------------------------------------------------


def test_tensors_that_no_model_reads(tmp_path: Path) -> None:
    """Those that both have stay in the pair; the rest is left out, and those of the fine-tune are named."""
    base = make_model(small_config("llama"))
    tuned = fine_tune(base)
    pair = Pair(save_model(base, tmp_path / "base"), save_model(tuned, tmp_path / "tuned"))
    both, other = torch.ones(4), torch.ones(1, 1, 8, 8)
    edit_tensors(pair.base, lambda t: t.update(both=both, changed=other, base_alone=other + 1))
    edit_tensors(pair.finetuned, lambda t: t.update(both=both + 1, changed=other[0], tuned_alone=other + 1))
    with captured_log() as lines:
        check_exact(pair, tuned, tmp_path / "delta")
    assert any("tuned_alone" in line or "changed" in line for line in lines if "no model reads" in line)
    config = json.loads((tmp_path / "delta" / "config.json").read_text())
    assert config["absent_tensors"] == ["base_alone", "changed"]
    decoded = decode_all(tmp_path / "delta")
    assert torch.equal(decoded["both"], both + 1)
    assert decoded.keys() == load_tensors(tmp_path / "delta").keys() - {"base_checksums", "crc32"}


def test_a_base_that_was_saved_again(tmp_path: Path) -> None:
    """Without the buffers that the delta does not rest on, it is the same base."""
    base = make_model(small_config("gpt2"))
    tuned = fine_tune(base)
    pair = Pair(saved(base, tmp_path / "base", "buffers"), save_model(tuned, tmp_path / "tuned"))
    check_exact(pair, tuned, tmp_path / "delta")
    again = save_model(base, tmp_path / "again")
    assert same_state(load(tmp_path / "delta", base_model=str(again)), tuned)


def test_a_second_tied_matrix(tmp_path: Path) -> None:
    """BioGPT's output projection, which is stored again in the base, in the fine-tune or in both."""
    base = make_model(small_config("biogpt"))
    tuned = fine_tune(base)
    add = lambda t: t.update({"output_projection.weight": t["biogpt.embed_tokens.weight"].clone()})  # noqa: E731
    for where in (("base",), ("tuned",), ("base", "tuned")):
        root = tmp_path / "-".join(where)
        pair = Pair(save_model(base, root / "base"), save_model(tuned, root / "tuned"))
        for name in where:
            edit_tensors(root / name, add)
        loaded = check_exact(pair, tuned, root / "delta")
        assert loaded.output_projection.weight is loaded.biogpt.embed_tokens.weight


# The output projection ----------------------------------------------------------------------------------------------


def with_own_head(base: PreTrainedModel) -> PreTrainedModel:
    tuned = fine_tune(base)
    head = fine_tune(base, seed=5).lm_head.weight.detach().clone()
    tuned.lm_head.weight = torch.nn.Parameter(head)
    return tuned


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("base_stores_it", [False, True])
def test_an_own_head_on_a_base_that_ties(tmp_path: Path, stated: bool, base_stores_it: bool) -> None:
    """transformers loads a stored head of other values untied, whatever config.json says: so do we."""
    base = make_model(small_config("llama-tied"))
    tuned = with_own_head(base)
    pair = Pair(save_model(base, tmp_path / "base"), save_model(tuned, tmp_path / "tuned"))
    edit_tensors(pair.finetuned, lambda t: t.update({HEAD: tuned.lm_head.weight.detach()}))
    edit_json(pair.finetuned / "config.json", tie_word_embeddings=stated)
    if base_stores_it:
        edit_tensors(pair.base, lambda t: t.update({HEAD: t[EMBEDDINGS].clone()}))
    assert same_state(load(pair.finetuned), tuned)
    loaded = check_exact(pair, tuned, tmp_path / "delta")
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    config = json.loads((tmp_path / "delta" / "config.json").read_text())
    assert config["text_config"]["tie_word_embeddings"] is False
    assert config.get("base_tensors") == (None if base_stores_it else {HEAD: EMBEDDINGS})
    reconstruct(open_repository(str(tmp_path / "delta"), HubOptions()), tmp_path / "dense")
    assert same_state(load(tmp_path / "dense"), tuned)


def test_an_own_head_is_a_delta_of_the_embeddings(tmp_path: Path) -> None:
    base = make_model(tiny_config("llama-tied"))
    tuned = with_own_head(base)
    pair = Pair(save_model(base, tmp_path / "base"), save_model(tuned, tmp_path / "tuned"))
    edit_tensors(pair.finetuned, lambda t: t.update({HEAD: tuned.lm_head.weight.detach()}))
    run(pair, tmp_path / "delta", LowRankConfig(compression_ratio=3))
    assert f"{HEAD}.delta" in load_tensors(tmp_path / "delta")
    found = decode_all(tmp_path / "delta")[HEAD].float()
    head, before = tuned.lm_head.weight.float(), base.lm_head.weight.float()
    assert (found - head).norm() < 0.1 * (before - head).norm()


@pytest.mark.parametrize("side", ["base", "tuned", "both"])
def test_a_file_may_hold_either_of_two_tied_matrices(tmp_path: Path, side: str) -> None:
    base = make_model(small_config("llama-tied"))
    tuned = fine_tune(base)
    pair = Pair(save_model(base, tmp_path / "base"), save_model(tuned, tmp_path / "tuned"))
    for folder in (pair.base, pair.finetuned):
        if side in (folder.name, "both"):
            edit_tensors(folder, lambda t: t.update({HEAD: t.pop(EMBEDDINGS)}))
            assert same_state(load(folder), base if folder == pair.base else tuned)
    check_exact(pair, tuned, tmp_path / "delta")


def test_arguments_that_tie_and_untie(tmp_path: Path) -> None:
    """As for a dense checkpoint: matrices that differ stay untied, and a head that no file has is missing."""
    for kind in ("llama", "llama-tied"):
        base = make_model(small_config(kind))
        tuned = fine_tune(base)
        pair = Pair(save_model(base, tmp_path / kind / "base"), save_model(tuned, tmp_path / kind / "tuned"))
        check_exact(pair, tuned, tmp_path / kind / "delta")
    loaded = load(tmp_path / "llama" / "delta", tie_word_embeddings=True)
    assert same_state(loaded, load(tmp_path / "llama" / "tuned", tie_word_embeddings=True))
    with pytest.raises(ValueError, match=naming(HEAD)) as caught:
        load(tmp_path / "llama-tied" / "delta", tie_word_embeddings=False)
    assert "is not the base" not in str(caught.value)


# A vocabulary that was cut -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt-neox", "phi", "gemma3-vision"])
@pytest.mark.parametrize("size", [320, 300])
def test_fewer_rows_than_the_base(tmp_path: Path, kind: str, size: int) -> None:
    base = make_model(tiny_config(kind) if kind != "gemma3-vision" else tiny_config(kind, eoi_token_index=318))
    base.resize_token_embeddings(352)
    tuned = fine_tune(base)
    tuned.resize_token_embeddings(size)
    pair = Pair(save_model(base, tmp_path / "base"), save_model(tuned, tmp_path / "tuned"))
    run(pair, tmp_path / "delta", LowRankConfig(compression_ratio=3))
    verify(open_repository(str(tmp_path / "delta"), HubOptions()))
    stored, tuned_stored = load_tensors(pair.base), load_tensors(pair.finetuned)
    cut = {n: size for n in stored if stored[n].shape != tuned_stored[n].shape}
    assert cut and json.loads((tmp_path / "delta" / "config.json").read_text())["row_counts"] == cut
    loaded = load(tmp_path / "delta")
    assert loaded.config.get_text_config().vocab_size == size
    assert all(decode_all(tmp_path / "delta")[name].shape == tuned_stored[name].shape for name in cut)
    apart = [(logits(model)[..., :size] - logits(tuned)).norm() for model in (loaded, base)]
    assert apart[0] < 0.1 * apart[1]
    loaded.save_pretrained(tmp_path / "again")
    assert same_state(load(tmp_path / "again"), loaded)


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("kind", ["phi", "llama-tied"])
def test_more_rows_than_the_base(tmp_path: Path, kind: str, own_head: bool) -> None:
    """Also of a bias, and of a head that rests on the embeddings."""
    base = make_model(tiny_config(kind))
    tuned = fine_tune(base)
    tuned.resize_token_embeddings(330)
    pair = Pair(save_model(base, tmp_path / "base"), save_model(tuned, tmp_path / "tuned"))
    if own_head:
        edit_tensors(pair.finetuned, lambda t: t.update({HEAD: 1.5 * t[EMBEDDINGS]}))
    run(pair, tmp_path / "delta", LowRankConfig(compression_ratio=3))
    verify(open_repository(str(tmp_path / "delta"), HubOptions()))
    expected = load(pair.finetuned).state_dict()
    for name, tensor in load(tmp_path / "delta").state_dict().items():
        assert tensor.shape == expected[name].shape
        if len(tensor) == 330:
            assert torch.equal(tensor[320:], expected[name][320:])


def test_fewer_rows_of_a_wrong_base(tmp_path: Path) -> None:
    """The rows that were cut off are a part of the base: its checksum is of all rows."""
    base = make_model(small_config("llama"))
    tuned = fine_tune(base)
    tuned.resize_token_embeddings(90)
    pair = Pair(save_model(base, tmp_path / "base"), save_model(tuned, tmp_path / "tuned"))
    check_exact(pair, tuned, tmp_path / "delta")
    other = shutil.copytree(pair.base, tmp_path / "other")
    edit_tensors(other, lambda t: t[EMBEDDINGS][95:].fill_(1.0))
    with pytest.raises(ValueError, match=naming(EMBEDDINGS, other)):
        load(tmp_path / "delta", base_model=str(other))


# NaN in what is equal -----------------------------------------------------------------------------------------------


def spoil_both(pair: Pair, name: str, rows: slice) -> None:
    for folder in (pair.base, pair.finetuned):
        edit_tensors(folder, lambda t: t[name][rows].fill_(float("nan")))


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("method", [LowRankConfig(3), ImPartRdConfig(4), DareConfig(3)], ids=lambda m: m.name)
def test_padding_rows_that_hold_nan_in_both(tmp_path: Path, method: MethodConfig, small: bool) -> None:
    base = make_model(small_config("llama") if small else tiny_config("llama"))
    tuned = fine_tune(base)
    pair = Pair(save_model(base, tmp_path / "base"), save_model(tuned, tmp_path / "tuned"))
    for name in (EMBEDDINGS, HEAD):
        spoil_both(pair, name, slice(-3, None))
    run(pair, tmp_path / "delta", method)
    repository = open_repository(str(tmp_path / "delta"), HubOptions())
    verify(repository)
    for name in (EMBEDDINGS, HEAD):
        found, expected, before = (
            t[name].float()
            for t in (decode_all(tmp_path / "delta"), load_tensors(pair.finetuned), load_tensors(pair.base))
        )
        assert found[-3:].isnan().all() and not found[:-3].isnan().any()
        assert (found - expected)[:-3].norm() < (before - expected)[:-3].norm()
    assert load(tmp_path / "delta").lm_head.weight[-3:].isnan().all()
    reconstruct(repository, tmp_path / "dense")
    assert load_tensors(tmp_path / "dense")[HEAD][-3:].isnan().all()


def test_an_equal_tensor_that_holds_nan(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    base = make_model(tiny_config("llama"))
    tuned = fine_tune(base, only=lambda n: n != name)
    pair = Pair(save_model(base, tmp_path / "base"), save_model(tuned, tmp_path / "tuned"))
    spoil_both(pair, name, slice(5, 6))
    run(pair, tmp_path / "delta")
    verify(open_repository(str(tmp_path / "delta"), HubOptions()))
    assert load(tmp_path / "delta").state_dict()[name].isnan().any(dim=1).nonzero().tolist() == [[5]]


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("rows", [slice(-3, None), slice(7, 8)])
def test_nan_in_one_of_both(tmp_path: Path, side: str, rows: slice) -> None:
    base = make_model(tiny_config("llama"))
    pair = Pair(save_model(base, tmp_path / "base"), save_model(fine_tune(base), tmp_path / "tuned"))
    edit_tensors(tmp_path / side, lambda t: t[HEAD][rows].fill_(float("nan")))
    refuses(pair, IncompatibleModelsError, naming(HEAD, tmp_path / side, "NaN"))


def test_nan_in_equal_rows_of_a_layer(tmp_path: Path) -> None:
    """No padding, so the weights are damaged."""
    name = "model.layers.0.mlp.up_proj.weight"
    base = make_model(tiny_config("llama"))
    pair = Pair(save_model(base, tmp_path / "base"), save_model(fine_tune(base), tmp_path / "tuned"))
    spoil_both(pair, name, slice(5, 6))
    refuses(pair, IncompatibleModelsError, naming(name, pair.base, "NaN"))


# What is no pair ------------------------------------------------------------------------------------------------------


def test_no_language_model_head(tmp_path: Path) -> None:
    """Refused before any work, whether the base has a head or not."""
    base = make_model(small_config("llama"))
    pair = Pair(save_model(base, tmp_path / "base"), save_model(fine_tune(base), tmp_path / "tuned"))
    for folder in (pair.finetuned, pair.base):
        edit_tensors(folder, lambda t: t.pop(HEAD) is None)
        edit_json(folder / "config.json", architectures=["LlamaModel"])
        refuses(pair, IncompatibleModelsError, naming(HEAD, pair.finetuned))
    refuses(pair, IncompatibleModelsError, naming(HEAD, "LlamaForCausalLM", "LlamaModel"))


def test_a_configuration_that_describes_another_model(tmp_path: Path) -> None:
    base = make_model(small_config("llama"))
    pair = Pair(save_model(base, tmp_path / "base"), save_model(fine_tune(base), tmp_path / "tuned"))
    edit_json(pair.finetuned / "config.json", intermediate_size=44)
    refuses(pair, IncompatibleModelsError, naming(pair.finetuned, "config.json", "model.layers.0.mlp.down_proj.weight"))


def test_an_unknown_prefix_is_named(tmp_path: Path) -> None:
    base = make_model(small_config("llama"))
    pair = Pair(save_model(base, tmp_path / "base"), save_model(fine_tune(base), tmp_path / "tuned"))
    with_prefix("student.")(pair.finetuned)
    message = refuses(pair, IncompatibleModelsError, naming(pair.finetuned, pair.base))
    assert "student." in message


def test_nested_wrappers(tmp_path: Path) -> None:
    """Distributed and compiled, layer by layer."""
    base = make_model(small_config("llama"))
    tuned = fine_tune(base)
    pair = Pair(save_model(base, tmp_path / "base"), save_model(tuned, tmp_path / "tuned"))

    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            inner = name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn.")
            tensors[f"module._orig_mod.{inner}"] = tensors.pop(name)

    edit_tensors(pair.finetuned, wrap)
    check_exact(pair, tuned, tmp_path / "delta")


def test_of_the_same_class_as_the_fine_tune(tmp_path: Path) -> None:
    base = make_model(small_config("llama"))
    pair = Pair(saved(base, tmp_path / "base", "compiled"), saved(fine_tune(base), tmp_path / "tuned", "PEFT"))
    compress(str(pair.base), str(pair.finetuned), tmp_path / "delta", LowRankConfig(compression_ratio=2))
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "delta"), LlamaForCausalLM)
