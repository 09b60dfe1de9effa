"""What calibration and distillation reach: layers of another class, tensors of other names, and what is said of it."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import naming
from support.refusals import refuses
from support.tiny_models import Pair, load_tensors, save_pair, tiny_config, tiny_tokenizer
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.llama import modeling_llama

from impart_hf import compress
from impart_hf.calibration.text import calibration_tokens
from impart_hf.cli.main import main
from impart_hf.distillation import DistillSettings
from impart_hf.evaluation.metrics import evaluate, load
from impart_hf.methods import DareQtConfig, MethodConfig, method_class

METHODS = ["dare-qt", "delta-come", "impart-qt", "impart-rd"]
TEXT = Path(str(textwrap.__file__)).read_text("utf-8")
SIZE = {"calibration_samples": 16, "calibration_length": 64}
# The linear layers of the decoder among the matrices that are encoded; all of which calibration should reach, and how
# many other matrices there are besides the vocabulary's.
LINEAR = {
    "gpt2": (r"\.h\.\d\.(attn|mlp)\.c_\w+\.weight", 1),  # the positions
    "gpt-neox": (r"gpt_neox\.layers\.\d.*\.weight", 0),
    "gemma3-vision": (r"^language_model.*_proj\.weight", None),
}

RepositoryOf = Callable[..., Path]


@pytest.fixture(scope="module")
def repository_of(pair_of: Callable[[str], Pair], tmp_path_factory: pytest.TempPathFactory) -> RepositoryOf:
    """A repository, made when it is first asked for; not to be written to."""
    made: dict[tuple, Path] = {}

    def repository(kind: str, name: str, calibrated: bool) -> Path:
        key = (kind, name, calibrated)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("repository") / "delta"
            method = method_class(name)(compression_ratio=4.0)
            run(pair_of(kind), made[key], method, calibration=[TEXT[:9000]] if calibrated else None)
        return made[key]

    return repository


def run(pair: Pair, output: Path, method: MethodConfig, **kwargs: Any) -> Any:
    return compress(str(pair.base), str(pair.finetuned), output, method, **{**SIZE, **kwargs})


def method_of(repository: Path) -> dict[str, Any]:
    return json.loads((repository / "config.json").read_text("utf-8"))["method"]


def records_of(repository: Path) -> dict[str, torch.Tensor]:
    """The records by tensor name."""
    tensors = load_tensors(repository)
    return {n.removesuffix(".delta"): t for n, t in tensors.items() if n.endswith(".delta") and t.dtype == torch.uint8}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", LINEAR)
def test_linear_layers_are_calibrated_whatever_their_class_and_name(
    kind: str, name: str, repository_of: RepositoryOf
) -> None:
    calibrated, rounded = (records_of(repository_of(kind, name, given)) for given in (True, False))
    pattern, others = LINEAR[kind]
    linear = {n for n in rounded if re.search(pattern, n)}
    assert len(linear) >= 6
    changed = {n for n in rounded if not torch.equal(calibrated[n], rounded[n])}
    assert linear <= changed
    stated = method_of(repository_of(kind, name, True))["calibration"]
    assert stated in (repository_of(kind, name, True) / "README.md").read_text("utf-8")
    if others is None:
        assert re.fullmatch(rf"16 x 64 tokens, {len(linear)} of \d+ matrices", stated)
    else:
        part = f", {len(linear)} of {len(linear) + others} matrices" if others else ""
        assert stated == f"16 x 64 tokens{part}"


class SpareMLP(nn.Module):
    """A layer with an expert that no token reaches."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.used = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.back = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.spare = nn.Linear(config.hidden_size, 2 * config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.back(self.used(hidden).relu())


def test_an_expert_that_no_token_reaches_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "LlamaMLP", SpareMLP)
    pair = save_pair(tmp_path / "pair", tiny_config("llama"))
    report = run(pair, tmp_path / "delta", DareQtConfig(compression_ratio=4.0), calibration=[TEXT])
    noted = {tensor.name for tensor in report.tensors if any("not calibrated" in note for note in tensor.notes)}
    assert noted == {f"model.layers.{layer}.mlp.spare.weight" for layer in range(2)}


@pytest.mark.slow
def test_calibration_brings_gpt2_closer_to_the_fine_tune(
    pair_of: Callable[[str], Pair], repository_of: RepositoryOf
) -> None:
    tokens = calibration_tokens([TEXT[9000:]], tiny_tokenizer(), samples=24, length=64)
    tuned = load(str(pair_of("gpt2").finetuned), torch.float32, "cpu")

    def divergence(name: str, calibrated: bool) -> float:
        return evaluate(load(str(repository_of("gpt2", name, calibrated)), torch.float32, "cpu"), tuned, tokens, 24)[1]

    for name in ("dare-qt", "delta-come", "impart-qt"):
        assert divergence(name, True) < divergence(name, False), name


def test_the_command_says_how_much_was_reached(
    pair_of: Callable[[str], Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    pair = pair_of("gpt2")
    command = ["compress", str(pair.base), str(pair.finetuned), str(tmp_path / "delta"), "--ratio", "4", "--quiet"]
    command += ["--calibration-samples", "8", "--calibration-length", "32"]
    text = str(tmp_path / "text.txt")
    assert main([*command, "--calibration", text, "--distill", text, "--steps", "2", "--distill-blocks", "1"]) == 0
    shown = capsys.readouterr().out
    assert re.search(naming("8 of them calibrated"), shown)
    assert re.search(naming("trained", "8 of 10 tensors"), shown)
    method = method_of(tmp_path / "delta")
    assert method["calibration"] == "8 x 32 tokens, 8 of 9 matrices"
    assert method["distillation"] == "codes, 2 steps, 8 x 32 tokens, 8 of 10 tensors"


def test_distillation_trains_tensors_of_other_names(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    """All but those of the image encoder, which text does not pass."""
    settings = DistillSettings(steps=4, batch_size=4)
    report = run(
        pair_of("gemma3-vision"), tmp_path / "delta", DareQtConfig(compression_ratio=4.0),
        distill=[TEXT], distill_settings=settings,
    )  # fmt: skip
    encoded = {tensor.name for tensor in report.tensors if tensor.kind == "encoded"}
    assert report.distilled.steps == 4
    assert set(report.distilled.untrained) == {name for name in encoded if not name.startswith("language_model")}
    trained = len(encoded) - len(report.distilled.untrained)
    assert report.method["distillation"].endswith(f"16 x 64 tokens, {trained} of {len(encoded)} tensors")


@pytest.mark.parametrize("blocks", [None, 1])
@pytest.mark.parametrize("purpose", ["calibration", "distill"])
def test_a_text_that_reaches_nothing_is_refused(purpose: str, blocks: int | None, tmp_path: Path) -> None:
    """Here, because only the image encoder was trained."""
    pair = save_pair(tmp_path / "pair", tiny_config("gemma3-vision"), only=lambda name: "vision_tower" in name)
    settings = {"distill_settings": DistillSettings(blocks=blocks)} if purpose == "distill" else {}
    refuses(
        pair, ValueError, naming("none of", "vision_tower"), tmp_path / "delta",
        root=tmp_path, method=DareQtConfig(compression_ratio=4.0), **{purpose: [TEXT]}, **settings, **SIZE,
    )  # fmt: skip
