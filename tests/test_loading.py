"""A delta repository loads, runs, trains and saves like any other model; every test compares with the dense model."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import (
    VOCABULARY,
    Pair,
    edit_json,
    edit_tensors,
    fine_tune,
    make_model,
    rewrite,
    same_files,
    save_model,
    save_pair,
    tiny_config,
    tiny_tokenizer,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)
from without_impart_hf import WITHOUT_IMPART_HF

from impart_hf import DeltaCompressedConfig, DeltaCompressedForCausalLM, ImPartConfig, LowRankConfig, compress
from impart_hf.modeling.checkpoints import CheckpointError, HubOptions
from impart_hf.modeling.delta_record import DeltaFormatError, parse_stack
from impart_hf.modeling.delta_repository import DeltaFile, DeltaRepository, WrongBaseError

CONFIG = LowRankConfig(compression_ratio=3)
IDS = torch.arange(5, 45).view(2, 20)
OFFLOAD = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
OFFLOAD |= {"lm_head": "disk", "model.rotary_emb": "cpu"}


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def tensors(repository: Path) -> dict[str, torch.Tensor]:
    """What the repository stands for, decoded without transformers."""
    opened = DeltaRepository(str(repository), DeltaCompressedConfig.from_pretrained(repository), HubOptions())
    return {name: opened.tensor(name) for name in opened.names()}


@pytest.fixture(scope="module")
def dense_folder(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a plain checkpoint, written without any of the code that is tested here."""
    folder = tmp_path_factory.mktemp("dense")
    text_config = json.loads((tiny_repository / "config.json").read_text())["text_config"]
    model = LlamaForCausalLM(transformers.LlamaConfig(**text_config)).to(torch.bfloat16)
    model.load_state_dict(tensors(tiny_repository))
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig.from_pretrained(tiny_repository)
    return save_model(model, folder)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Adapters, sampling and Trainer draw from torch's own generator."""
    torch.manual_seed(0)


@pytest.fixture
def model(tiny_repository: Path) -> PreTrainedModel:
    return load(tiny_repository)


@contextlib.contextmanager
def captured_log() -> Iterator[list[str]]:
    """The messages that transformers, PEFT, accelerate and impart_hf log, those said once only included."""
    for method in ("warning_once", "info_once"):
        getattr(logging.Logger, method).cache_clear()
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "accelerate", "impart_hf")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield lines
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


# Loading ------------------------------------------------------------------------------------------------------------


