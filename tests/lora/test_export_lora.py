"""A delta as a LoRA adapter, checked with PEFT and served by vLLM."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from support.forged_files import forge
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

from impart_hf import ExactConfig, ImPartConfig, ImPartRdConfig
from impart_hf.calibration.text import calibration_tokens, load_tokenizer
from impart_hf.cli.main import main
from impart_hf.common.files import OutputError
from impart_hf.evaluation.metrics import evaluate
from impart_hf.lora.export import ADAPTER_FILE, export_lora
from impart_hf.lora.factors import ranks_for
from impart_hf.lora.report import LoraReport
from impart_hf.modeling.delta_repository import WrongBaseError
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.open import open_repository

IDS = torch.arange(5, 45).view(2, 20)
UP = "model.layers.0.mlp.up_proj.weight"
LINEAR = 14  # of two layers


def is_linear(name: str) -> bool:
    return "_proj" in name


def save_repository(
    folder: Path,
    only: Any = lambda name: True,
    method: Any = None,
    added: int = 0,
    kind: str = "llama",
    **changes: Any,
) -> Path:
    """A float32 model's delta on the parameters that `only` names."""
    base = make_model(tiny_config(kind, **({**HEADS, **changes} if kind == "llama" else changes)), dtype=torch.float32)
    tuned = fine_tune(base, only=only)
    if added:
        tuned.resize_token_embeddings(VOCABULARY + added)
    pair = Pair(save_model(base, folder / "base"), save_model(tuned, folder / "finetuned"))
    return delta_of(pair, folder / "delta", method)


def export(repository: Path, output: Path, rank: int, **options: Any) -> LoraReport:
    return export_lora(open_repository(str(repository), HubOptions()), output, rank, **options)


def is_adaptable_by_name(name: str) -> bool:
    """Whether a parameter is a matrix of linear layers, experts, embeddings or output projection, but no router."""
    return "bias" not in name and ("_proj" in name or "embed_tokens" in name or "lm_head" in name)


def with_adapter(repository: Path, adapter: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(repository.parent / "base")
    return PeftModel.from_pretrained(base, adapter).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "method", [None, ImPartConfig(compression_ratio=4), ExactConfig()], ids=["lowrank", "impart", "exact"]
)
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
    changed, added = {}, {}
    for name in opened.names():
        base, tuned = opened.base_tensor(name).double(), opened.tensor(name).double()
        changed[name] = float((tuned[: len(base)] - base).square().sum())
        added[name] = float(tuned[len(base) :].square().sum())
    assert any(added.values())
    lacking = {name: added[name] + (0 if is_adaptable_by_name(name) else changed[name]) for name in report.left_out}
    for name, norm in report.left_out.items():
        assert norm == pytest.approx(lacking[name] ** 0.5, rel=1e-4)
    share = sum(lacking.values()) / (sum(changed.values()) + sum(added.values()))
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
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}
    assert set(config["target_modules"]) == kinds
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (16, 16, "CAUSAL_LM")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and "| rank | 16 |" in card


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma3", {}),  # scales what its embeddings give
        ("mixtral", {}),  # experts one by one in the files
        ("qwen2-moe", {}),
        ("gpt-oss", {}),  # experts transposed
    ],
    ids=["untied", "tied", "scaled", "mixtral", "qwen2-moe", "gpt-oss"],
)
def test_embeddings_and_experts(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    repository = save_repository(tmp_path, is_adaptable_by_name, kind=kind, **changes)
    report = export(repository, tmp_path / "adapter", 128)
    assert report.left_out == {} and report.relative_error < 1e-5
    names = " ".join(matrix.name for matrix in report.matrices)
    assert "embed_tokens" in names and ("experts" in names) == (kind not in ("llama", "gemma3"))
    tuned = logits(AutoModelForCausalLM.from_pretrained(repository))
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), tuned, atol=0.1)
    adapted = with_adapter(repository, tmp_path / "adapter")
    assert torch.allclose(logits(adapted), tuned, atol=2e-4)
    if not changes.get("tie_word_embeddings") and kind != "gemma3":  # PEFT would add to a tied weight twice
        assert torch.allclose(logits(adapted.merge_and_unload()), tuned, atol=2e-4)


def test_vision_tower(tmp_path: Path) -> None:
    """PEFT adapts an attention of torch's own only as a whole, so that it stays outside."""
    repository = save_repository(tmp_path, kind="gemma3-vision")
    report = export(repository, tmp_path / "adapter", 64)
    assert any("vision_tower" in matrix.name for matrix in report.matrices)
    assert any("head.attention" in name for name in report.left_out)
    assert with_adapter(repository, tmp_path / "adapter") is not None


