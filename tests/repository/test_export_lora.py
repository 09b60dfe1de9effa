"""A delta as a LoRA adapter, checked with PEFT and served by vLLM."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.messages import naming
from support.tiny_models import (
    VOCABULARY,
    Pair,
    edit_tensors,
    fine_tune,
    load_tensors,
    make_model,
    save_model,
    tiny_config,
)
from support.vllm_engines import HEADS, PROMPTS, EngineProcess, delta_of, greedy_tokens
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from impart_hf import ImPartConfig
from impart_hf.cli.main import main
from impart_hf.common.files import OutputError
from impart_hf.modeling.delta_repository import WrongBaseError
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.lora_export import ADAPTER_FILE, LoraReport, export_lora
from impart_hf.repository.open import open_repository

IDS = torch.arange(5, 45).view(2, 20)
UP = "model.layers.0.mlp.up_proj.weight"
LINEAR = 14  # of two layers


def is_linear(name: str) -> bool:
    return "_proj" in name


def save_repository(folder: Path, only: Any = lambda name: True, method: Any = None, added: int = 0) -> Path:
    """A float32 LLaMA's delta on the parameters that `only` names."""
    base = make_model(tiny_config("llama", **HEADS), dtype=torch.float32)
    tuned = fine_tune(base, only=only)
    if added:
        tuned.resize_token_embeddings(VOCABULARY + added)
    pair = Pair(save_model(base, folder / "base"), save_model(tuned, folder / "finetuned"))
    return delta_of(pair, folder / "delta", method)


def export(repository: Path, output: Path, rank: int) -> LoraReport:
    return export_lora(open_repository(str(repository), HubOptions()), output, rank)


def with_adapter(repository: Path, adapter: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(repository.parent / "base")
    return PeftModel.from_pretrained(base, adapter).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("method", [None, ImPartConfig(compression_ratio=4)], ids=["lowrank", "impart"])
def test_whole_rank_is_the_fine_tune(method: Any, tmp_path: Path) -> None:
    repository = save_repository(tmp_path, is_linear, method)
    report = export(repository, tmp_path / "adapter", 128)

    adapted, tuned = (
        logits(with_adapter(repository, tmp_path / "adapter")),
        logits(AutoModelForCausalLM.from_pretrained(repository)),
    )
    assert torch.allclose(adapted, tuned, atol=2e-4)
    assert not torch.allclose(adapted, logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), atol=0.1)
    assert report.left_out == {} and len(report.matrices) == LINEAR
    assert report.relative_error < 1e-5
    assert report.adapter_bytes < (tmp_path / "adapter" / ADAPTER_FILE).stat().st_size


@pytest.mark.parametrize(
    ("kind", "linear", "transposed"),
    [("gpt2", r"\.(c_attn|c_proj|c_fc)\.weight", True), ("gemma3-vision", r"^language_model.*_proj\.weight", False)],
)
def test_layers_of_another_class_and_of_other_names(kind: str, linear: str, transposed: bool, tmp_path: Path) -> None:
    """GPT-2's Conv1D holds its weight transposed; the files of Gemma 3 have other names than its modules."""
    base = make_model(tiny_config(kind), dtype=torch.float32)
    tuned = fine_tune(base, only=lambda name: is_adaptable(base, name))
    pair = Pair(save_model(base, tmp_path / "base"), save_model(tuned, tmp_path / "finetuned"))
    repository = delta_of(pair, tmp_path / "delta")
    report = export(repository, tmp_path / "adapter", 192)
    names = {name for name in load_tensors(pair.base) if re.search(linear, name)}
    assert names and {matrix.name for matrix in report.matrices} == names
    assert report.left_out == {} and report.relative_error < 1e-5
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == transposed
    adapted = logits(with_adapter(repository, tmp_path / "adapter"))
    assert torch.allclose(adapted, logits(AutoModelForCausalLM.from_pretrained(repository)), atol=2e-4)
    assert not torch.allclose(adapted, logits(AutoModelForCausalLM.from_pretrained(pair.base)), atol=0.1)


def is_adaptable(model: Any, name: str) -> bool:
    """Whether a parameter is the weight of a linear layer of the decoder."""
    module = model.get_submodule(name.rpartition(".")[0])
    is_linear = isinstance(module, torch.nn.Linear | Conv1D) and module is not model.get_output_embeddings()
    return is_linear and name.endswith(".weight") and "vision" not in name


