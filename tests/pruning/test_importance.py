"""Importance: scores and masks equal a direct computation with autograd."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.messages import naming
from support.pruned_models import FAMILIES, KEPT, dense_config
from support.tiny_models import fine_tune, make_model, save_model, tiny_config, tiny_tokenizer
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import impart_hf  # noqa: F401  # registers the pruned model's classes
from impart_hf.calibration.text import calibration_tokens
from impart_hf.modeling.configuration_pruned import PrunedLlamaConfig
from impart_hf.pruning import importance_plot
from impart_hf.pruning.checks import open_decoder
from impart_hf.pruning.decoder_shape import DecoderShape
from impart_hf.pruning.gradient_sums import MatrixSums
from impart_hf.pruning.importance import compute_importance
from impart_hf.pruning.importance_report import Importance

pytest.importorskip("peft")
pytest.importorskip("accelerate")

from impart_hf.pruning.lora import add_lora

pytestmark = pytest.mark.xdist_group("importance")

TEXTS = [f"{n} is the number, {n * n} is its square, and {n} texts come before this one. " * 2 for n in range(60)]
SETTINGS: dict[str, Any] = {"steps": 7, "batch_size": 2, "length": 24, "device": "cpu", "progress": False}
TWO_LAYERS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {"max_window_layers": 1},
}
RATE = 1e-2  # large, so that a step that went otherwise would show


def save(folder: Path, config: Any, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model with this configuration, its biases and norms random too."""
    return save_model(fine_tune(make_model(config, dtype=dtype)), folder)


def pruned_config() -> PrunedLlamaConfig:
    """Two layers of different widths, the first narrower than the global ones, with GQA."""
    return PrunedLlamaConfig.with_widths(
        tiny_config("llama"), num_attention_heads=[2, 4], num_key_value_heads=[1, 2], intermediate_size=[48, 128]
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "tiny", tiny_config("llama"))


@pytest.fixture(scope="module")
def report(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    folder = tmp_path_factory.mktemp("report") / "importance"
    compute_importance(str(model), folder, TEXTS, **SETTINGS, learning_rate=RATE)
    return folder


class DirectLora(nn.Module):
    """W x + bias + s B A x, written out."""

    def __init__(self, linear: nn.Linear, a: torch.Tensor, b: torch.Tensor, scale: float):
        super().__init__()
        self.linear, self.scale = linear, scale
        self.a, self.b = (nn.Parameter(start.detach().clone()) for start in (a, b))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs) + self.scale * inputs @ self.a.t() @ self.b.t()


