"""Deltas beside their base: the model says what the one says that the delta repository stands for."""

from __future__ import annotations

import copy
import functools
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.delta_tenants import (
    CLOSE,
    IDS,
    MIXED,
    Tenants,
    both,
    check_each,
    check_rows,
    generates,
    largest_difference,
    load_dense,
    make_tenants,
    says,
)
from support.messages import naming
from support.tiny_models import (
    VOCABULARY,
    edit_json,
    fine_tune,
    make_model,
    save_model,
    tiny_config,
)
from transformers import GenerationConfig, LlamaForCausalLM

from impart_hf import (
    BitDeltaConfig,
    DareConfig,
    DareQtConfig,
    DeltaComeConfig,
    ExactConfig,
    ImPartConfig,
    ImPartQtConfig,
    ImPartRdConfig,
    LowRankConfig,
    compress,
    load_delta,
)

ROWS_APART = [
    "llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "mixtral", "gpt-neox", "phi",
    "gpt2", "biogpt", "qwen2-moe", "gemma3-vision",
]  # fmt: skip
# Sinks in the attention, convolutions and states: layers that read several parameters at once
ROWS_TOGETHER = ["gpt-oss", "mamba", "mamba2", "bloom"]
OFTEN = ["llama-tied", "gpt2", "mixtral"]
METHODS = [
    BitDeltaConfig(compression_ratio=8), DareConfig(compression_ratio=4), DareQtConfig(compression_ratio=8),
    DeltaComeConfig(compression_ratio=4), ExactConfig(), ImPartConfig(compression_ratio=4),
    ImPartRdConfig(compression_ratio=4), LowRankConfig(compression_ratio=4),
]  # fmt: skip
FACTORS = ["dense", "packed"]


@pytest.fixture(scope="module")
def tenants_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tenants]:
    @functools.cache
    def tenants(kind: str) -> Tenants:
        return make_tenants(tmp_path_factory.mktemp(kind), tiny_config(kind))

    return tenants


@pytest.fixture(scope="module")
def tenants(tenants_of: Callable[[str], Tenants]) -> Tenants:
    return tenants_of("llama")


