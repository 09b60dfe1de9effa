"""The sensitivity of weights, streamed a layer at a time, against the whole model and against real noise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.loaded_models import captured_log
from support.tiny_models import make_model, save_model, tiny_config
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.pytorch_utils import Conv1D

from impart_hf.calibration import sensitivity
from impart_hf.calibration.sensitivity import sensitivities
from impart_hf.compression.budgets import error_weights
from impart_hf.compression.scan import TensorPlan
from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.modeling.model_files import HubOptions

CPU = torch.device("cpu")
TOKENS = torch.randint(4, 320, (4, 40), generator=torch.Generator().manual_seed(0))
GPT2 = dict(vocab_size=320, n_layer=2, n_head=4, n_embd=64, n_positions=64, initializer_range=0.15)


@pytest.fixture(scope="module", params=["llama", "llama-tied", "gemma2", "qwen2", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = GPT2Config(**GPT2) if request.param == "gpt2" else tiny_config(request.param)
    return save_model(make_model(config), tmp_path_factory.mktemp(request.param) / "model")


def opened(folder: Path) -> Checkpoint:
    return Checkpoint(str(folder), HubOptions())


def of_whole_model(folder: Path) -> dict[str, float]:
    """Return sensitivities from one backward pass through the whole model for each sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    linear = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and "lm_head" not in name
    }
    sums = dict.fromkeys(linear, 0.0)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in linear.items():
        module.register_forward_hook(lambda _, given, out, name=name: seen.update({name: (given[0], out)}))
    generator = torch.Generator().manual_seed(0)
    for tokens in TOKENS:
        states = model.get_input_embeddings()(tokens[None]).detach().requires_grad_()
        logs = model(inputs_embeds=states, use_cache=False).logits[0].log_softmax(-1)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        gradients = torch.autograd.grad(logs.gather(1, drawn).sum(), [out for _, out in seen.values()])
        for (name, (given, _)), gradient in zip(seen.items(), gradients, strict=True):
            sums[name] += (given.square().sum(-1) * gradient.square().sum(-1)).sum().item()
    return {name: 0.5 * total / TOKENS.numel() / linear[name].weight.numel() for name, total in sums.items()}


def test_is_that_of_the_whole_model(folder: Path) -> None:
    found, expected = sensitivities(opened(folder), TOKENS, CPU), of_whole_model(folder)
    assert len(found) == len(expected) > 10 or "gpt2" in str(folder)
    for name, value in expected.items():
        key = name if name in found else name.removeprefix("transformer.")
        assert found[key] == pytest.approx(value, rel=1e-3), name


def test_foretells_what_noise_does(tmp_path: Path) -> None:
    """In the last layer an error in one token's output does nothing through others: the forecast is the expectation."""
    folder = save_model(make_model(tiny_config("llama")), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    layer = model.model.layers[-1].mlp.down_proj
    name = f"model.layers.{len(model.model.layers) - 1}.mlp.down_proj.weight"
    exact, generator, rises = layer.weight.data.clone(), torch.Generator().manual_seed(1), []
    with torch.no_grad():
        before = model(TOKENS).logits.log_softmax(-1)
        for _ in range(40):
            noise = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
            noise *= 0.01 * exact.norm() / noise.norm()
            layer.weight.data = exact + noise
            after = model(TOKENS).logits.log_softmax(-1)
            rises.append(((before.exp() * (before - after)).sum(-1).mean() / noise.norm() ** 2).item())
    found = sensitivities(opened(folder), TOKENS, CPU)[name]
    assert found == pytest.approx(sum(rises) / len(rises), rel=0.25)  # a token is drawn once: 160 draws


def test_a_little_text_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(make_model(tiny_config("llama")), tmp_path / "model")
    monkeypatch.setattr(sensitivity, "_LENGTH", 20)
    monkeypatch.setattr(sensitivity, "_TOKENS", 40)
    assert sensitivities(opened(folder), TOKENS, CPU) == sensitivities(opened(folder), TOKENS[:2, :20], CPU)


def test_layers_that_cannot_be_run_alone_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(make_model(tiny_config("llama")), tmp_path / "model")

    def refuse(*_: object) -> None:
        raise ValueError("calibration is not available for models of type 'llama': no")

    monkeypatch.setattr(sensitivity.StreamedModel, "check_run", refuse)
    with captured_log() as messages:
        assert sensitivities(opened(folder), TOKENS, CPU) == {}
    assert "all matrices count alike" in "".join(messages)


def plan(name: str, shape: tuple[int, ...], vocabulary: bool = False) -> TensorPlan:
    return TensorPlan(name=name, shape=shape, dtype=torch.float32, kind="encoded", vocabulary=vocabulary)


def test_weights_are_relative_to_their_mean_and_bounded() -> None:
    tensors = [plan("a", (4, 4)), plan("b", (4, 8)), plan("unknown", (4, 4)), plan("tokens", (9, 4), vocabulary=True)]
    weights = error_weights(tensors, {"a": 8.0, "b": 1.0, "tokens": 5.0, "elsewhere": 1.0})
    assert weights.keys() == {"a", "b"}
    assert weights["a"] / weights["b"] == pytest.approx(8.0)
    assert 16 * math.log(weights["a"]) + 32 * math.log(weights["b"]) == pytest.approx(0.0)
    assert error_weights(tensors, {}) == {}
    assert max(error_weights(tensors, {"a": 1e30, "b": 1.0}).values()) == 1000.0