def test_auto_classes(tiny_repository: Path, tiny_pair: Pair, model: PreTrainedModel) -> None:
    config = AutoConfig.from_pretrained(tiny_repository)
    assert type(config) is DeltaCompressedConfig and type(config.text_config) is transformers.LlamaConfig
    assert config.base_model_name_or_path == str(tiny_pair.base) and config.base_model_revision is None
    assert isinstance(model, DeltaCompressedForCausalLM) and isinstance(model, LlamaForCausalLM)
    assert type(model) is type(load(tiny_repository)), "two loads give one class"
    assert type(model).__name__ == "LlamaForCausalLM" and not model.is_custom_code()
    assert model.config.model_type == "llama" and model.config.architectures == ["LlamaForCausalLM"]
    assert model.name_or_path == model.config.name_or_path == str(tiny_repository)
    assert model.delta_config.method["name"] == "lowrank"
    assert not model.training and all(p.requires_grad for p in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(tiny_repository)
    assert tokenizer("a base")["input_ids"] == tiny_tokenizer()("a base")["input_ids"]
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_tokenizer_that_does_not_name_its_class(tiny_repository: Path, tmp_path: Path) -> None:
    """Then transformers goes by config.json's model_type, which is that of the delta."""
    folder = shutil.copytree(tiny_repository, tmp_path / "delta")
    edit_json(folder / "tokenizer_config.json", tokenizer_class=None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a base")["input_ids"] == tiny_tokenizer()("a base")["input_ids"]


def test_weights_are_the_repositorys(tiny_repository: Path, tiny_pair: Pair, model: PreTrainedModel) -> None:
    expected, state = tensors(tiny_repository), model.state_dict()
    assert expected.keys() == state.keys()
    assert all(torch.equal(expected[name], state[name]) for name in expected)
    base, finetuned = logits(load(tiny_pair.base)), logits(load(tiny_pair.finetuned))
    assert (logits(model) - finetuned).norm() < 0.1 * (base - finetuned).norm()


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"dtype": torch.float32},
        {"dtype": "float16"},
        {"dtype": "auto"},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"device_map": OFFLOAD, "offload_folder": "offload"},
        {"device_map": "auto", "max_memory": {"cpu": 150_000}, "offload_folder": "offload"},
        {"attn_implementation": "eager"},
        {"attn_implementation": "sdpa"},
        {"low_cpu_mem_usage": True},
        {"use_cache": False},
        {"output_attentions": True, "attn_implementation": "eager"},
        {"trust_remote_code": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("direct", [False, True], ids=["auto class", "our class"])
def test_arguments_of_from_pretrained(
    tiny_repository: Path,
    dense_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    direct: bool,
    kwargs: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    models = []
    for cls, folder in ((DeltaCompressedForCausalLM, tiny_repository), (LlamaForCausalLM, dense_folder)):
        models.append((cls if direct else AutoModelForCausalLM).from_pretrained(folder, **kwargs))
    ours, plain = models
    assert ours.dtype == plain.dtype and getattr(ours, "hf_device_map", None) == getattr(plain, "hf_device_map", None)
    configs = [m.config.to_dict() for m in models]
    assert [config.pop("_name_or_path") for config in configs] == [str(tiny_repository), str(dense_folder)]
    assert configs[0] == configs[1]
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert one.dtype == other.dtype and one.device == other.device
        assert one.device.type == "meta" or torch.equal(one, other)
    outputs = [m(input_ids=IDS) for m in models]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert outputs[0].keys() == outputs[1].keys()
    assert not ours.weights_changed()


def test_loading_info(tiny_repository: Path) -> None:
    loaded, info = load(tiny_repository, output_loading_info=True)
    assert isinstance(loaded, DeltaCompressedForCausalLM)
    assert not any(info.values())


def test_quantised_on_the_fly(tiny_repository: Path, dense_folder: Path) -> None:
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    ours = load(tiny_repository, quantization_config=settings)
    plain = load(dense_folder, quantization_config=settings)
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (ours, plain)]
    assert weights[0].dtype == torch.int8 and torch.equal(weights[0], weights[1])
    assert torch.equal(logits(ours), logits(plain))
    assert not torch.equal(logits(ours), logits(load(tiny_repository)))
    assert not ours.weights_changed()


def test_in_inference_mode(tiny_repository: Path, dense_folder: Path, tmp_path: Path) -> None:
    """There torch counts no versions of a tensor."""
    with torch.inference_mode():
        ours = load(tiny_repository)
        assert torch.equal(ours(IDS).logits, load(dense_folder)(IDS).logits)
        assert not ours.weights_changed()
        ours.save_pretrained(tmp_path / "again")
        ours.lm_head.weight.mul_(2)
        assert ours.weights_changed()
    assert same_files(tiny_repository, tmp_path / "again")


def test_config_object_and_path_object(tiny_repository: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_repository)
    config.text_config.attention_dropout = 0.5
    given = AutoModelForCausalLM.from_pretrained(str(tiny_repository), config=config)
    assert given.config.attention_dropout == 0.5
    assert torch.equal(given.lm_head.weight, load(tiny_repository).lm_head.weight)


def test_configuration_survives_being_saved(tiny_repository: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_repository)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again.text_config) is transformers.LlamaConfig
    fields = [each.to_dict() for each in (config, again)]
    assert [each.pop("_name_or_path") for each in fields] == [str(tiny_repository), str(tmp_path)]
    assert fields[0] == fields[1]


def test_random_weights_from_the_configuration(tiny_repository: Path) -> None:
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_repository))
    assert type(made) is LlamaForCausalLM and made.model.embed_tokens.weight.shape == (VOCABULARY, 64)