def test_parts(tmp_path: Path) -> None:
    repository = save_repository(tmp_path)
    report = export(repository, tmp_path / "adapter", 8, parts=["linear"])
    assert len(report.matrices) == LINEAR and {"model.embed_tokens.weight", "lm_head.weight"} < report.left_out.keys()


class TestBudget:
    def test_each_matrix_has_the_rank_that_it_is_worth(self, tmp_path: Path) -> None:
        repository = save_repository(tmp_path, is_adaptable_by_name)
        even = export(repository, tmp_path / "even", 8)
        budget = export(repository, tmp_path / "budget", 64, max_bytes=even.adapter_bytes)
        assert budget.adapter_bytes <= even.adapter_bytes
        ranks = {matrix.name: matrix.rank for matrix in budget.matrices}
        assert len(set(ranks.values())) > 1 and budget.rank == max(ranks.values())
        config = json.loads((tmp_path / "budget" / "adapter_config.json").read_text())
        assert (
            config["rank_pattern"]
            == config["alpha_pattern"]
            == {n.removesuffix(".weight"): r for n, r in ranks.items()}
        )
        stored = load_tensors(tmp_path / "budget")
        for name, rank in ranks.items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            a = stored[f"{module}.lora_embedding_A" if "embed_tokens" in name else f"{module}.lora_A.weight"]
            assert len(a) == rank
        adapted, low = (with_adapter(repository, tmp_path / name) for name in ("budget", "even"))
        assert torch.isfinite(logits(adapted)).all() and not torch.equal(logits(adapted), logits(low))
        assert not list((tmp_path / "budget").glob(".*"))

    def test_kept_components_are_worth_more_than_dropped_ones(self) -> None:
        choose = np.random.default_rng(0)
        worth = [np.sort(choose.exponential(size=count) * scale)[::-1] for count, scale in ((9, 1), (4, 50), (30, 0.1))]
        worth.append(np.zeros(3))
        sizes = [10, 300, 7, 5]
        for most in (0, 9, 100, 700, 10**6):
            ranks = ranks_for(worth, sizes, most)
            used = sum(rank * size for rank, size in zip(ranks, sizes, strict=True))
            assert used <= most and ranks[3] == 0
            kept = [part[rank - 1] / size for part, rank, size in zip(worth, ranks, sizes, strict=True) if rank]
            dropped = [
                part[rank] / size for part, rank, size in zip(worth, ranks, sizes, strict=True) if rank < len(part)
            ]
            assert not kept or min(kept) >= max(dropped)
            assert most - used < max(sizes) or ranks == [9, 4, 30, 0]

    def test_whole(self, tmp_path: Path) -> None:
        repository = save_repository(tmp_path, is_adaptable_by_name)
        report = export(repository, tmp_path / "adapter", 64, max_bytes="1GB")
        assert report.relative_error < 1e-5
        tuned = logits(AutoModelForCausalLM.from_pretrained(repository))
        assert torch.allclose(logits(with_adapter(repository, tmp_path / "adapter")), tuned, atol=2e-4)

    @pytest.mark.parametrize("kind, size", [("mixtral", "60KB"), ("gemma3", "60KB"), ("qwen2-moe", "25KB")])
    def test_experts_and_tied_embeddings(self, kind: str, size: str, tmp_path: Path) -> None:
        """Some parameters are left out, and PEFT loads what remains as it is in the file."""
        repository = save_repository(tmp_path, is_adaptable_by_name, kind=kind)
        report = export(repository, tmp_path / "adapter", 64, max_bytes=size)
        assert len({matrix.rank for matrix in report.matrices}) > 1
        adapted = with_adapter(repository, tmp_path / "adapter")
        state, stored = get_peft_model_state_dict(adapted), load_tensors(tmp_path / "adapter")
        assert state.keys() >= stored.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
        base = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
        tuned = logits(AutoModelForCausalLM.from_pretrained(repository))
        assert (logits(adapted) - tuned).norm() < (base - tuned).norm()

    def test_too_small(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=naming("max_bytes", 100)):
            export(save_repository(tmp_path), tmp_path / "adapter", 8, max_bytes=100)
        assert not (tmp_path / "adapter").exists()


