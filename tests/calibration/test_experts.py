"""Calibration of mixtures of experts: every expert's inputs are those of the tokens that are routed to it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import EXPERTS, architecture, architecture_pair
from support.calibrated import run
from support.messages import naming
from support.tiny_models import Pair, fine_tune, load_tensors, make_model, save_model, tiny_tokenizer
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeTopKRouter

from impart_hf.calibration.layer_stream import Moments, stream_layers
from impart_hf.calibration.streamed_model import streamed_model
from impart_hf.calibration.text import calibration_tokens
from impart_hf.common.checkpoint_layout import known_layout
from impart_hf.common.configs import model_config
from impart_hf.common.expert_stacks import expert_stack
from impart_hf.common.progress import Progress
from impart_hf.evaluation.metrics import load
from impart_hf.methods import ImPartQtConfig
from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.modeling.model_files import HubOptions

TOKENS = torch.randint(4, 316, (6, 40), generator=torch.Generator().manual_seed(0))
TEXT = (Path(torch.__file__).parent / "functional.py").read_text("utf-8")[:20000]
# A single matrix of a tensor: its name, and its number if the tensor holds all experts.
Matrix = tuple[str, int | None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A saved model of each of `EXPERTS`, in float32; not to be written to."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            model = fine_tune(make_model(architecture(name), dtype=torch.float32))
            made[name] = save_model(model, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


def perturbed(name: str, weight: Tensor) -> Tensor:
    """What a compressed tensor could be, the same whenever it is asked for."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return weight + 0.3 * weight.abs().mean() * noise


def ours(
    folder: Path, work: Path, change: Callable[[str, Tensor], Tensor] = lambda _, w: w, tokens: Tensor = TOKENS
) -> tuple[dict[Matrix, Tensor | None], list[str]]:
    """The second moments that `stream_layers` gives for experts and other matrices, and the order of the tensors."""
    checkpoint = Checkpoint(str(folder), HubOptions())
    found: dict[Matrix, Tensor | None] = {}
    order: list[str] = []

    def compressed(name: str, moments: Moments) -> Tensor:
        order.append(name)
        if isinstance(moments, Tensor):
            found[name, None] = moments
        elif moments is not None:
            found.update({(name, number): moment for number, moment in enumerate(moments)})
        return change(name, checkpoint.tensor(name))

    model = streamed_model(checkpoint, tokens, "cpu", dtype=torch.float32)
    stream_layers(model, tokens, compressed, work, batch_size=4, progress=Progress(False))
    return found, order


def names_by_value(folder: Path, model: nn.Module) -> dict[str, list[tuple[Matrix, int]]]:
    """By a stack's name in the model, its matrices in the file: each with its expert's number."""
    stored: dict[bytes, Matrix] = {}
    for name, tensor in load_tensors(folder).items():
        matrices = {None: tensor} if tensor.dim() == 2 else dict(enumerate(tensor)) if tensor.dim() == 3 else {}
        stored |= {matrix.contiguous().numpy().tobytes(): (name, number) for number, matrix in matrices.items()}
    found: dict[str, list[tuple[Matrix, int]]] = {}
    for key, stack in model.named_parameters():
        for number, matrix in enumerate(stack.detach() if key.endswith(("gate_up_proj", "down_proj")) else ()):
            halves = matrix.chunk(2) if key.endswith("gate_up_proj") else ()
            places = [stored.get(part.contiguous().numpy().tobytes()) for part in (matrix, *halves)]
            found.setdefault(key, []).extend((place, number) for place in places if place is not None)
    return found


def routed(module: Any, arguments: tuple[Tensor, ...], number: int) -> tuple[Tensor, Tensor]:
    """The inputs of an expert's two matrices, computed as the papers say."""
    hidden = arguments[0]
    if len(arguments) == 1:  # Llama 4: all experts' inputs one below the other, zero where a token goes elsewhere
        rows = hidden.view(module.num_experts, -1, hidden.shape[-1])[number]
        rows = rows[rows.abs().sum(1) > 0]
    else:
        rows = hidden[(arguments[1] == number).any(1)]
    weight = module.gate_up_proj[number]
    both = rows @ (weight if weight.shape[0] == rows.shape[1] and weight.shape[1] != rows.shape[1] else weight.T)
    if hasattr(module, "gate_up_proj_bias"):
        both = both + module.gate_up_proj_bias[number]
    if hasattr(module, "_apply_gate"):
        return rows, module._apply_gate(both)
    gate, up = both.chunk(2, -1)
    return rows, up * module.act_fn(gate)


def expected(
    folder: Path, change: Callable[[str, Tensor], Tensor] | None = None, tokens: Tensor = TOKENS
) -> dict[Matrix, Tensor]:
    """The mean of x xᵀ over the tokens that reach each expert, in the real model with changed weights."""
    model = load(str(folder), torch.float32, "cpu")
    names = names_by_value(folder, model)
    if change is not None:
        change_all(folder, model, change)
    moments: dict[Matrix, Tensor] = {}

    def hook(prefix: str) -> Callable[[Any, tuple], None]:
        def before(module: Any, arguments: tuple) -> None:
            for number in range(module.num_experts):
                inputs = dict(zip(("gate_up_proj", "down_proj"), routed(module, arguments, number), strict=True))
                for leaf, rows in inputs.items():
                    own = [matrix for matrix, expert in names[f"{prefix}.{leaf}"] if expert == number]
                    moments.update(dict.fromkeys(own, rows.T @ rows / len(rows)))

        return before

    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.__class__ is nn.Parameter:
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return moments