def test_subfolder(tiny_repository: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_repository, tmp_path / "runs" / "delta")
    loaded = load(tmp_path / "runs", subfolder="delta")
    assert torch.equal(logits(loaded), logits(load(tiny_repository)))
    assert loaded.generation_config.eos_token_id == 2
    loaded.save_pretrained(tmp_path / "again")
    assert same_files(tiny_repository, tmp_path / "again")


def test_base_moved(tiny_pair: Pair, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_pair.base, tmp_path / "base")
    compress(str(base), str(tiny_pair.finetuned), tmp_path / "delta", CONFIG)
    before = logits(load(tmp_path / "delta"))
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="base model of '.*delta' .*base_model=") as raised:
        load(tmp_path / "delta")
    assert str(base) in str(raised.value)
    loaded = load(tmp_path / "delta", base_model=str(moved))
    assert torch.equal(logits(loaded), before)
    loaded.save_pretrained(tmp_path / "again")
    assert same_files(tmp_path / "delta", tmp_path / "again"), "the recorded base is not touched"


def test_few_tensors_in_memory(tiny_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another dtype nothing of a decoded tensor need stay, so any that does is held by mistake."""
    lock, alive, most, decoded = threading.Lock(), set(), [0], []
    original = DeltaRepository.tensor

    def counting(self: DeltaRepository, name: str, device: Any = "cpu") -> torch.Tensor:
        tensor = original(self, name, device)
        with lock:
            alive.add(name)
            decoded.append(name)
            most[0] = max(most[0], len(alive))
        weakref.finalize(tensor.untyped_storage(), lambda: alive.discard(name))
        return tensor

    monkeypatch.setattr(DeltaRepository, "tensor", counting)
    loaded = load(tiny_repository, dtype=torch.float32)
    gc.collect()
    assert sorted(decoded) == sorted(loaded.state_dict()), "each tensor is decoded once"
    assert not alive
    assert most[0] <= 5, "one for each of transformers' four threads, and one on its way"


# Errors reach the user as they are ----------------------------------------------------------------------------------


@pytest.fixture
def broken(tiny_pair: Pair, tmp_path: Path) -> tuple[Path, Path]:
    """A base and its delta repository, to be damaged."""
    base = shutil.copytree(tiny_pair.base, tmp_path / "base")
    compress(str(base), str(tiny_pair.finetuned), tmp_path / "delta", CONFIG)
    return base, tmp_path / "delta"


def flip_lowest_bit(tensor: torch.Tensor) -> None:
    tensor.view(torch.int16).view(-1)[7] ^= 1


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"]
)
@pytest.mark.parametrize(
    "kwargs", [{}, {"device_map": "cpu"}, {"device_map": OFFLOAD, "offload_folder": "offload"}], ids=str
)
def test_base_wrong_by_one_bit(
    broken: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kwargs: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    base, delta = broken
    edit_tensors(base, lambda tensors: flip_lowest_bit(tensors[name]))
    with pytest.raises(WrongBaseError) as raised:
        load(delta, **kwargs)
    message = str(raised.value)
    assert str(base) in message and str(delta) in message and name in message and "\n" not in message


def test_wrong_base_while_quantising(broken: tuple[Path, Path]) -> None:
    base, delta = broken
    edit_tensors(base, lambda tensors: flip_lowest_bit(tensors["model.layers.1.mlp.up_proj.weight"]))
    with pytest.raises(WrongBaseError, match="up_proj"):
        load(delta, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))


def test_base_of_another_seed_or_shape(broken: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = broken
    other = save_model(make_model(tiny_config("llama"), seed=5), tmp_path / "other")
    with pytest.raises(WrongBaseError) as raised:
        load(delta, base_model=str(other))
    assert str(other) in str(raised.value) and str(base) in str(raised.value) and str(delta) in str(raised.value)
    deeper = save_model(make_model(tiny_config("llama", num_hidden_layers=3)), tmp_path / "deeper")
    with pytest.raises(WrongBaseError, match="it has other tensors"):
        load(delta, base_model=str(deeper))
    wider = save_model(make_model(tiny_config("llama", intermediate_size=160)), tmp_path / "wider")
    with pytest.raises((WrongBaseError, DeltaFormatError)) as raised:
        load(delta, base_model=str(wider))
    assert str(wider) in str(raised.value) or "mlp" in str(raised.value)


def test_damaged_delta_file(broken: tuple[Path, Path]) -> None:
    path = broken[1] / "delta_model.safetensors"
    whole = path.read_bytes()
    rewrite(path, whole[:-100])
    with pytest.raises(DeltaFormatError, match="damaged or not a safetensors file"):
        load(broken[1])
    for position in (len(whole) // 2, len(whole) - 50):
        rewrite(path, whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(DeltaFormatError, match="damaged .its CRC-32 differs.; download the file again"):
            load(broken[1])
    path.unlink()
    with pytest.raises(CheckpointError, match="has no delta_model.safetensors"):
        load(broken[1])


def test_newer_format_version(broken: tuple[Path, Path]) -> None:
    edit_json(broken[1] / "config.json", format_version=99)
    with pytest.raises(ValueError, match="format version 99.*upgrade impart-hf"):
        load(broken[1])


def test_not_a_delta_repository(tiny_pair: Pair) -> None:
    with pytest.raises((ValueError, OSError), match="text_config|not a delta repository"):
        DeltaCompressedForCausalLM.from_pretrained(tiny_pair.base)


# Generating ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{"do_sample": False}, {"do_sample": True, "top_k": 50}, {"num_beams": 2}], ids=str)
def test_generate(model: PreTrainedModel, dense_folder: Path, kwargs: Any) -> None:
    results = []
    for each in (model, load(dense_folder)):
        torch.manual_seed(0)
        results.append(each.generate(IDS, max_new_tokens=12, **kwargs))
    assert torch.equal(*results)


def test_generation_config_is_the_finetunes(tmp_path: Path) -> None:
    base = make_model(tiny_config("llama"))
    finetuned = fine_tune(base)
    finetuned.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=[2, 9], pad_token_id=3)
    save_model(base, tmp_path / "base")
    save_model(finetuned, tmp_path / "finetuned")
    compress(
        str(tmp_path / "base"), str(tmp_path / "finetuned"), tmp_path / "delta", LowRankConfig(compression_ratio=4)
    )
    loaded, plain = load(tmp_path / "delta"), load(tmp_path / "finetuned")
    assert loaded.generation_config.to_dict() == plain.generation_config.to_dict()
    assert loaded.generation_config.max_new_tokens == 7
    mine = GenerationConfig(max_new_tokens=3)
    assert load(tmp_path / "delta", generation_config=mine).generation_config.max_new_tokens == 3
    (tmp_path / "delta" / "generation_config.json").unlink()
    assert load(tmp_path / "delta").generation_config.eos_token_id == 2, "taken from config.json"


def test_pipeline_says_and_warns_what_the_dense_model_does(tiny_repository: Path, dense_folder: Path) -> None:
    texts, logs = [], []
    for folder in (tiny_repository, dense_folder):
        with captured_log() as lines:
            generator = pipeline("text-generation", model=str(folder))
            texts.append(generator("A fine", max_new_tokens=6, do_sample=False))
            texts.append(generator([{"role": "user", "content": "the base"}], max_new_tokens=4, do_sample=False))
        logs.append(lines)
    assert texts[:2] == texts[2:]
    assert logs[0] == logs[1]


def test_no_warning_that_the_dense_model_does_not_give(tiny_repository: Path, dense_folder: Path) -> None:
    logs = []
    for folder in (tiny_repository, dense_folder):
        with captured_log() as lines, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            load(folder).generate(IDS, max_new_tokens=2)
        logs.append((lines, [str(w.message) for w in warned]))
    assert logs[0] == logs[1]
    assert logs[0][0] == []


LOAD_AND_LISTEN = """
import json, logging, sys, warnings
import impart_hf
from transformers import AutoModelForCausalLM

lines = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger().addHandler(handler)
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(json.dumps(lines + [str(warning.message) for warning in warned]))
"""


def test_no_warning_from_the_decoder(tmp_path: Path) -> None:
    """torch warns once in a process, hence one of its own; thin columns are the unusual case."""
    pair = save_pair(tmp_path, tiny_config("llama", hidden_size=256, intermediate_size=512))
    compress(str(pair.base), str(pair.finetuned), tmp_path / "delta", ImPartConfig(compression_ratio=24))
    name = "model.layers.0.mlp.up_proj.weight"
    (record,) = parse_stack(DeltaFile([tmp_path / "delta" / "delta_model.safetensors"]).read_records(name), name)
    assert record.keep_ratios().min() < 0.1, "some columns are thin"
    command = [sys.executable, "-c", LOAD_AND_LISTEN, str(tmp_path / "delta")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


# Training -----------------------------------------------------------------------------------------------------------


def train_step(model: torch.nn.Module) -> float:
    """One step of SGD; the loss before it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_peft_without_target_modules(tiny_repository: Path, dense_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(tiny_repository, dtype=torch.float32)
    before = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 4, "query and value of two layers"
    first, second = train_step(adapted), train_step(adapted)
    assert second < first
    trained = logits(adapted)

    adapted.save_pretrained(tmp_path / "adapter")
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(tiny_repository)
    for cls in (AutoModelForCausalLM, peft.AutoPeftModelForCausalLM):
        edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tiny_repository))
        ours = logits(cls.from_pretrained(tmp_path / "adapter", dtype=torch.float32))
        edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(dense_folder))
        assert torch.equal(ours, logits(cls.from_pretrained(tmp_path / "adapter", dtype=torch.float32))), cls
        assert torch.allclose(ours, trained, atol=1e-3), cls

    merged = adapted.merge_and_unload()
    assert merged is model and merged.weights_changed()
    assert torch.allclose(logits(merged), trained, atol=1e-3) and not torch.allclose(trained, before, atol=1e-2)
    with captured_log() as lines:
        merged.save_pretrained(tmp_path / "merged")
    assert len(lines) == 1 and "dense model is saved" in lines[0]
    plain = load(tmp_path / "merged")
    assert type(plain) is LlamaForCausalLM and torch.equal(logits(plain), logits(merged))


