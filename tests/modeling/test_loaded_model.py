"""The model of a delta repository runs, trains, is copied and saved like any other: like the dense one."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loaded_models import IDS, captured_log, load, logits
from support.messages import naming
from support.tiny_models import (
    VOCABULARY,
    edit_json,
    fine_tune,
    make_model,
    same_files,
    save_model,
    save_pair,
    tiny_config,
)
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from impart_hf import DeltaCompressedForCausalLM, ImPartConfig, LowRankConfig, compress
from impart_hf.modeling.delta_file import DeltaFile
from impart_hf.modeling.delta_record import parse_stack
from impart_hf.modeling.model_files import CheckpointError, HubOptions

pytestmark = pytest.mark.usefixtures("seeded")


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


@pytest.mark.process
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
    assert len(lines) == 1 and "dense" in lines[0]
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
    with captured_log() as lines:
        model.save_pretrained(tmp_path / "adapter")
    assert lines == []
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
    assert len(lines) == 1 and "dense" in lines[0] and "impart-hf compress" in lines[0]
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


def test_a_pickle_holds_no_token(tiny_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = load(tiny_repository, token="hf_secret_of_mine")
    assert b"hf_secret_of_mine" not in pickle.dumps(secret)
    asked: list[tuple[str, HubOptions]] = []

    def folder(source: str, options: HubOptions) -> Path:
        asked.append((source, options))
        return Path(source)

    monkeypatch.setattr("impart_hf.modeling.modeling_delta_compressed.repository_folder", folder)
    for model in (secret, copy.deepcopy(secret)):
        model.save_pretrained(tmp_path / "saved")
    assert asked[0] == asked[1] == (str(tiny_repository), HubOptions(token="hf_secret_of_mine"))


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
    with pytest.raises(CheckpointError, match=naming(folder)):
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
