"""A delta repository loads like any other model; every test compares with the dense model."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.loaded_models import IDS, load, logits
from support.messages import naming
from support.tiny_models import (
    VOCABULARY,
    Pair,
    edit_json,
    edit_tensors,
    make_model,
    rewrite,
    same_files,
    save_model,
    tiny_config,
    tiny_tokenizer,
)
from support.without_impart_hf import WITHOUT_IMPART_HF
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from impart_hf import DeltaCompressedConfig, DeltaCompressedForCausalLM, LowRankConfig, compress
from impart_hf.modeling.delta_record import DeltaFormatError
from impart_hf.modeling.delta_repository import DeltaRepository, WrongBaseError
from impart_hf.modeling.model_files import CheckpointError

pytestmark = pytest.mark.usefixtures("seeded")
CONFIG = LowRankConfig(compression_ratio=3)
OFFLOAD = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
OFFLOAD |= {"lm_head": "disk", "model.rotary_emb": "cpu"}


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


def test_weights_are_the_repositorys(
    tiny_tensors: dict[str, torch.Tensor], tiny_pair: Pair, model: PreTrainedModel
) -> None:
    state = model.state_dict()
    assert tiny_tensors.keys() == state.keys()
    assert all(torch.equal(tiny_tensors[name], state[name]) for name in tiny_tensors)
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


def test_a_configuration_that_leaves_the_dtype_open(tiny_pair: Pair, tmp_path: Path) -> None:
    """As transformers loads the fine-tune: in the dtype of its weights."""
    finetuned = shutil.copytree(tiny_pair.finetuned, tmp_path / "finetuned")
    content = json.loads((finetuned / "config.json").read_text())
    content.pop("dtype")
    (finetuned / "config.json").write_text(json.dumps({**content, "torch_dtype": None}))
    compress(str(tiny_pair.base), str(finetuned), tmp_path / "delta", LowRankConfig(compression_ratio=4))
    assert load(tmp_path / "delta").dtype == load(finetuned).dtype == torch.bfloat16
    for field in ("dtype", "torch_dtype"):  # repositories whose config.json has it from the fine-tune
        content = json.loads((tmp_path / "delta" / "config.json").read_text())
        content["text_config"] = {**content["text_config"], "dtype": None, field: None}
        (tmp_path / "delta" / "config.json").write_text(json.dumps(content))
        assert load(tmp_path / "delta", dtype="auto").dtype == torch.bfloat16


def test_loading_info(tiny_repository: Path) -> None:
    loaded, info = load(tiny_repository, output_loading_info=True)
    assert isinstance(loaded, DeltaCompressedForCausalLM)
    assert not any(info.values())


BITS = {
    "8 bits": {"load_in_8bit": True},
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, "auto"], ids=str)
@pytest.mark.parametrize("bits", list(BITS))
def test_quantised_on_the_fly(tiny_repository: Path, dense_folder: Path, bits: str, device_map: Any) -> None:
    """By bitsandbytes, which gets each tensor decoded and in full precision: as it quantises the dense model."""
    pytest.importorskip("bitsandbytes")
    settings = transformers.BitsAndBytesConfig(**BITS[bits])
    options = {"quantization_config": settings, "device_map": device_map}
    ours, plain = load(tiny_repository, **options), load(dense_folder, **options)
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (ours, plain)]
    assert weights[0].dtype == (torch.int8 if bits == "8 bits" else torch.uint8)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(logits(ours), logits(plain))
    assert not torch.equal(logits(ours), logits(load(tiny_repository)))
    assert not ours.weights_changed()


def test_moved_later(tiny_repository: Path) -> None:
    """`to` after loading, as Trainer and users call it."""
    model = load(tiny_repository)
    before = logits(model)
    assert torch.equal(logits(model.to("cpu")), before) and not model.weights_changed()
    assert model.to(torch.float32).dtype == torch.float32 and not model.weights_changed()


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


def test_the_models_fields_are_read_and_set_through_the_configuration(tiny_repository: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_repository)
    names = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    for name in (*names, "eos_token_id"):
        assert getattr(config, name) == getattr(config.text_config, name) is not None, name
    config.save_pretrained(tmp_path / "as it is")
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config and twin.hidden_size == config.hidden_size
        twin.vocab_size = 7
        assert twin.text_config.vocab_size == 7 and config.vocab_size != 7 and "vocab_size" not in twin.__dict__
        twin.base_model_name_or_path, twin.own = "owner/base", 1
        assert not hasattr(twin.text_config, "own")
    assert not hasattr(config, "nothing") and not hasattr(DeltaCompressedConfig(), "hidden_size")
    content = json.loads((tmp_path / "as it is" / "config.json").read_text())
    assert not {*names, "eos_token_id", "rope_parameters"} & content.keys()


def test_fields_that_have_another_name_in_the_model() -> None:
    config = DeltaCompressedConfig(text_config={"model_type": "gpt2", "n_embd": 48, "n_layer": 3})
    assert (config.hidden_size, config.num_hidden_layers, config.n_embd) == (48, 3, 48)
    config.hidden_size = 96
    assert config.text_config.n_embd == 96


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
    with pytest.raises(CheckpointError, match=naming(tmp_path / "delta", "base_model=", base)):
        load(tmp_path / "delta")
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
    with pytest.raises(WrongBaseError, match=naming("up_proj")):
        load(delta, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))


def test_base_of_another_seed_or_shape(broken: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = broken
    other = save_model(make_model(tiny_config("llama"), seed=5), tmp_path / "other")
    with pytest.raises(WrongBaseError) as raised:
        load(delta, base_model=str(other))
    assert str(other) in str(raised.value) and str(base) in str(raised.value) and str(delta) in str(raised.value)
    deeper = save_model(make_model(tiny_config("llama", num_hidden_layers=3)), tmp_path / "deeper")
    with pytest.raises(WrongBaseError, match=naming(delta, deeper, "tensors")):
        load(delta, base_model=str(deeper))
    wider = save_model(make_model(tiny_config("llama", intermediate_size=160)), tmp_path / "wider")
    with pytest.raises((WrongBaseError, DeltaFormatError)) as raised:
        load(delta, base_model=str(wider))
    assert str(wider) in str(raised.value) or "mlp" in str(raised.value)


def test_damaged_delta_file(broken: tuple[Path, Path]) -> None:
    path = broken[1] / "delta_model.safetensors"
    whole = path.read_bytes()
    rewrite(path, whole[:-100])
    with pytest.raises(DeltaFormatError, match=naming(path, "safetensors")):
        load(broken[1])
    for position in (len(whole) // 2, len(whole) - 50):
        rewrite(path, whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(DeltaFormatError, match=naming(path, "CRC-32")):
            load(broken[1])
    path.unlink()
    with pytest.raises(CheckpointError, match=naming(broken[1], "delta_model.safetensors")):
        load(broken[1])


def test_newer_format_version(broken: tuple[Path, Path]) -> None:
    edit_json(broken[1] / "config.json", format_version=99)
    with pytest.raises(ValueError, match=naming("format version 99", "impart-hf")):
        load(broken[1])


def test_not_a_delta_repository(tiny_pair: Pair) -> None:
    with pytest.raises((ValueError, OSError), match="text_config|delta repository"):
        DeltaCompressedForCausalLM.from_pretrained(tiny_pair.base)


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


@pytest.mark.process
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
