"""Calibration layer by layer: the inputs of every linear layer are those of the real model, compressed up to there."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from support.disguises import DISGUISES, SAVED
from support.messages import naming
from support.tiny_models import edit_json, edit_tensors, fine_tune, load_tensors, make_model, save_model, tiny_config
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaForCausalLM,
    Mamba2Config,
    PreTrainedConfig,
    RwkvConfig,
)
from transformers.models.llama import modeling_llama
from transformers.pytorch_utils import Conv1D

from impart_hf.calibration.layer_stream import Moments, stream_layers
from impart_hf.calibration.streamed_model import streamed_model
from impart_hf.common.progress import Progress
from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.modeling.model_files import HubOptions

# Longer than the tiny models' sliding windows; the last batch is smaller than the others.
TOKENS = torch.randint(4, 320, (5, 40), generator=torch.Generator().manual_seed(0))
BATCH_SIZE = 2
SMALL = {"vocab_size": 320, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    **{
        kind: lambda kind=kind: tiny_config(kind)
        for kind in ("llama", "llama-tied", "mistral", "qwen2", "gemma2", "gpt-oss", "gpt-neox", "mamba", "mixtral")
    },
    # Its layers return tuples, and a bias that follows the attention mask takes the place of positions.
    "bloom": lambda: BloomConfig(**SMALL, n_layer=3, n_head=4, initializer_range=0.15),
    # Its linear layers are of another class, with transposed weights.
    "gpt2": lambda: GPT2Config(**SMALL, n_layer=2, n_head=4, n_embd=64, n_positions=64, initializer_range=0.15),
    # The file's names are others than the model's, and there is an image encoder beside the decoder.
    "gemma3-vision": lambda: tiny_config("gemma3-vision"),
    # Its config.json holds an infinity.
    "mamba2": lambda: Mamba2Config(**SMALL, num_hidden_layers=2, num_heads=8, head_dim=16, state_size=8, n_groups=1),
    "rwkv": lambda: RwkvConfig(**SMALL, num_hidden_layers=2, attention_hidden_size=64),
}
SUPPORTED = ["llama", "llama-tied", "mistral", "qwen2", "gemma2", "gpt-oss", "gpt-neox", "mamba", "mamba2", "bloom"]
SUPPORTED += ["gpt2", "gemma3-vision"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A saved model of each of `CONFIGS`, made when it is first asked for; not to be written to."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            # Fine-tuned, so that no two tensors are equal
            made[kind] = save_model(fine_tune(make_model(CONFIGS[kind]())), tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.fixture
def own_llama(tmp_path: Path) -> Path:
    """A tiny LLaMA to be written to."""
    return save_model(make_model(tiny_config("llama")), tmp_path / "llama")


def perturbed(name: str, weight: Tensor) -> Tensor:
    """What a compressed tensor could be: something near it, the same whenever it is asked for."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return weight.double() + 0.3 * weight.double().abs().mean() * noise


class Calls:
    """A `compressed` that notes what it is called with."""

    def __init__(self, folder: Path, change: Callable[[str, Tensor], Tensor] = lambda name, weight: weight):
        self.checkpoint, self._change = Checkpoint(str(folder), HubOptions()), change
        self.order: list[str] = []
        self.hessians: dict[str, Tensor] = {}
        self.experts: dict[str, list[Tensor | None]] = {}  # of tensors that hold a matrix for each expert

    def __call__(self, name: str, hessian: Moments) -> Tensor:
        self.order.append(name)
        if isinstance(hessian, Tensor):
            self.hessians[name] = hessian
        elif hessian is not None:
            self.experts[name] = list(hessian)
        return self._change(name, self.checkpoint.tensor(name))

    def run(self, tokens: Tensor = TOKENS, batch_size: int = BATCH_SIZE, progress: Progress | None = None) -> set[str]:
        progress = progress or Progress(False)
        model = streamed_model(self.checkpoint, tokens, "cpu", dtype=torch.float32)
        with TemporaryDirectory() as folder:
            return stream_layers(model, tokens, self, Path(folder), batch_size=batch_size, progress=progress)