def test_delta_of_bounded_rank_is_its_adapter(tmp_path: Path) -> None:
    method = ImPartRdConfig(compression_ratio=6, max_rank=12)
    repository = save_repository(tmp_path, is_linear, method)
    report = export(repository, tmp_path / "adapter", 12)
    assert report.relative_error < 1e-5
    tuned = logits(AutoModelForCausalLM.from_pretrained(repository))
    assert torch.allclose(logits(with_adapter(repository, tmp_path / "adapter")), tuned, atol=2e-4)
    unbounded = delta_of(
        Pair(tmp_path / "base", tmp_path / "finetuned"), tmp_path / "unbounded", replace(method, max_rank=None)
    )
    assert export(unbounded, tmp_path / "cut", 12).relative_error > 0.01


class TestValidation:
    def test_is_the_divergence_of_the_loaded_models(self, tmp_path: Path) -> None:
        repository = save_repository(tmp_path)
        text = tmp_path / "text.txt"
        text.write_text("A delta holds what fine-tuning changed. " * 40)
        whole = export(repository, tmp_path / "whole", 64, validation=str(text), samples=4, length=32)
        low = export(repository, tmp_path / "low", 2, validation=str(text), samples=4, length=32)
        assert whole.validation and low.validation
        assert 0 < whole.validation.kl < low.validation.kl < low.validation.base_kl
        assert whole.validation.base_kl == pytest.approx(low.validation.base_kl)
        blocks = calibration_tokens(str(text), load_tokenizer(str(repository), HubOptions()), samples=4, length=32)
        tuned = AutoModelForCausalLM.from_pretrained(repository).eval()
        adapted: Any = with_adapter(repository, tmp_path / "low")
        assert low.validation.kl == pytest.approx(evaluate(adapted.get_base_model(), tuned, blocks, 4)[1], rel=1e-3)
        assert f"{low.validation.kl:.3g}" in (tmp_path / "low" / "README.md").read_text()

    def test_text_is_read_before_any_work(self, tmp_path: Path) -> None:
        repository = save_repository(tmp_path)
        with pytest.raises(FileNotFoundError, match=naming(tmp_path / "none.txt")):
            export(repository, tmp_path / "adapter", 2, validation=str(tmp_path / "none.txt"))
        assert not (tmp_path / "adapter").exists()


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
        with pytest.raises(ValueError, match=naming(repository, "linear", "nothing to export")):
            export(repository, tmp_path / "adapter", 4)
        assert not (tmp_path / "adapter").exists()

    def test_nothing_but_zeros(self, tmp_path: Path) -> None:
        """A tensor that is stored, but equals the base's, is an adapter that does nothing."""
        repository = save_repository(tmp_path, lambda name: name == UP)
        before = load_tensors(tmp_path / "base")[UP]
        forge(repository, lambda entries: entries.update({UP: ("F32", list(before.shape), before.numpy().tobytes())}))
        report = export(repository, tmp_path / "adapter", 4)
        assert report.relative_error == report.left_out_share == 0
        with pytest.raises(ValueError, match=naming("nothing to export")):
            export(repository, tmp_path / "other", 4, max_bytes="1MB")

    @pytest.mark.parametrize(
        ("change", "named"),
        [({"rope_theta": 5e5}, "rope_parameters"), ({"rms_norm_eps": 1e-3}, "rms_norm_eps")],
        ids=["rope", "eps"],
    )
    def test_more_than_weights_differ(self, change: dict[str, Any], named: str, tmp_path: Path) -> None:
        repository = save_repository(tmp_path, is_linear)

        def edit(config: dict[str, Any]) -> None:
            own = config["text_config"]
            (own["rope_parameters"] if "rope_theta" in change else own).update(change)

        content = json.loads((repository / "config.json").read_text())
        edit(content)
        (repository / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=naming(named, "adapter")):
            export(repository, tmp_path / "adapter", 4)

    def test_tied_only_in_the_fine_tune(self, tmp_path: Path) -> None:
        base = make_model(tiny_config("llama", **HEADS), dtype=torch.float32)
        tied = make_model(tiny_config("llama-tied", **HEADS), dtype=torch.float32)
        tied.load_state_dict(fine_tune(base).state_dict(), strict=False)
        tied.tie_weights()
        pair = Pair(save_model(base, tmp_path / "base"), save_model(tied, tmp_path / "finetuned"))
        with pytest.raises(ValueError, match=naming("ties its output projection", "adapter")):
            export(delta_of(pair, tmp_path / "delta"), tmp_path / "adapter", 4)

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
    assert re.search(naming("rank 4", f"{LINEAR + 2} matrices"), said) and re.search(r"error 0\.", said)
    assert "5 changed tensors" in said
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