def test_no_better_adapter_of_that_rank_exists(tmp_path: Path) -> None:
    repository = save_repository(tmp_path, is_linear)
    report = export(repository, tmp_path / "adapter", 3)
    opened = open_repository(str(repository), HubOptions())
    weights = load_tensors(tmp_path / "adapter")
    for matrix in report.matrices:
        delta = opened.tensor(matrix.name).double() - opened.base_tensor(matrix.name).double()
        sigma = torch.linalg.svdvals(delta)
        tail = float((sigma[3:] ** 2).sum().sqrt() / delta.norm())
        assert matrix.relative_error == pytest.approx(tail, rel=1e-3)
        assert matrix.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        a, b = (weights[f"base_model.model.{matrix.name[:-7]}.lora_{side}.weight"].double() for side in "AB")
        assert float((delta - b @ a).norm() / delta.norm()) == pytest.approx(tail, rel=1e-3)
    assert 0 < report.relative_error < 1
    assert torch.isfinite(logits(with_adapter(repository, tmp_path / "adapter"))).all()


def test_says_what_is_left_out(tmp_path: Path) -> None:
    repository = save_repository(tmp_path, added=3)
    report = export(repository, tmp_path / "adapter", 8)
    opened = open_repository(str(repository), HubOptions())
    assert report.left_out.keys() == {name for name in opened.names() if not is_linear(name)}
    squares = {}
    for name in opened.names():
        base, tuned = opened.base_tensor(name).double(), opened.tensor(name).double()
        squares[name] = float((tuned[: len(base)] - base).square().sum() + tuned[len(base) :].square().sum())
    for name, norm in report.left_out.items():
        assert norm == pytest.approx(squares[name] ** 0.5, rel=1e-4)
    share = sum(squares[name] for name in report.left_out) / sum(squares.values())
    assert report.left_out_share == pytest.approx(share, rel=1e-4)


def test_layers_that_did_not_change_have_no_adapter(tmp_path: Path) -> None:
    repository = save_repository(tmp_path, lambda name: name == UP)
    report = export(repository, tmp_path / "adapter", 64)
    assert [matrix.name for matrix in report.matrices] == [UP]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == [UP.removesuffix(".weight")]
    tuned = logits(AutoModelForCausalLM.from_pretrained(repository))
    assert torch.allclose(logits(with_adapter(repository, tmp_path / "adapter")), tuned, atol=2e-4)


def test_configuration_and_card(tmp_path: Path) -> None:
    repository = save_repository(tmp_path)
    export(repository, tmp_path / "adapter", 16)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(config["target_modules"]) == kinds
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (16, 16, "CAUSAL_LM")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and "16 singular components" in card


class TestRefused:
    def test_rank(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=naming("rank", 65536, 0)):
            export(save_repository(tmp_path), tmp_path / "adapter", 0)

    def test_folder_that_is_not_free(self, tmp_path: Path) -> None:
        repository = save_repository(tmp_path)
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "mine").touch()
        with pytest.raises(OutputError, match=naming(tmp_path / "adapter")):
            export(repository, tmp_path / "adapter", 4)

    def test_nothing_to_export(self, tmp_path: Path) -> None:
        repository = save_repository(tmp_path, lambda name: "norm" in name)
        with pytest.raises(ValueError, match=naming("linear layer", repository)):
            export(repository, tmp_path / "adapter", 4)
        assert not (tmp_path / "adapter").exists()

    def test_other_base(self, tmp_path: Path) -> None:
        repository = save_repository(tmp_path)
        edit_tensors(tmp_path / "base", lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(2))
        before = sorted(tmp_path.iterdir())
        with pytest.raises(WrongBaseError, match=naming("model.layers.1.mlp.up_proj")):
            export(repository, tmp_path / "adapter", 4)
        assert sorted(tmp_path.iterdir()) == before


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = save_repository(tmp_path)
    assert main(["export-lora", str(repository), str(tmp_path / "one"), "--rank", "4", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert re.search(naming("rank 4", f"{LINEAR} matrices"), said) and re.search(r"error 0\.", said)
    assert "7 changed tensors" in said
    assert main(["export-lora", str(repository), str(tmp_path / "two"), "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 64  # the largest that a matrix of this model has
    assert main(["export-lora", str(repository), str(tmp_path / "one"), "--quiet"]) == 1
    assert str(tmp_path / "one") in capsys.readouterr().err


@pytest.mark.vllm
def test_vllm_serves_the_adapter(tmp_path: Path) -> None:
    repository = save_repository(tmp_path)
    export(repository, tmp_path / "adapter", 64)
    expected = greedy_tokens(with_adapter(repository, tmp_path / "adapter"))
    base = greedy_tokens(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    with EngineProcess() as engine:
        engine.start(tmp_path / "base", enable_lora=True, max_lora_rank=64)
        assert engine.tokens() == base != expected
        assert engine.run(adapted_tokens, str(tmp_path / "adapter")) == expected


def adapted_tokens(holder: Any, adapter: str) -> list[list[int]]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    outputs = holder.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
        use_tqdm=False,
        lora_request=LoRARequest("delta", 1, adapter),
    )
    return [list(output.outputs[0].token_ids) for output in outputs]