def test_peft_adapter_that_learnt_nothing(model: PreTrainedModel, tiny_repository: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    unloaded = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")).unload()
    assert not unloaded.weights_changed()
    unloaded.save_pretrained(tmp_path / "again")
    assert same_files(tiny_repository, tmp_path / "again")


def test_transformers_own_adapters(model: PreTrainedModel, tiny_repository: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False))
    adapted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not list((tmp_path / "adapter").glob("*model.safetensors"))[1:], "nothing but the adapter"
    again = load(tiny_repository)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again), adapted)


def trainer(model: PreTrainedModel, folder: Path) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], disable_tqdm=True,
        use_cpu=True, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in IDS.repeat(2, 1)])


def test_trainer_full_fine_tune(model: PreTrainedModel, dense_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    plain = load(dense_folder)
    states = []
    for each, folder in ((plain, tmp_path / "plain"), (model, tmp_path / "ours")):
        trainer(each, folder).train()
        states.append(each.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert model.weights_changed()
    checkpoint = load(tmp_path / "ours" / "checkpoint-2")
    assert type(checkpoint) is LlamaForCausalLM and torch.equal(logits(checkpoint), logits(model))
    with captured_log() as lines:
        model.save_pretrained(tmp_path / "saved")
    assert len(lines) == 1 and "weights have changed" in lines[0] and "impart-hf compress" in lines[0]
    assert isinstance(model, DeltaCompressedForCausalLM), "saving does not change the object"
    saved = load(tmp_path / "saved")
    assert type(saved) is LlamaForCausalLM and torch.equal(logits(saved), logits(model))
    plain.save_pretrained(tmp_path / "plain saved")
    assert same_files(tmp_path / "plain saved", tmp_path / "saved")


def test_untrained_model_in_a_trainer_saves_the_delta(
    model: PreTrainedModel, tiny_repository: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    trainer(model, tmp_path / "run").save_model(str(tmp_path / "again"))
    assert (tmp_path / "again" / "delta_model.safetensors").exists()
    assert not (tmp_path / "again" / "model.safetensors").exists()


def test_compile_and_gradient_checkpointing(model: PreTrainedModel, dense_folder: Path) -> None:
    plain = load(dense_folder)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(input_ids=IDS).logits, logits(plain))
    gradients = []
    for each in (model, plain):
        each.gradient_checkpointing_enable()
        each.train()
        each(input_ids=IDS, labels=IDS).loss.backward()
        assert each.is_gradient_checkpointing
        gradients.append(each.model.layers[0].mlp.up_proj.weight.grad)
    assert gradients[0].abs().sum() > 0 and torch.equal(*gradients)


# Copies -------------------------------------------------------------------------------------------------------------


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))