def direct_gradients(
    folder: Path, *, steps: int, batch_size: int, length: int, rank: int, seed: int, **_: Any
) -> dict[tuple[int, str], list[torch.Tensor]]:
    """G of every step for every matrix, dense and in float64, by a loop of our own."""
    shape = open_decoder(str(folder))[1]
    # eager: sdpa leaves out what Gemma 2 does to the scores of attention
    load = partial(AutoModelForCausalLM.from_pretrained, folder, dtype=torch.float32, attn_implementation="eager")
    lora = add_lora(load(), shape, rank, 32, seed)
    starts = {name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in lora_modules(lora, shape)}
    plain = load().requires_grad_(False)
    ours = {}
    for layer, decoder in enumerate(plain.model.layers):
        for name in shape.linear_names:
            block, leaf = name.split(".")
            owner = getattr(decoder, block)
            ours[layer, name] = DirectLora(getattr(owner, leaf), *starts[layer, name], 32 / rank)
            setattr(owner, leaf, ours[layer, name])
    tokens = calibration_tokens(TEXTS, tiny_tokenizer(), samples=steps * batch_size, length=length, seed=seed)
    optimizer = torch.optim.AdamW([p for m in ours.values() for p in (m.a, m.b)], lr=RATE, weight_decay=0.0)
    gradients: dict[tuple[int, str], list[torch.Tensor]] = {key: [] for key in ours}
    for rows in batches(len(tokens), steps, batch_size, seed):
        logits = plain(input_ids=tokens[rows], use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[rows][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for key, module in ours.items():
            assert module.a.grad is not None and module.b.grad is not None
            gradients[key].append(module.b.grad.double() @ module.a.grad.double())
        optimizer.step()
    return gradients


def lora_modules(model: Any, shape: DecoderShape) -> Iterator[tuple[tuple[int, str], Any]]:
    for layer, decoder in enumerate(model.get_base_model().model.layers):
        for name in shape.linear_names:
            block, leaf = name.split(".")
            yield (layer, name), getattr(getattr(decoder, block), leaf)


def batches(sequences: int, steps: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """As the Trainer draws them: a new order every epoch, what is too little for a batch left out."""
    epoch = 0
    while steps > 0:
        order = torch.randperm(sequences, generator=torch.Generator().manual_seed(seed + epoch))
        for rows in order[: sequences // batch_size * batch_size].split(batch_size)[:steps]:
            steps -= 1
            yield rows
        epoch += 1


def norms(parts: Sequence[torch.Tensor]) -> float:
    return sum(part.norm().item() for part in parts)


def expected(gradients: dict[tuple[int, str], list[torch.Tensor]], layer: int, widths: Any) -> dict[str, Any]:
    """All scores of a layer, spelt out."""
    matrices = {name: of for (number, name), of in gradients.items() if number == layer}
    output, down = matrices["self_attn.o_proj"], matrices["mlp.down_proj"]
    steps, groups = len(output), widths.num_key_value_heads
    head_dim = output[0].shape[1] // widths.num_attention_heads
    if "self_attn.qkv_proj" in matrices:
        sizes = [widths.num_attention_heads * head_dim, groups * head_dim, groups * head_dim]
        query, key, value = zip(*(g.split(sizes) for g in matrices["self_attn.qkv_proj"]), strict=True)
        gate, up = zip(*(g.chunk(2) for g in matrices["mlp.gate_up_proj"]), strict=True)
    else:
        query, key, value = (matrices[f"self_attn.{name}_proj"] for name in "qkv")
        gate, up = matrices["mlp.gate_proj"], matrices["mlp.up_proj"]

    def rows(of: Sequence[torch.Tensor], unit: int, size: int) -> list[torch.Tensor]:
        return [g[unit * size : (unit + 1) * size] for g in of]

    def columns(of: list[torch.Tensor], unit: int, size: int) -> list[torch.Tensor]:
        return [g[:, unit * size : (unit + 1) * size] for g in of]

    heads = [(rows(query, h, head_dim), columns(output, h, head_dim)) for h in range(widths.num_attention_heads)]
    per_group = len(heads) // groups
    parts = {
        "heads": heads,
        "groups": [
            (rows(key, g, head_dim), rows(value, g, head_dim))
            + tuple(part for head in heads[g * per_group : (g + 1) * per_group] for part in head)
            for g in range(groups)
        ],
        "channels": [(rows(gate, c, 1), rows(up, c, 1), columns(down, c, 1)) for c in range(widths.intermediate_size)],
        "layer": [tuple(matrices.values())],
    }
    return {
        name: {
            "igia": torch.tensor([sum(g.square().sum().item() for p in unit for g in p) / steps for unit in units]),
            "gradient_norm": torch.tensor([sum(map(norms, unit)) for unit in units]),
        }
        for name, units in parts.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (tiny_config("llama"), {}),  # GQA; running sums of G² take over from the factors
        (tiny_config("llama"), {"rank": 1, "steps": 3}),  # factors to the end
        (tiny_config("llama", num_key_value_heads=4), {}),
        (tiny_config("llama", num_key_value_heads=1), {"top_percent": 3.3}),
        (tiny_config("llama-tied", attention_bias=True, mlp_bias=True), {"top_percent": 100}),
        (tiny_config("llama", head_dim=8), {"seed": 5}),  # heads that do not fill the hidden size
        (pruned_config(), {}),
        *((dense_config(KEPT[:2], family, **TWO_LAYERS.get(family, {})), {}) for family in list(FAMILIES)[1:]),
    ],
    ids=["gqa", "factors", "mha", "mqa", "biases", "head_dim", "pruned", *list(FAMILIES)[1:]],
)
def test_scores_and_masks_equal_autograd(config: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save(tmp_path / "model", config, torch.float32)
    settings = {"rank": 8, "seed": 0, "top_percent": 20.0, **SETTINGS, **changes}
    found = compute_importance(str(folder), tmp_path / "importance", TEXTS, learning_rate=RATE, **settings)
    gradients = direct_gradients(folder, **settings)
    assert found.steps == settings["steps"]
    shape = open_decoder(str(folder))[1]
    for layer, widths in enumerate(shape.layers):
        wanted = expected(gradients, layer, widths)
        for score in ("igia", "gradient_norm"):
            assert found.layers[score].dtype == torch.float64
            torch.testing.assert_close(
                found.layers[score][layer : layer + 1].float(), wanted["layer"][score], rtol=2e-4, atol=0
            )
            for name in ("heads", "groups", "channels"):
                scores = getattr(found, name)[score][layer]
                assert scores.dtype == torch.float32
                torch.testing.assert_close(scores, wanted[name][score], rtol=1e-3, atol=0)
        for name in shape.linear_names:
            check_mask(found.mask(layer, name), gradients[layer, name], settings["top_percent"])


def check_mask(mask: torch.Tensor, gradients: list[torch.Tensor], percent: float) -> None:
    """The mask has its number of entries, and they are the largest but for rounding."""
    values = torch.stack(gradients).square().mean(0)
    assert mask.shape == values.shape and mask.dtype == torch.bool
    count = round(percent / 100 * values.numel())
    assert int(mask.sum()) == count > 0
    least = values.flatten().sort(descending=True).values[count - 1]
    assert values[mask].min() > least * (1 - 1e-3)
    if count < values.numel():
        assert values[~mask].max() < least * (1 + 1e-3)


def test_few_texts_are_used_again(tmp_path: Path, model: Path) -> None:
    texts = TEXTS[:2]
    settings = {**SETTINGS, "steps": 6, "length": 32}
    found = compute_importance(str(model), tmp_path / "out", texts, **settings, masks=False)
    assert len(calibration_tokens(texts, tiny_tokenizer(), samples=12, length=32)) < 12
    assert found.steps == 6 and found.losses[-1] < found.losses[0]


@pytest.mark.slow
def test_gradient_accumulation_changes_nothing_but_memory(tmp_path: Path, model: Path) -> None:
    one, other = (
        compute_importance(
            str(model), tmp_path / str(parts), TEXTS, **{**SETTINGS, "batch_size": 4}, learning_rate=RATE,
            training={"gradient_accumulation_steps": parts},
        )
        for parts in (1, 2)
    )  # fmt: skip
    assert_close_scores(one, other)
    assert other.settings["batch_size"] == 4


def assert_close_scores(one: Importance, other: Importance) -> None:
    for score in ("igia", "gradient_norm"):
        torch.testing.assert_close(one.layers[score], other.layers[score], rtol=1e-3, atol=0)
        for units in ("heads", "groups", "channels"):
            for a, b in zip(getattr(one, units)[score], getattr(other, units)[score], strict=True):
                torch.testing.assert_close(a, b, rtol=5e-3, atol=0)
    torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(other.losses), rtol=1e-4, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_folding_changes_no_bit(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [(torch.randn(3, 10, generator=generator), torch.randn(12, 3, generator=generator)) for _ in range(steps)]
    sums, total = MatrixSums(4, True, True), torch.zeros(12, 10)
    for number, (a, b) in enumerate(factors, 1):
        assert sums.add(a, b)
        total += (b @ a).square()
        # 66 numbers a step; the matrix has 120
        assert sums.held == (66 if number == 1 else 120)
    order = np.argsort(-total.numpy().reshape(-1), kind="stable")
    wanted = np.zeros(120, bool)
    wanted[order[:25]] = True
    mask = sums.mask(25 / 120 * 100)
    assert mask is not None and np.array_equal(np.unpackbits(mask, count=120).astype(bool), wanted)


def test_equal_entries_are_taken_by_index() -> None:
    sums = MatrixSums(2, True, True)
    sums.add(torch.ones(1, 5), torch.tensor([[1.0], [2.0], [1.0], [1.0]]))
    mask = sums.mask(40)
    assert mask is not None
    assert np.unpackbits(mask, count=20).tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 1, 1] + [0] * 10


def test_a_report_says_what_was_measured(report: Path, model: Path) -> None:
    assert {p.name for p in report.iterdir()} >= {"importance.json", "importance.safetensors", "masks.safetensors"}
    content = json.loads((report / "importance.json").read_text())
    assert content["model"] == "tiny" and content["settings"]["data"] == "60 texts"
    assert len(content["losses"]) == 7 and all(map(math.isfinite, content["losses"]))
    assert str(model) not in (report / "importance.json").read_text()
    weights = sum(t.numel() for n, t in load_file(model / "model.safetensors").items() if "_proj" in n)
    # a bit a weight, and headers
    assert weights / 8 < (report / "masks.safetensors").stat().st_size < weights / 8 + 4096


def test_a_report_is_read_as_it_was_written(report: Path, tmp_path: Path) -> None:
    first = Importance.load(report)
    first.save(tmp_path / "again")
    for name in ("importance.json", "importance.safetensors", "masks.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (report / name).read_bytes(), name


def test_same_seed_same_report(report: Path, model: Path, tmp_path: Path) -> None:
    compute_importance(str(model), tmp_path / "out", TEXTS, **SETTINGS, learning_rate=RATE)
    for name in ("importance.json", "importance.safetensors", "masks.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (report / name).read_bytes(), name


def test_without_masks(model: Path, tmp_path: Path) -> None:
    found = compute_importance(str(model), tmp_path / "out", TEXTS, **{**SETTINGS, "steps": 2}, masks=False)
    assert not (tmp_path / "out" / "masks.safetensors").exists() and not found.has_masks
    with pytest.raises(ValueError, match="masks"):
        found.mask(0, "mlp.up_proj")


def test_a_mask_that_no_matrix_has(report: Path) -> None:
    for layer, name in ((2, "mlp.up_proj"), (-1, "mlp.up_proj"), (0, "mlp.up"), (0, "input_layernorm")):
        with pytest.raises(ValueError, match=naming("model", name, f"layer {layer}")):
            Importance.load(report).mask(layer, name)


def test_a_chart_is_drawn(report: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert (report / "importance.png").read_bytes().startswith(b"\x89PNG")
    found = Importance.load(report)
    for scores in found.heads["igia"]:  # heads without any gradient have no place on a logarithmic scale
        scores.zero_()
    found.layers["igia"].zero_()
    assert importance_plot.draw(found, tmp_path / "zero.png")


def test_without_matplotlib_there_is_no_chart(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    compute_importance(str(model), tmp_path / "out", TEXTS, **{**SETTINGS, "steps": 2})
    assert not (tmp_path / "out" / "importance.png").exists() and (tmp_path / "out" / "importance.json").exists()


_TWO_PROCESSES = """
import json, sys
import torch
from impart_hf.pruning.importance import compute_importance
from impart_hf.pruning.recovery import recover
arguments = json.loads(sys.argv[1])
found = compute_importance(*arguments["importance"], **arguments["settings"], masks=True)
assert found.mask(0, "mlp.up_proj").any()
report = recover(*arguments["recovery"], **arguments["settings"])
assert report.steps == 7
"""


@pytest.mark.process
def test_two_processes_measure_the_same(report: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(_TWO_PROCESSES)
    arguments = {
        "importance": [str(model), str(tmp_path / "importance"), TEXTS],
        "recovery": [str(model), str(tmp_path / "recovered"), TEXTS],
        "settings": {**SETTINGS, "learning_rate": RATE},
    }
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "run.py"), json.dumps(arguments)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["importance", "recovered", "run.py"]
    assert_close_scores(Importance.load(report), Importance.load(tmp_path / "importance"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "recovered").dtype == torch.bfloat16
