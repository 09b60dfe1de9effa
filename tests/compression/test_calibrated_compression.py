"""Compression with a calibration text, from a user's call to the loaded model."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibrated import HELD_OUT, MATRICES, RATIO, TEXT, divergence, method_of, refuses, run, take_up
from support.messages import naming
from support.tiny_models import Pair, edit_tensors, load_tensors, save_pair, tiny_config
from support.workspaces import break_off, counted_bytes, differing, file_name, finished
from transformers import AutoModelForCausalLM, RwkvConfig

from impart_hf.cli.main import main
from impart_hf.common.progress import Progress
from impart_hf.distillation import DistillSettings
from impart_hf.methods import DareQtConfig, ImPartConfig, method_class
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.open import open_repository
from impart_hf.repository.verify import verify

KINDS = ["llama", "llama-tied", "qwen2", "gemma2"]
QUANTISING = ["dare-qt", "delta-come", "impart-qt"]

PairOf = Callable[[str], Pair]
RepositoryOf = Callable[..., Path]


@pytest.fixture(scope="module")
def repository_of(pair_of: PairOf, tmp_path_factory: pytest.TempPathFactory) -> RepositoryOf:
    """A repository, made when it is first asked for; not to be written to."""
    made: dict[tuple, Path] = {}

    def repository(kind: str, name: str, calibrated: bool, seed: int = 0) -> Path:
        key = (kind, name, calibrated, seed)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("repository") / "delta"
            method = method_class(name)(compression_ratio=RATIO, seed=seed)
            run(pair_of(kind), made[key], method, calibration=[TEXT] if calibrated else None)
        return made[key]

    return repository


# --- with calibration text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUANTISING)
def test_calibrated_repositories_load(
    kind: str, name: str, pair_of: PairOf, repository_of: RepositoryOf, tmp_path: Path
) -> None:
    pair, repository = pair_of(kind), repository_of(kind, name, True)
    assert method_of(repository)["calibration"] == "16 x 64 tokens"
    assert "calibration 16 x 64 tokens" in (repository / "README.md").read_text("utf-8")
    verify(open_repository(str(repository), HubOptions(), None), Progress(False))
    model = AutoModelForCausalLM.from_pretrained(repository)
    dense = AutoModelForCausalLM.from_pretrained(pair.finetuned)
    base = load_tensors(pair.base)
    for parameter, tensor in dense.state_dict().items():
        ours = model.state_dict()[parameter]
        assert ours.dtype == tensor.dtype and ours.shape == tensor.shape
        if parameter in base:
            # A coarse image of the delta, but of this delta: nothing is exchanged or lost.
            change, found = (t.float() - base[parameter].float() for t in (tensor, ours))
            assert not change.any() or (change * found).sum() > 0.5 * change.square().sum(), parameter
    rounded = repository_of(kind, name, False)
    assert method_of(rounded)["calibration"] == "none: rounded"
    # Calibration decides which levels are stored, and costs no byte but those in which it is named.
    assert abs(counted_bytes(rounded) - counted_bytes(repository)) < 40
    delta, other = (load_tensors(folder) for folder in (repository, rounded))
    assert delta.keys() == other.keys()
    assert {n: t.shape for n, t in delta.items()} == {n: t.shape for n, t in other.items()}
    linear = "model.layers.1.self_attn.q_proj.weight.delta"
    assert not torch.equal(delta[linear], other[linear])
    embedding = "model.embed_tokens.weight.delta"
    assert torch.equal(delta[embedding], other[embedding]), "nothing is known of an embedding's inputs"


@pytest.mark.parametrize("name", QUANTISING)
def test_the_ratio_is_met_on_disk(name: str, tmp_path: Path) -> None:
    config = tiny_config("llama", hidden_size=128, intermediate_size=256)
    pair = save_pair(tmp_path / "pair", config, only=lambda n: "norm" not in n)
    report = run(pair, tmp_path / "delta", method_class(name)(compression_ratio=8), calibration=[TEXT])
    assert report.repository_bytes == counted_bytes(tmp_path / "delta")
    assert report.checkpoint_bytes == (pair.finetuned / "model.safetensors").stat().st_size
    assert report.ratio >= 8 and not report.shortfall


@pytest.mark.slow
@pytest.mark.parametrize("name, most", [("dare-qt", 0.9), ("delta-come", 0.9), ("impart-qt", 0.97)])
def test_calibration_brings_models_closer_to_the_fine_tune(
    name: str, most: float, pair_of: PairOf, repository_of: RepositoryOf
) -> None:
    runs = [("llama", 0), ("qwen2", 0), ("llama", 1)]
    found = [
        [divergence(repository_of(kind, name, calibrated, seed), pair_of(kind).finetuned) for kind, seed in runs]
        for calibrated in (True, False)
    ]
    assert sum(found[0]) < most * sum(found[1])


def test_files_and_lists_of_the_same_text_are_the_same(tiny_pair: Pair, tmp_path: Path) -> None:
    method = DareQtConfig(compression_ratio=RATIO)
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n", "utf-8")
    sources = {"list": [TEXT], "path": tmp_path / "text.txt", "jsonl": str(tmp_path / "text.jsonl")}
    for name, source in sources.items():
        run(tiny_pair, tmp_path / name, method, calibration=source)
    assert differing(tmp_path / "list", tmp_path / "path") == differing(tmp_path / "list", tmp_path / "jsonl") == []


def test_sequences_are_no_longer_than_the_model_reads(tiny_pair: Pair, tmp_path: Path) -> None:
    method = DareQtConfig(compression_ratio=RATIO)
    report = run(tiny_pair, tmp_path / "delta", method, calibration=[TEXT], calibration_samples=3,
                 calibration_length=2048)  # fmt: skip
    assert report.method["calibration"] == "3 x 128 tokens"


def test_the_command_says_whether_it_rounded(
    tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    common = ["compress", str(tiny_pair.base), str(tiny_pair.finetuned), str(tmp_path / "delta"), "--quiet"]
    common += ["--ratio", "4", "--method", "impart-qt", "--bits", "8,2", "--groups", "4"]
    assert main(common) == 0
    assert re.search(naming("rounded", "--calibration"), capsys.readouterr().out)
    calibrated = ["--calibration", str(tmp_path / "text.txt"), "--calibration-samples", "5", "--calibration-length"]
    assert main([*common, *calibrated, "40"]) == 0
    assert "rounded" not in capsys.readouterr().out
    method = method_of(tmp_path / "delta")
    assert (method["bits"], method["groups"], method["calibration"]) == ([8, 2], [4], "5 x 40 tokens")
    assert main([*common[:5], "--method", "impart", "--ratio", "4"]) == 0
    assert "rounded" not in capsys.readouterr().out and "calibration" not in method_of(tmp_path / "delta")


# --- bad input


def test_architectures_that_cannot_be_calibrated(tmp_path: Path) -> None:
    pair = save_pair(tmp_path / "pair", RwkvConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2))
    method = DareQtConfig(compression_ratio=RATIO)
    refuses(pair, tmp_path, ValueError, naming("calibration", "'rwkv'"), method, calibration=[TEXT])
    # which works
    assert run(pair, tmp_path / "delta", method).method["calibration"] == "none: rounded"


@pytest.mark.parametrize("name", ["bitdelta", "dare", "impart", "lowrank"])
def test_methods_that_do_not_quantise_take_no_calibration(name: str, tiny_pair: Pair, tmp_path: Path) -> None:
    method = method_class(name)(compression_ratio=RATIO)
    match = naming("calibration", f"'{name}'")
    refuses(tiny_pair, tmp_path, ValueError, match, method, calibration=[TEXT])


@pytest.mark.parametrize("purpose", ["calibration", "distill"])
@pytest.mark.parametrize(
    "source, error, match",
    [
        (["too short"], ValueError, naming("text", 64) + ".*[0-9]+ tokens"),
        ([], ValueError, naming("list", "no text")),
        ([" \n"], ValueError, naming("list", "no text")),
        ([b"bytes"], ValueError, naming("entry 0", "list", "b'bytes'")),
        (7, ValueError, naming("path", "list", 7)),
        ("/gone/text.txt", FileNotFoundError, naming("'/gone/text.txt'")),
        (sys.executable, ValueError, naming(sys.executable, ".txt", ".json")),
    ],
    ids=["short", "empty", "blank", "bytes", "number", "missing", "binary"],
)
def test_texts_that_cannot_be_used(
    purpose: str, source: Any, error: type[Exception], match: str, tiny_pair: Pair, tmp_path: Path
) -> None:
    refuses(tiny_pair, tmp_path, error, match, DareQtConfig(compression_ratio=RATIO), **{purpose: source})


@pytest.mark.parametrize("size", [{"calibration_samples": 0}, {"calibration_length": 1}, {"calibration_length": -5}])
def test_sequences_of_no_size(size: dict, tiny_pair: Pair, tmp_path: Path) -> None:
    method = DareQtConfig(compression_ratio=RATIO)
    match = naming("sequence", *size.values())
    refuses(tiny_pair, tmp_path, ValueError, match, method, calibration=[TEXT], **size)


def test_steps_of_distillation_that_make_no_sense(tiny_pair: Pair, tmp_path: Path) -> None:
    for steps in (0, -1, 2.5):
        with pytest.raises(ValueError, match=naming("steps", steps)):
            DistillSettings(steps=steps)


def test_distillation_settings_without_a_text(tiny_pair: Pair, tmp_path: Path) -> None:
    match, settings = naming("distill_settings", "text"), DistillSettings(steps=5)
    refuses(tiny_pair, tmp_path, ValueError, match, ImPartConfig(RATIO), distill_settings=settings)


def test_distillation_needs_a_sequence_to_hold_out(tiny_pair: Pair, tmp_path: Path) -> None:
    method = ImPartConfig(compression_ratio=RATIO)
    refuses(
        tiny_pair,
        tmp_path,
        ValueError,
        naming("distillation", "sequences", 1),
        method,
        distill=[TEXT],
        calibration_samples=1,
    )


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    pair = save_pair(tmp_path / "pair", tiny_config("llama", vocab_size=64))
    method = DareQtConfig(compression_ratio=2)
    refuses(pair, tmp_path, ValueError, naming("vocabulary", 64, pair.finetuned), method, calibration=[TEXT])


def test_activations_that_are_not_finite(pair: Pair, tmp_path: Path) -> None:
    """Weights that are finite, and a product of three of them that is not."""

    def blow_up(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("gate", "up", "down"):
            tensors[f"model.layers.0.mlp.{part}_proj.weight"] *= 1e14

    edit_tensors(pair.finetuned, blow_up)
    method = DareQtConfig(compression_ratio=RATIO)
    with pytest.raises(ValueError, match=naming("calibration", "layer 0", "finite")):
        run(pair, tmp_path / "delta", method, calibration=[TEXT])
    assert not (tmp_path / "delta").exists()
    run(pair, tmp_path / "delta", method)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "delta", "finetuned"]


# --- broken off and taken up again


# After an embedding, in the first layer, before the last matrix, in the second layer.
@pytest.mark.parametrize("kind, after", [("llama", 1), ("llama", 4), ("llama", 11), ("gemma2", 8)])
def test_a_broken_off_calibration_goes_on(
    kind: str, after: int, pair_of: PairOf, repository_of: RepositoryOf, tmp_path: Path
) -> None:
    output, method = tmp_path / "delta", method_class("impart-qt")(compression_ratio=RATIO)
    kept = break_off(lambda: run(pair_of(kind), output, method, calibration=[TEXT]), output, after)
    redone = take_up(pair_of(kind), output, method, calibration=[TEXT])
    assert not set(map(file_name, redone)) & set(kept)
    matrices = sum(t.dim() == 1 and n.endswith(".delta") for n, t in load_tensors(output).items())
    assert len(redone) + len(kept) == matrices
    assert differing(output, repository_of(kind, "impart-qt", True)) == []
    assert [p.name for p in tmp_path.iterdir()] == ["delta"]


@pytest.mark.parametrize("other", [[HELD_OUT], None], ids=["another text", "no text"])
def test_other_calibration_starts_afresh(tiny_pair: Pair, tmp_path: Path, other: list[str] | None) -> None:
    method = method_class("delta-come")(compression_ratio=RATIO)
    output = tmp_path / "delta"
    break_off(lambda: run(tiny_pair, output, method, calibration=[TEXT]), output, 9)
    redone = take_up(tiny_pair, tmp_path / "delta", method, calibration=other)
    assert len(redone) == MATRICES
    run(tiny_pair, tmp_path / "fresh", method, calibration=other)
    assert differing(tmp_path / "delta", tmp_path / "fresh") == []


@pytest.mark.process
def test_a_killed_calibration_goes_on(tmp_path: Path) -> None:
    """A process of its own, killed by SIGKILL while it calibrates."""
    config = tiny_config("llama", num_hidden_layers=8)
    pair, method = save_pair(tmp_path / "pair", config), DareQtConfig(compression_ratio=RATIO)
    code = (
        "import sys; from impart_hf import compress; from impart_hf.methods import DareQtConfig; "
        f"compress(*sys.argv[1:4], DareQtConfig(compression_ratio={RATIO}), calibration=sys.argv[4], "
        "calibration_samples=16, calibration_length=64)"
    )
    text, output = tmp_path / "text.txt", tmp_path / "delta"
    text.write_text(TEXT, "utf-8")
    command = [sys.executable, "-c", code, *map(str, (pair.base, pair.finetuned, output, text))]
    child = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 120
        while len(finished(output)) < 12:
            assert child.poll() is None and time.monotonic() < deadline, "over before it could be killed"
            time.sleep(0.001)
    finally:
        child.kill()
    assert child.wait() == -signal.SIGKILL and not output.exists()
    kept = len(finished(output))
    assert len(take_up(pair, output, method, calibration=text)) == 8 * 5 + 2 - kept
    run(pair, tmp_path / "unbroken", method, calibration=text)
    assert differing(output, tmp_path / "unbroken") == []