def change_all(folder: Path, model: nn.Module, change: Callable[[str, Tensor], Tensor]) -> None:
    """Give a model the changed tensors of a folder, by transformers' own way of loading them."""
    config = model.config
    tensors = {name: change(name, tensor) for name, tensor in load_tensors(folder).items()}
    other = type(model).from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)
    model.load_state_dict(other.state_dict())


@pytest.mark.parametrize("change", [None, perturbed], ids=["unchanged", "compressed"])
@pytest.mark.parametrize("name", EXPERTS)
def test_an_experts_inputs_are_those_of_its_tokens(
    folders: Callable[[str], Path], tmp_path: Path, name: str, change: Callable[[str, Tensor], Tensor] | None
) -> None:
    found, order = ours(folders(name), tmp_path, change or (lambda _, weight: weight))
    real = expected(folders(name), change)
    assert len(real) >= 8 and len(order) == len(set(order))
    for matrix, moment in real.items():
        mine = found[matrix]
        assert mine is not None and (mine - moment).abs().max() <= 1e-4 * moment.abs().max(), matrix


@pytest.mark.parametrize("name", EXPERTS)
def test_a_stack_is_assembled_as_transformers_does(folders: Callable[[str], Path], name: str) -> None:
    checkpoint = Checkpoint(str(folders(name)), HubOptions())
    layout = known_layout(checkpoint, model_config(checkpoint.config))
    assert layout is not None
    stacks = 0
    for key, group in layout.groups.items():
        stack = expert_stack(group, checkpoint, layout.model.get_submodule(key.rpartition(".")[0]))
        if stack is None:
            continue
        tensors = {member.name: checkpoint.tensor(member.name).requires_grad_() for member in group.members}
        assert set(stack.names) == tensors.keys()
        with torch.no_grad():
            (real,) = group.to_parameters(tensors).values()
        mine = stack.assembled(tensors)
        assert torch.equal(mine, real)
        mine.sum().backward()
        assert all((tensor.grad == 1).all() for tensor in tensors.values())
        stacks += 1
    assert stacks >= 2


def test_moments_are_computed_for_a_few_experts_at_a_time(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = ours(folders("gpt-oss"), tmp_path / "whole")
    runs: list[int] = []
    forward = torch.Tensor.addmm_
    monkeypatch.setattr("impart_hf.calibration.layer_stream._MOMENT_BYTES", 3 * 4 * 64**2)
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda self, *args: runs.append(1) or forward(self, *args))
    parts, _ = ours(folders("gpt-oss"), tmp_path / "parts")
    assert whole.keys() == parts.keys() and runs
    assert all(torch.equal(whole[matrix], parts[matrix]) for matrix in whole)


def only_the_first(experts: int) -> Callable[..., Any]:
    """A router that sends a token to the first experts only, and to each of the others one of the text's tokens."""

    def forward(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        chosen = torch.arange(experts).expand(len(hidden), -1).clone()
        chosen[0, 0] = experts
        return torch.zeros(len(hidden), self.num_experts), torch.full(chosen.shape, 0.5), chosen

    return forward


def test_an_expert_with_few_tokens_is_rounded_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third expert gets a token a batch, the fourth none."""
    monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", only_the_first(2))
    pair = architecture_pair(tmp_path / "pair", "qwen3-moe")
    report = run(pair, tmp_path / "delta", ImPartQtConfig(compression_ratio=4.0), calibration=[TEXT])
    noted = {t.name for t in report.tensors if any("too few tokens" in note for note in t.notes)}
    parts = ("gate_proj", "up_proj", "down_proj")
    assert noted == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
        for layer in range(2)
        for expert in (2, 3)
        for part in parts
    }


def test_experts_that_are_multiplied_in_an_unknown_way_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, hidden: Tensor, *_: Tensor) -> Tensor:
        return torch.einsum("td,emd->td", hidden, self.gate_up_proj + self.down_proj.mean())

    monkeypatch.setattr(Qwen3MoeExperts, "forward", forward)
    folder = save_model(make_model(architecture("qwen3-moe"), dtype=torch.float32), tmp_path / "model")
    with pytest.raises(ValueError, match=naming("calibration", "qwen3_moe", "multiplies the experts")):
        ours(folder, tmp_path / "work")


def test_calibration_brings_experts_closer_to_the_fine_tune(tmp_path: Path) -> None:
    """By the errors of the outputs of all experts' matrices, on the text's own tokens."""
    pair = architecture_pair(tmp_path / "pair", "mixtral", torch.float32)
    method = ImPartQtConfig(compression_ratio=8.0)
    for folder, text in (("calibrated", [TEXT]), ("rounded", None)):
        run(pair, tmp_path / folder, method, calibration=text, calibration_samples=32)
    errors = {folder: output_error(pair, tmp_path / folder) for folder in ("calibrated", "rounded")}
    assert errors["calibrated"] < 0.95 * errors["rounded"]


def output_error(pair: Pair, repository: Path) -> float:
    """Sum over the experts' matrices of the squared error of their outputs, over the delta's."""
    moments = expected(pair.finetuned, tokens=calibration_tokens([TEXT], tiny_tokenizer(), samples=32, length=64))
    models = [load(str(folder), torch.float32, "cpu") for folder in (repository, pair.finetuned, pair.base)]
    names = names_by_value(pair.finetuned, models[1])
    total = 0.0
    for key, places in names.items():
        approximate, exact, base = (model.get_parameter(key).detach() for model in models)
        for place, number in places:
            moment = moments[place]
            error, delta = approximate[number] - exact[number], exact[number] - base[number]
            total += float(((error @ moment) * error).sum() / ((delta @ moment) * delta).sum())
    return total