def torch_saved(model: PreTrainedModel) -> PreTrainedModel:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, torch_saved])
def test_copies(
    model: PreTrainedModel,
    tiny_repository: Path,
    tmp_path: Path,
    duplicate: Callable[[PreTrainedModel], PreTrainedModel],
) -> None:
    twin = duplicate(model)
    assert type(twin) is type(model) and twin.lm_head.weight is not model.lm_head.weight
    assert torch.equal(logits(twin), logits(model)) and not twin.weights_changed()
    twin.save_pretrained(tmp_path / "again")
    assert same_files(tiny_repository, tmp_path / "again")
    with torch.no_grad():
        twin.model.embed_tokens.weight[3, 1].mul_(1.01)
    assert twin.weights_changed() and not model.weights_changed()
    assert duplicate(twin).weights_changed()


def test_a_pickle_holds_no_token(tiny_repository: Path) -> None:
    secret = load(tiny_repository, token="hf_secret_of_mine")
    assert b"hf_secret_of_mine" not in pickle.dumps(secret)
    assert copy.deepcopy(secret)._delta_source == secret._delta_source


# Saving -------------------------------------------------------------------------------------------------------------


def test_save_pretrained_is_byte_for_byte(model: PreTrainedModel, tiny_repository: Path, tmp_path: Path) -> None:
    names = {p.name for p in tiny_repository.iterdir()}
    assert names >= {"config.json", "delta_model.safetensors", "README.md", "tokenizer.json", "chat_template.jinja"}
    assert names >= {"generation_config.json", "modeling_delta_compressed.py", "configuration_delta_compressed.py"}
    with captured_log() as lines:
        model.save_pretrained(tmp_path / "one" / "again")
    assert lines == []
    assert same_files(tiny_repository, tmp_path / "one" / "again")
    again = load(tmp_path / "one" / "again")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(str(tmp_path / "one" / "again"))
    assert same_files(tiny_repository, tmp_path / "one" / "again"), "into the folder that it came from"
    model.save_pretrained(tmp_path / "not the main process", is_main_process=False)
    assert not (tmp_path / "not the main process").exists()


