"""Adapters where a fine-tune is asked for: compress and merge take them, other commands name them."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from support.adapters import lora, merged, save_adapter
from support.loaded_models import captured_log
from support.messages import naming
from support.tiny_models import VOCABULARY, edit_json, load_tensors, make_model, save_model, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from impart_hf import ImPartQtConfig, LowRankConfig, compress, merge
from impart_hf.cli.main import main
from impart_hf.common.progress import Progress
from impart_hf.compression.pair import ModelPair
from impart_hf.modeling.model_files import HubOptions

TEXT = Path(str(textwrap.__file__)).read_text("utf-8")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` with a generation config, `adapter` on it, and `merged` by PEFT; not to be written to."""
    folder = tmp_path_factory.mktemp("adapters")
    model = make_model(tiny_config("llama"), dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=[2, 3], do_sample=False)
    base = save_model(model, folder / "base")
    adapter = save_adapter(base, lora(modules_to_save=["lm_head"]), folder / "adapter")
    tiny_tokenizer().save_pretrained(merged(base, adapter, folder / "merged"))
    return folder


def test_compressing_an_adapter_is_compressing_its_merge(family: Path, tmp_path: Path) -> None:
    for name in ("adapter", "merged"):
        compress(
            str(family / "base"), str(family / name), tmp_path / name, ImPartQtConfig(compression_ratio=4),
            calibration=[TEXT], calibration_samples=4, calibration_length=32,
        )  # fmt: skip
    ours, theirs = (tmp_path / name / "delta_model.safetensors" for name in ("adapter", "merged"))
    assert ours.read_bytes() == theirs.read_bytes()
    loaded, wanted = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("adapter", "merged"))
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in wanted.state_dict().items())
    assert not list((tmp_path / "adapter").glob("adapter_*"))
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").get_vocab() == tiny_tokenizer().get_vocab()
    assert GenerationConfig.from_pretrained(tmp_path / "adapter").eos_token_id == [2, 3]
    assert "adapter" in (tmp_path / "adapter" / "README.md").read_text("utf-8")


def test_merging_an_adapter_is_merging_its_merge(family: Path, tmp_path: Path) -> None:
    for name in ("adapter", "merged"):
        models = [{"model": str(family / name), "parameters": {"weight": 0.5, "density": 0.6}}]
        merge({"merge_method": "ties", "base_model": str(family / "base"), "models": models}, tmp_path / name)
    ours, theirs = load_tensors(tmp_path / "adapter"), load_tensors(tmp_path / "merged")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert (tmp_path / "adapter" / "tokenizer.json").exists() and (
        tmp_path / "adapter" / "generation_config.json"
    ).exists()


def test_an_adapter_on_another_fine_tune(family: Path, tmp_path: Path) -> None:
    """mergekit's MODEL+ADAPTER."""
    second = save_adapter(family / "merged", lora(), tmp_path / "second", seed=9)
    merged(family / "merged", second, tmp_path / "both")
    for name, model in (("one", f"{family / 'merged'}+{second}"), ("two", str(tmp_path / "both"))):
        content = {"merge_method": "task_arithmetic", "base_model": str(family / "base"), "models": [{"model": model}]}
        merge(content, tmp_path / name)
    ours, theirs = load_tensors(tmp_path / "one"), load_tensors(tmp_path / "two")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    card = (tmp_path / "one" / "README.md").read_text("utf-8")
    assert "merged+second" in card and str(tmp_path) not in card
    for model, names in (
        (f"{family / 'adapter'}+{second}", "adapter"),
        (f"{family / 'merged'}+{family / 'base'}", "base"),
    ):
        content = {"merge_method": "task_arithmetic", "base_model": str(family / "base"), "models": [{"model": model}]}
        with pytest.raises(OSError, match=naming(family / names, "adapter")):
            merge(content, tmp_path / "no")


def test_the_tokenizer_is_the_adapters_if_it_has_one(family: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family / "base")
    tokenizer.add_tokens(["<tool>"])
    adapter = save_adapter(family / "base", lora(), tmp_path / "adapter", tokens=VOCABULARY + 1)
    tokenizer.save_pretrained(adapter)
    compress(str(family / "base"), str(adapter), tmp_path / "delta", LowRankConfig(compression_ratio=2))
    found = AutoTokenizer.from_pretrained(tmp_path / "delta")
    assert found.convert_tokens_to_ids("<tool>") == len(tiny_tokenizer())
    assert GenerationConfig.from_pretrained(tmp_path / "delta").eos_token_id == [2, 3]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    assert model.get_input_embeddings().num_embeddings == VOCABULARY + 1
    models = [{"model": str(adapter)}]
    merge({"merge_method": "ties", "base_model": str(family / "base"), "models": models}, tmp_path / "merged")
    assert "<tool>" in AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()
    assert load_tensors(tmp_path / "merged")["lm_head.weight"].shape[0] == VOCABULARY + 1


