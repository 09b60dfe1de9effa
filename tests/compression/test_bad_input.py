"""Bad input to `compress`: one clear error before any work, and nothing left behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.messages import naming
from support.refusals import METHOD, refuses, run
from support.tiny_models import Pair, edit_json, edit_tensors, load_tensors, save_pair, tiny_config
from transformers import AutoModelForCausalLM

from impart_hf import DareConfig, ImPartConfig, LowRankConfig, compress
from impart_hf.compression.compatibility import IncompatibleModelsError
from impart_hf.methods import MethodConfig
from impart_hf.modeling.model_files import CheckpointError, HubOptions

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


# --- the two models


def test_another_architecture(pair: Pair) -> None:
    edit_json(pair.base / "config.json", model_type="mistral")
    refuses(pair, IncompatibleModelsError, naming("'mistral'", "'llama'"))


def test_an_architecture_that_transformers_does_not_know(pair: Pair) -> None:
    for folder in (pair.base, pair.finetuned):
        edit_json(folder / "config.json", model_type="bert-of-tomorrow")
    refuses(pair, IncompatibleModelsError, naming("bert-of-tomorrow"))


def test_other_shapes(pair: Pair) -> None:
    edit_tensors(pair.finetuned, lambda t: t.update({UP: torch.zeros(64, 64, dtype=torch.bfloat16)}))
    refuses(pair, IncompatibleModelsError, naming(UP, "[64, 64]", pair.finetuned, "[128, 64]", pair.base))


def test_fewer_rows_than_the_vocabulary_has(pair: Pair) -> None:
    """A vocabulary may be cut; a tensor that lost rows otherwise is damaged."""
    edit_tensors(pair.finetuned, lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-8].clone()}))
    refuses(pair, IncompatibleModelsError, naming("lm_head.weight", "[312, 64]", "[320, 64]", "vocabulary"))


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_a_tensor_too_few_or_too_many(pair: Pair, side: str) -> None:
    edit_tensors(getattr(pair, side), lambda t: t.pop(NORM))
    counts = ("0 tensors", "1 extra") if side == "base" else ("1 tensors", "0 extra")
    refuses(pair, IncompatibleModelsError, naming(NORM, counts, pair.base, pair.finetuned))


@pytest.mark.parametrize("side", ["base", "finetuned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [UP, NORM])
def test_numbers_that_are_not_finite(pair: Pair, side: str, value: float, name: str) -> None:
    edit_tensors(getattr(pair, side), lambda t: t[name].view(-1)[5:6].fill_(value))
    message = refuses(pair, IncompatibleModelsError, "NaN")
    assert name in message and str(getattr(pair, side)) in message


def test_numbers_whose_squares_overflow(pair: Pair) -> None:
    edit_tensors(pair.finetuned, lambda t: t[UP].view(-1)[0:1].fill_(1e30))
    refuses(pair, IncompatibleModelsError, naming(UP, pair.finetuned, "1e+15"))


@pytest.mark.parametrize("method", [ImPartConfig(4), DareConfig(4), METHOD], ids=lambda m: m.name)
def test_a_delta_too_small_for_a_norm_is_none(pair: Pair, method: MethodConfig) -> None:
    for folder, value in ((pair.base, 0.0), (pair.finetuned, 1e-30)):
        edit_tensors(folder, lambda t, value=value: t[UP].fill_(value))
    report = run(pair, method=method)
    assert next(t for t in report.tensors if t.name == UP).rank == 0


def test_integers_against_floats(pair: Pair) -> None:
    edit_tensors(pair.finetuned, lambda t: t.update({NORM: torch.ones(64, dtype=torch.int32)}))
    refuses(pair, IncompatibleModelsError, naming(NORM, "torch.int32", pair.finetuned, "torch.bfloat16", pair.base))


def test_a_dtype_that_has_no_delta(pair: Pair) -> None:
    for folder in (pair.base, pair.finetuned):
        edit_tensors(folder, lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}))
    refuses(pair, CheckpointError, naming(UP, "F8_E4M3"))


@pytest.mark.parametrize("name", ["crc32", "base_checksums", f"{UP}.delta", f"{UP}.added_rows"])
def test_names_that_the_format_uses_itself(pair: Pair, name: str) -> None:
    for folder in (pair.base, pair.finetuned):
        edit_tensors(folder, lambda t: t.update({name: torch.zeros(4)}))
    refuses(pair, IncompatibleModelsError, naming(name, pair.finetuned))


def test_a_checkpoint_without_float_tensors(pair: Pair) -> None:
    for folder in (pair.base, pair.finetuned):
        save_file({"position_ids": torch.arange(8)}, folder / "model.safetensors")
    refuses(pair, IncompatibleModelsError, naming(pair.finetuned, "weights"))


def test_an_output_projection_that_is_tied_only_in_name(pair: Pair, tmp_path: Path) -> None:
    # transformers loads such a checkpoint untied, so to pass over the stored matrix would lose it.
    for folder in (pair.base, pair.finetuned):
        edit_json(folder / "config.json", tie_word_embeddings=True)
    run(pair, tmp_path / "delta")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    expected = load_tensors(pair.finetuned)["lm_head.weight"].float()
    assert (model.lm_head.weight.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("stored", [False, True])
def test_an_untied_base_of_a_tied_fine_tune(pair: Pair, tmp_path: Path, stored: bool) -> None:
    def tie(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop("lm_head.weight")
        if stored:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(pair.finetuned, tie)
    edit_json(pair.finetuned / "config.json", tie_word_embeddings=True)
    run(pair, tmp_path / "delta")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = load_tensors(pair.finetuned)["model.embed_tokens.weight"].float()
    assert (model.lm_head.weight.float() - expected).norm() < 0.05 * expected.norm()


def test_tied_by_the_architecture_without_a_word_in_the_config(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, tiny_config("gemma2"))
    for folder in (pair.base, pair.finetuned):
        edit_json(folder / "config.json", tie_word_embeddings=None)
        edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    run(pair, tmp_path / "delta")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- input that looks odd and is right


def test_a_fine_tune_that_is_its_base(pair: Pair, tmp_path: Path) -> None:
    report = compress(str(pair.base), str(pair.base), tmp_path / "delta", METHOD)
    assert report.tensors == [] and report.equal_tensors == len(load_tensors(pair.base))
    assert (tmp_path / "delta" / "delta_model.safetensors").stat().st_size < 2000
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    for name, tensor in load_tensors(pair.base).items():
        assert torch.equal(model.state_dict()[name], tensor)


def changed_extra(pair: Pair, tmp_path: Path, extra: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """Extra tensors (base's, fine-tune's) through compression and back."""
    for side, folder in enumerate((pair.base, pair.finetuned)):
        edit_tensors(folder, lambda t, side=side: t.update({name: two[side] for name, two in extra.items()}))
    run(pair, tmp_path / "delta")
    from impart_hf.repository.open import open_repository

    repository = open_repository(str(tmp_path / "delta"), HubOptions())
    return {name: repository.tensor(name) for name in extra}


def test_integer_and_empty_tensors(pair: Pair, tmp_path: Path) -> None:
    extra = {
        "changed": (torch.arange(8), torch.arange(8) + 1),
        "unchanged": (torch.arange(8), torch.arange(8)),
        "widened": (torch.arange(8, dtype=torch.int32), torch.arange(8)),
        "flags": (torch.tensor([True, False]), torch.tensor([True, True])),
        "many": (torch.zeros(80, 80, dtype=torch.int8), torch.ones(80, 80, dtype=torch.int8)),
        "empty": (torch.zeros(0), torch.zeros(0)),
        "empty_matrix": (torch.zeros(0, 7, dtype=torch.bfloat16), torch.zeros(0, 7, dtype=torch.bfloat16)),
        "empty_columns": (torch.zeros(7, 0), torch.zeros(7, 0)),
        "number": (torch.tensor(3), torch.tensor(3)),
    }
    for name, tensor in changed_extra(pair, tmp_path, extra).items():
        assert tensor.dtype == extra[name][1].dtype and torch.equal(tensor, extra[name][1]), name


def test_tensors_without_dimensions(pair: Pair, tmp_path: Path) -> None:
    extra = {"scale": (torch.tensor(2.5), torch.tensor(3.5)), "count": (torch.tensor(2), torch.tensor(3))}
    assert changed_extra(pair, tmp_path, extra) == {"scale": torch.tensor(3.5), "count": torch.tensor(3)}


def test_odd_and_long_tensor_names(pair: Pair, tmp_path: Path) -> None:
    names = ["../up", "/root", "a b\tc\n", 'quote"\\', "größe.日本.🙂", "x" * 300, "CON", ".", "weight.delta", ""]
    extra = {n: (torch.zeros(64, 64), torch.full((64, 64), float(i + 1))) for i, n in enumerate(names)}
    for name, tensor in changed_extra(pair, tmp_path, extra).items():
        assert torch.allclose(tensor, extra[name][1], rtol=1e-2), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "delta", "finetuned"]


# --- settings


@pytest.mark.parametrize("ratio", [1, 1.0, 0, -3, float("nan"), float("inf"), True, "32", None, [2]])
@pytest.mark.parametrize("config", [ImPartConfig, DareConfig, LowRankConfig])
def test_ratios_that_are_none(config: type[MethodConfig], ratio: Any) -> None:
    with pytest.raises(ValueError, match=naming("compression_ratio")):
        config(compression_ratio=ratio)


@pytest.mark.parametrize(
    "field, value",
    [("beta", v) for v in (1, 1.5, -0.1, float("nan"))]
    + [("c", v) for v in (0, -1, float("nan"), float("inf"))]
    + [("seed", v) for v in (-1, 1 << 32, 1.5, "0", True, None)]
    + [("value_dtype", v) for v in ("float32", "int8", "", None, torch.float16)]
    + [("embeddings", v) for v in ("none", None, True)],
)
def test_settings_that_are_none(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=naming(field)):
        ImPartConfig(**{field: value})


def test_a_method_that_is_only_its_name(pair: Pair) -> None:
    refuses(pair, TypeError, naming("method", "'impart'"), method="impart")


@pytest.mark.parametrize("size", ["5XB", "", "GB", 0, -1, "0MB", None, True])
def test_shard_sizes_that_are_none(pair: Pair, size: Any) -> None:
    refuses(pair, ValueError, naming("max_shard_size", repr(size)), max_shard_size=size)


@pytest.mark.parametrize("device", ["quantum", "", "cuda:99", "meta"])
def test_devices_that_are_none(pair: Pair, device: str) -> None:
    refuses(pair, ValueError, naming("device", f"'{device}'"), device=device)


@pytest.mark.parametrize("method", [ImPartConfig(400), DareConfig(400), LowRankConfig(400)], ids=lambda m: m.name)
def test_a_ratio_out_of_reach_names_one_within(pair: Pair, tmp_path: Path, method: MethodConfig) -> None:
    match = naming("ratio", 400, method.name) + r".*\S+\.weight \(\d+x\d+\)"
    message = refuses(pair, ValueError, match, method=method)
    found = re.search(r"ratio of ([\d.]+)\D* (\d+) bytes\D*$", message)
    assert found is not None
    reachable = float(found[1])
    assert 1 < reachable < 400
    run(pair, tmp_path / "delta", type(method)(compression_ratio=reachable))
    run(pair, tmp_path / "delta", max_bytes=int(found[2]))
    # It is no idle modesty: at twice that, too much is fixed
    assert run(pair, tmp_path / "delta", type(method)(compression_ratio=2 * reachable)).shortfall


def test_weights_that_were_not_gathered(pair: Pair) -> None:
    """DeepSpeed ZeRO-3 leaves empty tensors."""
    edit_tensors(pair.finetuned, lambda tensors: tensors.update({UP: torch.empty(0, dtype=torch.bfloat16)}))
    refuses(pair, IncompatibleModelsError, naming(UP, pair.finetuned, "empty", "ZeRO-3"))