def test_saving_from_elsewhere_and_what_is_gone(
    tiny_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_repository, tmp_path / "models" / "delta")
    monkeypatch.chdir(tmp_path)
    loaded = load(Path("models/delta"))
    monkeypatch.chdir("models")
    loaded.save_pretrained("saved")
    assert same_files(tiny_repository, tmp_path / "models" / "saved")
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="is gone"):
        loaded.save_pretrained(tmp_path / "again")


def add_row(model: PreTrainedModel) -> None:
    model.resize_token_embeddings(VOCABULARY + 1)


def step_on_one_layer(model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    model.model.layers[1].mlp.down_proj.requires_grad_(True)
    train_step(model)


def step_with_adamw(model: PreTrainedModel) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


def scale_through_data(model: PreTrainedModel) -> None:
    model.model.norm.weight.data *= 1.5  # what PEFT's merge does; torch counts no version


def new_state_dict(model: PreTrainedModel) -> None:
    model.load_state_dict({name: tensor * 1.01 for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize(
    "change", [step_on_one_layer, step_with_adamw, add_row, scale_through_data, new_state_dict, train_step]
)
def test_changes_are_noticed(model: PreTrainedModel, change: Callable[[PreTrainedModel], Any]) -> None:
    assert not model.weights_changed()
    change(model)
    assert model.weights_changed()


def forwards(model: PreTrainedModel) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.zero_grad()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.float32),
        lambda model: model.to(torch.float32).to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.half().to(torch.bfloat16),
        lambda model: model.to("cpu"),
        lambda model: model.to("meta"),
        lambda model: model.train().eval(),
        lambda model: model.requires_grad_(False),
        lambda model: model.tie_weights(),
        lambda model: model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True),
        forwards,
    ],
    ids=[
        "float32",
        "float32 and back",
        "half",
        "half and back",
        "cpu",
        "meta",
        "train",
        "freeze",
        "tie",
        "assign",
        "run",
    ],
)
def test_what_is_no_change(
    model: PreTrainedModel, tiny_repository: Path, tmp_path: Path, change: Callable[[PreTrainedModel], Any]
) -> None:
    change(model)
    assert not model.weights_changed()
    model.save_pretrained(tmp_path / "again")
    assert same_files(tiny_repository, tmp_path / "again")


