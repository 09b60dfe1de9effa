"""Whether a model's weights have changed since it was loaded is known exactly, however they are changed or moved."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.loaded_models import IDS, load, logits
from support.tiny_models import fine_tune, make_model, same_files, save_model, save_pair, tiny_config
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from impart_hf import LowRankConfig, compress

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedModel]:
    """Of delta repositories; a test leaves them as they are."""
    loaded = {}
    for kind in ("llama", "llama-tied", "mixtral"):
        folder = tmp_path_factory.mktemp(kind)
        pair = save_pair(folder, tiny_config(kind))
        compress(str(pair.base), str(pair.finetuned), folder / "delta", LowRankConfig(compression_ratio=3))
        loaded[kind] = load(folder / "delta")
    return loaded


# One entry ----------------------------------------------------------------------------------------------------------


def through_data(parameter: nn.Parameter, index: int, value: torch.Tensor) -> None:
    parameter.data.view(-1)[index] = value


def in_place(parameter: nn.Parameter, index: int, value: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.view(-1)[index] = value


def through_a_copy(parameter: nn.Parameter, index: int, value: torch.Tensor) -> None:
    changed = parameter.detach().clone()
    changed.view(-1)[index] = value
    parameter.data.copy_(changed)


def another_tensor(parameter: nn.Parameter, index: int, value: torch.Tensor) -> None:
    changed = parameter.detach().clone()
    changed.view(-1)[index] = value
    parameter.data = changed


def through_numpy(parameter: nn.Parameter, index: int, value: torch.Tensor) -> None:
    parameter.detach().view(torch.int16).numpy().reshape(-1)[index] = value.view(torch.int16).item()


WAYS = [through_data, in_place, through_a_copy, another_tensor, through_numpy]


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bit_of_any_entry_by_any_way(models: dict[str, PreTrainedModel], data: st.DataObject) -> None:
    model = models[data.draw(st.sampled_from(sorted(models)))]
    parameters = dict(model.named_parameters())
    parameter = parameters[data.draw(st.sampled_from(sorted(parameters)))]
    index = data.draw(st.integers(0, parameter.numel() - 1))
    bit = data.draw(st.integers(0, 15))
    change = data.draw(st.sampled_from(WAYS))
    before = parameter.detach().view(-1)[index].clone()
    after = (before.view(torch.int16) ^ (1 << bit if bit < 15 else -(1 << 15))).view(torch.bfloat16)
    change(parameter, index, after)
    assert model.weights_changed()
    change(parameter, index, before)
    assert not model.weights_changed(), "the same values are the same weights"


# Rows, modules, all -------------------------------------------------------------------------------------------------


def a_row(model: PreTrainedModel) -> None:
    model.get_input_embeddings().weight.data[7] = 0


def two_rows_swapped(model: PreTrainedModel) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data[[3, 4]] = weight.data[[4, 3]]


def other_embeddings(model: PreTrainedModel) -> None:
    old = model.get_input_embeddings().weight
    new = nn.Embedding(*old.shape, dtype=old.dtype)
    new.weight.data.copy_(old.data)
    new.weight.data[0, 0] += 1
    model.set_input_embeddings(new)


def one_state(model: PreTrainedModel) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.norm.weight"][5] += 0.25
    model.load_state_dict(state, assign=True)


def trained_tokens(model: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    config = peft.TrainableTokensConfig(token_indices=[5], init_weights=False)
    peft.get_peft_model(model, config).merge_and_unload()


def a_cast_after_a_change(model: PreTrainedModel) -> None:
    a_row(model)
    model.half().to(torch.bfloat16)


def a_change_after_a_cast(model: PreTrainedModel) -> None:
    model.half()
    a_row(model)


def signs_of_many(model: PreTrainedModel) -> None:
    """What cancels in the sums of the checksum of bases: an even number of signs in each row and column of words."""
    with torch.no_grad():
        model.get_input_embeddings().weight[:256, 3::4].neg_()


def random_values(model: PreTrainedModel) -> None:
    model.to("meta").to_empty(device="cpu")


def values_that_a_cast_made_up(model: PreTrainedModel) -> None:
    model._apply(lambda tensor: torch.zeros_like(tensor, dtype=torch.float16))


@pytest.mark.parametrize(
    "change",
    [
        a_row, two_rows_swapped, other_embeddings, one_state, trained_tokens, a_cast_after_a_change,
        a_change_after_a_cast, signs_of_many, random_values, values_that_a_cast_made_up,
    ],
)  # fmt: skip
def test_changes(model: PreTrainedModel, change: Callable[[PreTrainedModel], Any]) -> None:
    change(model)
    assert model.weights_changed()
    assert pickle.loads(pickle.dumps(model)).weights_changed()


def test_a_tied_output_that_gets_values_of_its_own(models: dict[str, PreTrainedModel]) -> None:
    model = copy.deepcopy(models["llama-tied"])
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert not model.weights_changed()
    model.lm_head.weight.data[0, 0] += 1
    assert model.weights_changed()


# What is no change --------------------------------------------------------------------------------------------------


def of_modules(model: PreTrainedModel) -> None:
    model.model.layers[0].float()
    model.lm_head.weight.data = model.lm_head.weight.data.float()


def inside_a_module(model: PreTrainedModel) -> None:
    nn.ModuleDict({"model": model}).half().to(torch.bfloat16)


def under_an_adapter(model: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).half().unload()


def compiled(model: PreTrainedModel) -> None:
    torch.compile(model, backend="eager")(input_ids=IDS)
    model.compile(backend="eager")
    model.half()


def offloaded_to_cpu(model: PreTrainedModel) -> None:
    pytest.importorskip("accelerate").cpu_offload(model)
    logits(model)


@pytest.mark.parametrize("move", [of_modules, inside_a_module, under_an_adapter, compiled, offloaded_to_cpu])
def test_moves(
    model: PreTrainedModel, tiny_repository: Path, tmp_path: Path, move: Callable[[PreTrainedModel], Any]
) -> None:
    move(model)
    assert not model.weights_changed()
    model.save_pretrained(tmp_path / "again")
    assert same_files(tiny_repository, tmp_path / "again")


def test_casts_that_round(tmp_path: Path) -> None:
    """Numbers too small for float16, and too precise for bfloat16: casting is not undone by casting back."""
    base = make_model(tiny_config("llama"), dtype=torch.float32)
    finetuned = fine_tune(base)
    finetuned.model.norm.weight.data.mul_(2.0**-24)
    save_model(base, tmp_path / "base")
    save_model(finetuned, tmp_path / "finetuned")
    compress(
        str(tmp_path / "base"), str(tmp_path / "finetuned"), tmp_path / "delta", LowRankConfig(compression_ratio=3)
    )
    model = load(tmp_path / "delta")
    before = model.model.norm.weight.detach().clone()
    for dtype in (torch.float16, torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32):
        model.to(dtype)
        assert not model.weights_changed(), dtype
    assert not torch.equal(model.model.norm.weight, before)
    model.model.norm.weight.data.copy_(before)
    assert not model.weights_changed(), "what was loaded stays known"


def test_offloaded_to_disk(tiny_repository: Path, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    at_load = load(tiny_repository, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=str(tmp_path / "a"))
    later = load(tiny_repository)
    accelerate.disk_offload(later, str(tmp_path / "b"))
    for model, folder in ((at_load, tmp_path / "a"), (later, tmp_path / "b")):
        logits(model)
        assert not model.weights_changed(), folder
    moved = load(tiny_repository)
    a_row(moved)
    accelerate.disk_offload(moved, str(tmp_path / "c"))
    assert moved.weights_changed()


# Quantised ----------------------------------------------------------------------------------------------------------

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
QUANTISED = {
    "4 bits": FOUR_BITS,
    "4 bits, nested": {**FOUR_BITS, "bnb_4bit_use_double_quant": True},
    "8 bits": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def wide_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for the order in which bitsandbytes keeps 4-bit weights on some CPUs."""
    folder = tmp_path_factory.mktemp("wide")
    base = make_model(tiny_config("llama", hidden_size=128, intermediate_size=256))
    save_model(base, folder / "base")
    save_model(fine_tune(base), folder / "finetuned")
    compress(str(folder / "base"), str(folder / "finetuned"), folder / "delta", LowRankConfig(compression_ratio=3))
    return folder / "delta"