def test_the_pair_loads_base_and_adapter(family: Path) -> None:
    """Whatever base the adapter's own configuration names."""
    pair = ModelPair(
        str(family / "base"), str(family / "adapter"), HubOptions(), HubOptions(),
        device=torch.device("cpu"), progress=Progress(False),
    )  # fmt: skip
    wanted = AutoModelForCausalLM.from_pretrained(family / "merged").state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in pair.load().state_dict().items())


@pytest.mark.parametrize(
    "command",
    [
        ["compress", "ADAPTER", "BASE", "OUT"],
        ["evaluate", "ADAPTER", "--text", "TEXT"],
        ["verify", "ADAPTER"],
        ["prune", "importance", "ADAPTER", "--output", "OUT", "--data", "TEXT"],
        ["prune", "layers", "ADAPTER", "OUT", "--drop", "1"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_other_commands_say_that_it_is_an_adapter(
    family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    places = {
        "ADAPTER": family / "adapter",
        "BASE": family / "base",
        "OUT": tmp_path / "out",
        "TEXT": tmp_path / "text.txt",
    }
    assert main([str(places.get(word, word)) for word in command]) != 0
    error = capsys.readouterr().err
    assert f"'{family / 'adapter'}' is an adapter" in error and "merge_and_unload" in error
    assert not (tmp_path / "out").exists()


def test_an_adapter_beside_a_base_is_not_passed_over(family: Path, tmp_path: Path) -> None:
    both = shutil.copytree(family / "base", tmp_path / "both")
    save_adapter(family / "base", lora(), both)
    content = {"merge_method": "ties", "base_model": str(both), "models": [{"model": str(family / "merged")}]}
    for attempt in (
        lambda: compress(str(both), str(family / "merged"), tmp_path / "out"),
        lambda: merge(content, tmp_path / "out"),
    ):
        with pytest.raises(OSError, match=naming(both, "adapter_config.json", "merge_and_unload")):
            attempt()
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_the_adapter(family: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(family / "adapter", tmp_path / "adapter")
    models = [{"model": f"{family / 'merged'}+{adapter}"}]
    with pytest.raises(OSError, match=naming(adapter)):
        merge({"merge_method": "ties", "base_model": str(family / "base"), "models": models}, adapter)


@pytest.mark.parametrize("name", ["checkpoint-10", "adapter"])
def test_an_adapter_in_a_subfolder(family: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(family / "adapter", tmp_path / "run" / name)
    with pytest.raises(OSError, match=naming("config.json", tmp_path / "run" / name)):
        compress(str(family / "base"), str(tmp_path / "run"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_a_delta_repository(family: Path, tmp_path: Path) -> None:
    """On the base alone it would be another model."""
    compress(str(family / "base"), str(family / "merged"), tmp_path / "delta", LowRankConfig(compression_ratio=3))
    adapter = save_adapter(tmp_path / "delta", lora(target_modules=["q_proj"]), tmp_path / "adapter")
    models = [{"model": str(adapter)}]
    for attempt in (
        lambda: compress(str(family / "base"), str(adapter), tmp_path / "out"),
        lambda: merge({"merge_method": "ties", "base_model": str(family / "base"), "models": models}, tmp_path / "out"),
    ):
        with pytest.raises(OSError, match=naming(adapter, tmp_path / "delta", "merge_and_unload")):
            attempt()
    assert not (tmp_path / "out").exists()


OTHER_NAMES = {
    "another model": ("owner/other", None, True),
    "another folder": ("/models/other", None, True),
    "the base before it was renamed": ("owner/Tiny", "owner/tiny", False),
    "the base elsewhere": ("/models/base", None, False),
    "in the Hub's cache": ("/hub/models--owner--base/snapshots/0123abc", None, False),
    "nothing": (None, None, False),
}


@pytest.mark.parametrize("case", OTHER_NAMES)
def test_an_adapter_that_names_another_base(family: Path, tmp_path: Path, case: str) -> None:
    named, original, warns = OTHER_NAMES[case]
    base = shutil.copytree(family / "base", tmp_path / "base")
    adapter = shutil.copytree(family / "adapter", tmp_path / "adapter")
    edit_json(base / "config.json", _name_or_path=original)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=named)
    with captured_log() as lines:
        compress(str(base), str(adapter), tmp_path / "out", LowRankConfig(compression_ratio=2))
    found = [line for line in lines if "as its base" in line]
    assert bool(found) == warns
    assert all(re.search(naming(adapter, named, base), line) for line in found)


def test_without_peft(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "peft" or name.startswith("peft.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=naming(family / "adapter", "PEFT", "impart-hf[lora]")):
        compress(str(family / "base"), str(family / "adapter"), tmp_path / "out")


def test_an_adapter_of_another_kind_names_itself(family: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(family / "adapter", tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", peft_type="PREFIX_TUNING")
    with pytest.raises(OSError, match=naming(adapter, "PREFIX_TUNING", "merge_and_unload")):
        compress(str(family / "base"), str(adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()