def test_merge_and_unload(model: PreTrainedModel, dense_folder: Path, tmp_path: Path) -> None:
    before = logits(model)
    plain = model.merge_and_unload()
    assert type(plain) is LlamaForCausalLM and not isinstance(plain, DeltaCompressedForCausalLM)
    assert not any("delta" in name for name in plain.__dict__)
    assert torch.equal(logits(plain), before)
    plain.save_pretrained(tmp_path / "plain")
    names = {p.name for p in (tmp_path / "plain").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (dense_folder / name).read_bytes(), name
    assert type(load(tmp_path / "plain")) is LlamaForCausalLM
    assert type(copy.deepcopy(plain)) is type(pickled(plain)) is LlamaForCausalLM


# Without this package installed -------------------------------------------------------------------------------------

BLOCKER = (
    WITHOUT_IMPART_HF
    + """
try:
    import impart_hf
    raise SystemExit("impart_hf was imported")
except ModuleNotFoundError:
    pass
"""
)
REMOTE_CODE = (
    BLOCKER
    + """
import copy, pickle
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

repo, base, finetuned, out = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=False)
    raise SystemExit("loaded without trust_remote_code")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
assert isinstance(model, LlamaForCausalLM) and type(model) is not LlamaForCausalLM
assert type(model).__name__ == "LlamaForCausalLM" and not model.is_custom_code()
assert "DeltaCompressedForCausalLM" in [cls.__name__ for cls in type(model).__mro__]
torch.save(model.state_dict(), out + "/state.pt")
model.save_pretrained(out + "/again")
assert type(pickle.loads(pickle.dumps(model))) is type(copy.deepcopy(model)) is type(model)
AutoTokenizer.from_pretrained(repo)
text = pipeline("text-generation", model=repo, trust_remote_code=True)("A fine", max_new_tokens=3, do_sample=False)
assert len(text) == 1
try:
    AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, base_model=finetuned)
    raise SystemExit("loaded on a wrong base")
except ValueError as error:
    assert type(error).__name__ == "WrongBaseError" and finetuned in str(error) and base in str(error), error
plain = model.merge_and_unload()
assert type(plain) is LlamaForCausalLM
plain.save_pretrained(out + "/plain")
assert not any(name.split(".")[0] == "impart_hf" for name in sys.modules)
"""
)


def test_trust_remote_code_without_impart_hf(
    tiny_pair: Pair, tiny_repository: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", REMOTE_CODE]
    command += [str(p) for p in (tiny_repository, tiny_pair.base, tiny_pair.finetuned, tmp_path)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert same_files(tiny_repository, tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "plain")), logits(model))