@pytest.fixture(params=list(QUANTISED))
def quantised(wide_repository: Path, request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    pytest.importorskip("bitsandbytes")
    yield load(wide_repository, quantization_config=BitsAndBytesConfig(**QUANTISED[request.param]))


def test_a_quantised_model_that_ran_is_unchanged(
    quantised: PreTrainedModel, wide_repository: Path, tmp_path: Path
) -> None:
    before = logits(quantised)
    assert not quantised.weights_changed()
    assert torch.equal(logits(quantised), before), "asking changes nothing"
    for twin in (copy.deepcopy(quantised), pickle.loads(pickle.dumps(quantised))):
        assert not twin.weights_changed()
    quantised.save_pretrained(tmp_path / "again")
    assert same_files(wide_repository, tmp_path / "again")


def test_a_change_of_one_quantised_number(quantised: PreTrainedModel) -> None:
    logits(quantised)
    weight = quantised.model.layers[1].mlp.down_proj.weight
    weight.data.view(-1)[1000] ^= 16
    assert quantised.weights_changed()
    weight.data.view(-1)[1000] ^= 16
    assert not quantised.weights_changed()
    quantised.model.norm.weight.data[0] += 1
    assert quantised.weights_changed()


def test_a_merge_into_quantised_weights_is_saved(quantised: PreTrainedModel, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    before = logits(quantised).float()
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False
    )
    merged = peft.get_peft_model(quantised, lora).merge_and_unload()
    trained = logits(merged).float()
    assert merged.weights_changed()
    merged.save_pretrained(tmp_path / "merged")
    found = logits(load(tmp_path / "merged")).float()
    assert (found - trained).norm() < 0.1 * (before - trained).norm()


def test_scales_alone(wide_repository: Path) -> None:
    """An (IA)^3 vector of PEFT, merged, may leave every 4-bit code as it was."""
    pytest.importorskip("bitsandbytes")
    for ran in (False, True):
        model = load(wide_repository, quantization_config=BitsAndBytesConfig(**FOUR_BITS))
        if ran:
            logits(model)
        model.model.layers[0].mlp.up_proj.weight.quant_state.absmax.view(-1)[3] *= 2
        assert model.weights_changed(), ran