def kinds(names: list[str]) -> list:
    return [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("kind", kinds(ROWS_APART))
def test_architectures(tenants_of: Callable[[str], Tenants], kind: str, factors: str) -> None:
    tenants = tenants_of(kind)
    model = both(tenants, factors)
    check_each(model, tenants)
    check_rows(model, tenants)
    model.set_adapter("two")
    assert torch.equal(says(model.merge_and_unload()), says(load_dense(tenants.deltas["two"])))


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("kind", kinds(ROWS_TOGETHER))
def test_architectures_of_one_delta_a_batch(tenants_of: Callable[[str], Tenants], kind: str, factors: str) -> None:
    tenants = tenants_of(kind)
    model = both(tenants, factors)
    check_each(model, tenants)
    with pytest.raises(ValueError, match=naming("set_adapter")):
        model(input_ids=IDS, adapter_names=MIXED)
    check_each(model, tenants)


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_methods(tmp_path: Path, method: object, factors: str) -> None:
    tenants = make_tenants(tmp_path, tiny_config("llama", num_hidden_layers=1), method)  # type: ignore[arg-type]
    model = both(tenants, factors)
    check_each(model, tenants)
    check_rows(model, tenants)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factors", FACTORS)
def test_base_in_another_dtype(tenants: Tenants, dtype: torch.dtype, factors: str) -> None:
    """The base's check goes by its values in that dtype; the sum is not rounded, so it is not the merged model's."""
    model = load_delta(tenants.load_base(dtype=dtype), tenants.deltas["one"], factors=factors)
    exact = says(load_dense(tenants.deltas["one"]))
    error = (says(model).float() - exact).norm() / exact.norm()
    rounded = (says(load_dense(tenants.deltas["one"], dtype=dtype)).float() - exact).norm() / exact.norm()
    assert error < 2 * rounded


def test_moved_later(tenants: Tenants) -> None:
    model = load_delta(tenants.load_base(dtype=torch.bfloat16), tenants.deltas["one"])
    moved = model.to(torch.float32)
    assert moved is model and says(model).dtype == torch.float32
    exact = says(load_dense(tenants.deltas["one"]))
    assert (says(model) - exact).norm() < 0.05 * exact.norm()  # the base was rounded
    model.load_adapter(tenants.deltas["two"], "two")


@pytest.fixture(scope="module")
def with_tokens(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, bool], Tenants]:
    """A base, tied or not, a delta that adds tokens and one of the same vocabulary."""

    @functools.cache
    def made(tied: bool, tied_after: bool) -> Tenants:
        folder = tmp_path_factory.mktemp("tokens")
        base = make_model(tiny_config("llama", tie_word_embeddings=tied), dtype=torch.float32)
        save_model(base, folder / "base")
        deltas = {}
        for seed, name in enumerate(("one", "two"), 1):
            tuned = fine_tune(base, seed)
            if tied and not tied_after:
                untied = torch.nn.Parameter(tuned.lm_head.weight.detach() * 1.1)
                tuned.lm_head.weight, tuned.config.tie_word_embeddings = untied, False
                tuned = LlamaForCausalLM(tuned.config).eval().requires_grad_(False)
                source = fine_tune(base, seed).state_dict()
                tuned.load_state_dict(source | {"lm_head.weight": untied.detach()})
            if name == "one":
                tuned.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
            tuned_folder = save_model(tuned, folder / f"{name}-dense")
            deltas[name] = folder / name
            compress(str(folder / "base"), str(tuned_folder), deltas[name], ImPartQtConfig(compression_ratio=4))
        return Tenants(folder / "base", deltas)

    return made


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("tied, tied_after", [(True, True), (True, False), (False, False)])
def test_added_tokens_and_own_output_projection(
    with_tokens: Callable[[bool, bool], Tenants], tied: bool, tied_after: bool, factors: str
) -> None:
    tenants = with_tokens(tied, tied_after)
    model = both(tenants, factors)
    check_each(model, tenants)
    new = IDS.clone()
    new[0, 3] = new[3, 5] = VOCABULARY + 7
    mixed = says(model, new, adapter_names=MIXED)
    assert mixed.shape[-1] == VOCABULARY + 8
    for number, name in enumerate(MIXED):
        alone = says(load_dense(tenants.folder(name)), new[number : number + 1])[0]
        assert largest_difference(mixed[number, :, : alone.shape[-1]], alone) <= CLOSE
        assert (mixed[number, :, alone.shape[-1] :] == float("-inf")).all(), "no token of another's vocabulary"
    model.set_adapter("one")
    merged = model.merge_and_unload()
    assert merged.config.vocab_size == VOCABULARY + 8
    assert torch.equal(says(merged, new[:1]), says(load_dense(tenants.deltas["one"]), new[:1]))


def test_beams(tenants: Tenants) -> None:
    """Each row of a beam search is repeated."""
    model = both(tenants)
    found = generates(model, adapter_names=MIXED, num_beams=3)
    for number, name in enumerate(MIXED):
        alone = generates(load_dense(tenants.folder(name)), IDS[number : number + 1], num_beams=3)
        assert torch.equal(found[number], alone[0])


def test_generation_config_of_the_delta(tenants: Tenants, tmp_path: Path) -> None:
    """Nothing is left to the base's; without a file, the model's configuration tells what ends a text."""
    folder = Path(shutil.copytree(tenants.deltas["one"], tmp_path / "delta"))
    base = tenants.load_base()
    base.generation_config = GenerationConfig(do_sample=True, temperature=5.0, max_new_tokens=2, eos_token_id=9)
    GenerationConfig(max_new_tokens=7, min_new_tokens=7, eos_token_id=2, pad_token_id=3).save_pretrained(folder)
    model = load_delta(base, folder)
    merged = load_dense(folder)
    assert torch.equal(model.generate(IDS), merged.generate(IDS)) and model.generate(IDS).shape[1] == 19
    assert model.generate(IDS, max_new_tokens=9, min_new_tokens=9).shape[1] == 21
    assert model.generate(IDS, GenerationConfig(max_new_tokens=1)).shape[1] == 13
    assert model.generate(IDS, adapter_names=["default", "__base__"] * 2).shape[1] <= 14, "the base's, if they differ"
    (folder / "generation_config.json").unlink()
    again = load_delta(tenants.load_base(), folder)
    assert torch.equal(again.generate(IDS, max_new_tokens=9), load_dense(folder).generate(IDS, max_new_tokens=9))