def names_in_file(folder: Path, model: nn.Module) -> dict[str, str]:
    """The name that each parameter has in the file, found by its values."""
    stored = {tensor.float().numpy().tobytes(): name for name, tensor in load_tensors(folder).items()}
    return {name: stored[parameter.detach().numpy().tobytes()] for name, parameter in model.named_parameters()}


def real_moments(folder: Path, change: Callable[[str, Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """The mean of x xᵀ of every linear layer but the output projection, in the whole model with changed weights.

    Weights have the names that they have in the file.

    What reaches a linear layer depends on what comes before it alone; so it does not matter that everything after it
    is changed too.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    names = names_in_file(folder, model)
    inputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings():
            inputs[names[name + ".weight"]] = rows = []
            module.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        if change is not None:
            for name, parameter in model.named_parameters():
                parameter.copy_(change(names[name], parameter))
        model(TOKENS)
    stacked = {name: torch.cat(rows) for name, rows in inputs.items() if rows}
    return {name: (x.T @ x / len(x)).float() for name, x in stacked.items()}


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, moment in expected.items():
        assert ours[name].dtype == torch.float32
        assert (ours[name] - moment).abs().max() <= 1e-4 * moment.abs().max(), name


@pytest.mark.parametrize("kind", SUPPORTED)
def test_unchanged_weights_give_the_real_models_inputs(folders: Callable[[str], Path], kind: str) -> None:
    calls = Calls(folders(kind))
    calls.run()
    assert_close(calls.hessians, real_moments(folders(kind)))


@pytest.mark.parametrize("kind", SUPPORTED)
def test_inputs_come_from_compressed_weights(folders: Callable[[str], Path], kind: str) -> None:
    calls = Calls(folders(kind), perturbed)
    calls.run()
    expected = real_moments(folders(kind), perturbed)
    assert_close(calls.hessians, expected)
    before = real_moments(folders(kind))
    changes = [(expected[name] - before[name]).abs().max() / before[name].abs().max() for name in expected]
    assert min(changes) > 1e-2


@pytest.mark.parametrize("disguise", ["without prefix", "buffers", "as in memory"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3-vision"])
def test_files_of_another_layout_are_the_same_model(
    folders: Callable[[str], Path], tmp_path: Path, kind: str, disguise: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders(kind))
    save_model(model, tmp_path / "other", **SAVED.get(disguise, {}))
    DISGUISES[disguise](tmp_path / "other")
    usual, other = Calls(folders(kind)), Calls(tmp_path / "other")
    usual.run()
    other.run()
    assert len(other.hessians) == len(usual.hessians) > 0
    for name, hessian in other.hessians.items():
        (same,) = [n for n in usual.hessians if torch.equal(usual.checkpoint.tensor(n), other.checkpoint.tensor(name))]
        assert torch.equal(hessian, usual.hessians[same]), name


def layer_of(name: str) -> int:
    """The number of a tensor's decoder layer; -1 outside them."""
    found = re.search(r"\.(?:layers|h)\.(\d+)\.", name) if "vision" not in name else None
    return int(found[1]) if found else -1


@pytest.mark.parametrize("kind", SUPPORTED)
def test_every_tensor_comes_once_layer_after_layer(folders: Callable[[str], Path], kind: str) -> None:
    calls = Calls(folders(kind))
    names = calls.run()
    assert len(calls.order) == len(names) and set(calls.order) == names
    assert names == set(calls.checkpoint.names())
    numbers = [layer_of(name) for name in calls.order]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(-1, max(numbers) + 1))
    for number in set(numbers):
        has_hessian = [
            name in calls.hessians or name in calls.experts for name in calls.order if layer_of(name) == number
        ]
        assert has_hessian == sorted(has_hessian)


def test_linear_layers_come_in_groups_that_share_a_hessian(folders: Callable[[str], Path]) -> None:
    calls = Calls(folders("llama"))
    calls.run()
    groups: list[tuple[int, list[str]]] = []
    for name in [name for name in calls.order if name in calls.hessians and layer_of(name) == 1]:
        if not groups or groups[-1][0] != id(calls.hessians[name]):
            groups.append((id(calls.hessians[name]), []))
        groups[-1][1].append(name.removeprefix("model.layers.1.").removesuffix(".weight"))
    assert [sorted(names) for _, names in groups] == [
        ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


def test_the_same_input_gives_the_same_hessians(folders: Callable[[str], Path]) -> None:
    one, same, other = (Calls(folders("mistral")) for _ in range(3))
    one.run()
    same.run()
    other.run(batch_size=5)
    assert all(torch.equal(hessian, same.hessians[name]) for name, hessian in one.hessians.items())
    assert_close(other.hessians, one.hessians)


class RoutedMLP(nn.Module):
    """Experts that are linear layers, each called with the tokens whose first entry falls into its range."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))
        self.spare = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, -2)
        # Of tokens as normalised as these, the first entry is never beyond 100: the last expert has none.
        chosen = torch.bucketize(rows[:, 0].contiguous(), torch.tensor([0.0, 1.5, 100.0]))
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            out[chosen == number] = expert(rows[chosen == number])
        return out.view_as(hidden)


def test_experts_that_no_token_reaches_have_no_hessian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "LlamaMLP", RoutedMLP)
    folder = save_model(fine_tune(make_model(tiny_config("llama"))), tmp_path / "routed")
    calls = Calls(folder, perturbed)
    names = calls.run(batch_size=1)
    assert names == set(calls.checkpoint.names())
    routed = [f"model.layers.{layer}.mlp.experts.{expert}.weight" for layer in range(2) for expert in range(3)]
    attention = [n for n in names if "self_attn" in n]
    assert calls.hessians.keys() == {*routed, *attention}
    expected = real_moments(folder, perturbed)
    assert_close(calls.hessians, {name: expected[name] for name in calls.hessians})


def test_an_expert_may_be_reached_by_a_later_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "LlamaMLP", RoutedMLP)
    folder = save_model(make_model(tiny_config("llama", num_hidden_layers=1)), tmp_path / "routed")

    def reached(tokens: Tensor) -> set[str]:
        calls = Calls(folder)
        calls.run(tokens, batch_size=1)
        return {name for name in calls.hessians if "experts" in name}

    sequences = TOKENS.view(-1, 1)  # a sequence of one token reaches one expert
    one = sequences[:1]
    other = next(s for s in sequences.split(1) if reached(s) != reached(one))
    assert reached(torch.cat([one, other])) == reached(one) | reached(other)


def test_one_decoder_layer_is_in_memory_at_a_time(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders("llama")
    models: list[nn.Module] = []
    make = LlamaForCausalLM._from_config
    monkeypatch.setattr(
        LlamaForCausalLM,
        "_from_config",
        lambda *args, **kw: models.append(make(*args, **kw)) or models[-1],
    )
    seen: list[str] = []

    def look(name: str, weight: Tensor) -> Tensor:
        assert all(b.device.type == "cpu" for b in models[0].buffers())
        real = {n for n, parameter in models[0].named_parameters() if not parameter.is_meta}
        # Of what lies outside the layers, nothing is there before all of it has been compressed
        assert {layer_of(n) for n in real} <= {layer_of(name)} and (real or layer_of(name) < 0)
        assert "lm_head.weight" not in real
        seen.append(name)
        return weight

    Calls(folder, look).run()
    assert len(models) == 1 and len(seen) == 21
    assert all(parameter.is_meta for parameter in models[0].parameters())


def spoilt(name: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[:64] = float("nan")

    return edit


@pytest.mark.parametrize("part", ["self_attn.q_proj", "mlp.down_proj", "input_layernorm"])
def test_weights_that_are_not_finite_are_named_by_their_layer(own_llama: Path, part: str) -> None:
    edit_tensors(own_llama, spoilt(f"model.layers.1.{part}.weight"))
    calls = Calls(own_llama)
    with pytest.raises(ValueError, match=naming("calibration", "layer 1", "finite")):
        calls.run()
    assert {layer_of(name) for name in calls.order} == {-1, 0}


def test_embeddings_that_are_not_finite(own_llama: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"].fill_(float("inf"))

    edit_tensors(own_llama, edit)
    calls = Calls(own_llama)
    with pytest.raises(ValueError, match=naming("embeddings", "finite")):
        calls.run()
    assert calls.order == []


@pytest.mark.parametrize("part", ["self_attn.q_proj", "mlp.down_proj"])
def test_compression_that_ruins_a_layer_is_noticed_there(folders: Callable[[str], Path], part: str) -> None:
    ruined = f"model.layers.0.{part}.weight"
    calls = Calls(folders("llama"), lambda name, weight: weight * float("nan") if name == ruined else weight)
    with pytest.raises(ValueError, match=naming("layer 0", "finite")):
        calls.run()


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("rwkv", ("rwkv", "decoder")),
    ],
)
def test_architectures_that_cannot_be_streamed(folders: Callable[[str], Path], kind: str, names: tuple) -> None:
    calls = Calls(folders(kind))
    with pytest.raises(ValueError, match=naming("calibration", names)):
        calls.run()
    assert calls.order == []


def test_a_checkpoint_of_other_names_or_shapes(own_llama: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["layers.1.mlp.other_proj.weight"] = tensors.pop("model.layers.1.mlp.down_proj.weight")

    edit_tensors(own_llama, rename)
    calls = Calls(own_llama)
    with pytest.raises(ValueError, match=naming("model.layers.1.mlp.down_proj.weight", "[64, 128]")):
        calls.run()
    edit_json(own_llama / "config.json", intermediate_size=96)
    with pytest.raises(ValueError, match=r"\[96, 64\]|\[64, 96\]"):
        Calls(own_llama).run()
    assert calls.order == []


def test_an_architecture_that_transformers_does_not_know(own_llama: Path) -> None:
    edit_json(own_llama / "config.json", model_type="unheard-of")
    with pytest.raises(ValueError, match=naming("unheard-of", "transformers")):
        Calls(own_llama).run()


@pytest.mark.parametrize("trouble", ["between layers", "twice", "state", "text"])
def test_decoders_that_are_no_plain_chain_of_layers(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """Models whose layers cannot be run one after the other are refused, not run wrongly."""

    def forward(self: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(hidden.shape[1])[None]
        named: dict[str, Any] = {"position_embeddings": self.rotary_emb(hidden, positions)}
        if trouble == "state":
            named["shared"] = {}
        if trouble == "text":
            named["position_ids"] = input_ids
        for layer in self.layers:
            hidden = layer(hidden, **named)
            if trouble == "twice":
                hidden = layer(hidden, **named)
            if trouble == "between layers":
                hidden = hidden + 1
        return hidden

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    calls = Calls(folders("llama"))
    with pytest.raises(ValueError, match=naming("calibration", "llama")):
        calls.run()
    assert calls.order == []


@pytest.mark.parametrize(
    ("tokens", "names"),
    [
        (TOKENS[0], ("shape", "[40]")),
        (TOKENS[:0], ("shape", "[0, 40]")),
        (TOKENS + 320, ("vocabulary", 320)),
    ],
)
def test_tokens_that_cannot_be_run(folders: Callable[[str], Path], tokens: Tensor, names: tuple) -> None:
    calls = Calls(folders("llama"))
    with pytest.raises(ValueError, match=naming(names)):
        calls.run(tokens)
    assert calls.order == []


def test_the_bar_goes_over_the_layers(folders: Callable[[str], Path]) -> None:
    seen: list[object] = []

    class Watched(Progress):
        def track(self, items: Any, title: str, work: Any = lambda item: 1) -> Any:
            for item in super().track(items, title, work):
                seen.append(item)
                yield item

    Calls(folders("llama")).run(progress=Watched(False))
    assert seen == ["model.layers.0", "model.layers.1"]