def test_another_configuration_than_the_base(tenants: Tenants, tmp_path: Path) -> None:
    """What a forward pass reads of it is the base's, so that it must not differ."""
    folder = Path(shutil.copytree(tenants.deltas["one"], tmp_path / "delta"))
    content = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", text_config=content["text_config"] | {"rms_norm_eps": 1e-2})
    with pytest.raises(ValueError, match=naming("rms_norm_eps", "AutoModelForCausalLM")):
        load_delta(tenants.load_base(), folder)


def test_forward_methods_of_other_libraries(tenants: Tenants) -> None:
    """As accelerate's hooks have: they stay below, and are back after `unload`."""
    base = tenants.load_base()
    calls = []
    for module in (base, base.lm_head, base.model.layers[0].mlp.down_proj):
        original = module.forward

        @functools.wraps(original)
        def wrapped(*arguments, original=original, **options):
            calls.append(1)
            return original(*arguments, **options)

        module.forward = wrapped
    model = load_delta(base, tenants.deltas["one"], "one")
    assert largest_difference(says(model), says(load_dense(tenants.deltas["one"]))) <= CLOSE
    before = len(calls)
    says(model.unload())
    assert len(calls) == before + 3


class _ReadsItself(torch.nn.Module):
    """An MLP that takes a child's weight in a way that the source does not show."""

    def __init__(self, mlp: torch.nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down = self.down_proj
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return torch.nn.functional.linear(inner, down.weight)


def test_a_weight_that_is_read_without_a_call(tenants: Tenants) -> None:
    base = tenants.load_base()
    base.model.layers[1].mlp = _ReadsItself(base.model.layers[1].mlp)
    with pytest.raises(ValueError, match=naming("model.layers.1.mlp.down_proj")):
        load_delta(base, tenants.deltas["one"])


class _NormHead(torch.nn.Linear):
    """An output projection that normalises its weight, as Baichuan's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input, torch.nn.functional.normalize(self.weight))


def test_linear_layers_of_their_own_kind(tenants: Tenants) -> None:
    base, merged = tenants.load_base(), load_dense(tenants.deltas["one"])
    for model in (base, merged):
        model.lm_head.__class__ = _NormHead
    assert largest_difference(says(load_delta(base, tenants.deltas["one"])), says(merged)) <= CLOSE


def test_copies_are_without_deltas(tenants: Tenants) -> None:
    model = both(tenants)
    twin = copy.deepcopy(model.base_model)
    assert torch.equal(says(twin), says(load_dense(tenants.base)))
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert not says(twin).any()
    check_rows(model, tenants)


def test_two_objects_on_one_base(tenants: Tenants) -> None:
    base = tenants.load_base()
    model = load_delta(base, tenants.deltas["one"], "one")
    other = load_delta(base, tenants.deltas["two"], "two")
    with pytest.raises(ValueError, match=naming("unload")):
        other.merge_and_unload()
    other.unload()
    assert largest_difference(says(model), says(load_dense(tenants.deltas["one"]))) <= CLOSE
    del other, model
    gc.collect()
    check_each(both(tenants, base=base), tenants)


def test_merging_a_damaged_delta_changes_nothing(tenants: Tenants, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tenants.deltas["one"], tmp_path / "delta"))
    model = load_delta(tenants.load_base(), folder)
    file = folder / "delta_model.safetensors"
    with file.open("r+b") as opened:  # in place, as the file is mapped
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([byte[0] ^ 255]))
    with pytest.raises(ValueError, match=naming("damaged")):
        model.merge_and_unload()
    assert torch.equal(says(model.get_base_model()), says(load_dense(tenants.base)))
    assert largest_difference(says(model), says(load_dense(tenants.deltas["one"]))) <= CLOSE


def test_images_in_a_batch_of_several_deltas(tenants_of: Callable[[str], Tenants]) -> None:
    model = both(tenants_of("gemma3-vision"))
    with pytest.raises(ValueError, match=naming("pixel_values", "set_adapter")):
        model(input_ids=IDS, pixel_values=torch.zeros(4, 3, 32, 32), adapter_names=MIXED)


def test_without_a_cache_rows_can_be_divided_further(tenants_of: Callable[[str], Tenants]) -> None:
    """Layers with parameters of their own then run once for each delta."""
    tenants = tenants_of("gpt-oss")
    model = both(tenants)
    mixed = says(model, use_cache=False, adapter_names=MIXED)
    for number, name in enumerate(MIXED):
        alone = says(load_dense(tenants.folder(name)), IDS[number : number + 1])
        assert largest_difference(mixed[number], alone[0]) <= CLOSE


def test_parts_of_the_base(tenants: Tenants) -> None:
    model = both(tenants)
    with pytest.raises(AttributeError, match=naming("get_base_model")):
        _ = model.model
    with pytest.raises(ValueError, match=naming("merge_and_unload")):
        model.resize_token_embeddings(400)
    with pytest.raises(TypeError, match=naming("second time")):
        copy.deepcopy(model)


def test_names(tenants: Tenants) -> None:
    model = both(tenants)
    assert model.active_adapter == "one" and model.active_adapters == ["one"] and model.adapter_names == ["one", "two"]
    with pytest.raises(ValueError, match=naming("three", "one, two")):
        model.set_adapter("three")
    with pytest.raises(ValueError, match=naming("three")):
        model(input_ids=IDS, adapter_names=["one", "two", "three", "one"])
    with pytest.raises(ValueError, match=naming("adapter_names", 3, 4)):
        model(input_ids=IDS, adapter_names=["one"] * 3)
    with pytest.raises(ValueError, match=naming("one")):
        model.load_adapter(tenants.deltas["two"], "one")
    with pytest.raises(ValueError, match=naming("adapter_names")):
        model.set_adapter(["one", "two"])  # type: ignore[arg-type]
    for names in ("one", [], ["one"] * 3):
        with pytest.raises(ValueError, match=naming("adapter_names")):
            model.generate(IDS, adapter_names=names)
    for name in ("", "__base__", "a/b", "..", "a\\b", 5):
        with pytest.raises(ValueError, match=naming("name")):
            model.load_adapter(tenants.deltas["two"], name)
    with pytest.raises(ValueError, match=naming("factors", "loose")):
        model.load_adapter(tenants.deltas["two"], "three", factors="loose")
    model.delete_adapter("one")
    assert model.active_adapter == "two"
    model.delete_adapter("two")
    assert model.active_adapters == []
    assert torch.equal(says(model), says(load_dense(tenants.base)))
    with pytest.raises(ValueError, match=naming("none")):
        model.set_adapter("two")
    model.load_adapter(tenants.deltas["two"], "one")
    assert largest_difference(says(model), says(load_dense(tenants.deltas["two"]))) <= CLOSE


def test_inference_only(tenants: Tenants) -> None:
    model = both(tenants)
    with pytest.raises(ValueError, match=naming("inference", "merge_and_unload")):
        model.train()
    assert model.eval() is model and not model.training
    loss = model(input_ids=IDS, labels=IDS).loss
    with pytest.raises(RuntimeError):
        loss.backward()


def test_attributes_of_the_base(tenants: Tenants) -> None:
    model = both(tenants)
    assert model.config.model_type == "llama" and model.dtype == torch.float32 and model.device.type == "cpu"
    assert model.can_generate()
    with pytest.raises(AttributeError):
        _ = model.no_such_thing


def test_unload(tenants: Tenants) -> None:
    model = both(tenants)
    base = model.unload()
    assert isinstance(base, LlamaForCausalLM) and torch.equal(says(base), says(load_dense(tenants.base)))
    assert not any("forward" in vars(module) for module in base.modules())
    check_each(both(tenants, base=base), tenants)
