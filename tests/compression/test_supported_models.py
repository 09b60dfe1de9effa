"""What docs/supported-models.md says of each architecture, with a tiny model of it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import ARCHITECTURES, EXPERTS, NESTED, architecture_pair
from support.calibrated import TEXT, divergence, run
from support.tiny_models import Pair, fine_tune, load_tensors, save_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from impart_hf import merge, tune
from impart_hf.distillation import DistillSettings
from impart_hf.methods import method_class
from impart_hf.repository.report import CompressionReport

ROWS = [
    [cell.strip(" `") for cell in line.strip("|").split("|")]
    for line in (Path(__file__).parents[2] / "docs" / "supported-models.md").read_text("utf-8").splitlines()
    if re.match(r"\| [^|]+ \| `", line)
]
SMALL = {"calibration_samples": 8, "calibration_length": 32}
# The parts of a language model that texts do not calibrate: embeddings, positions, output projections, routers.
UNCALIBRATED = re.compile(r"embed|wte|wpe|lm_head|mlp\.gate\.weight|router|gate\.weight$")
FAST = ("gemma3", "qwen3-vl", "llama4", "mixtral", "gpt-oss")
IMAGES = re.compile(r"vision|visual|projector")


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A pair of each of `ARCHITECTURES`; not to be written to."""
    return functools.cache(lambda name: architecture_pair(tmp_path_factory.mktemp("pair"), name))


def encoded(report: CompressionReport) -> set[str]:
    return {tensor.name for tensor in report.tensors if tensor.kind == "encoded"}


def reached(report: CompressionReport) -> int:
    """How many matrices config.json says are calibrated, of those that are not of the vocabulary."""
    matrices = {tensor for tensor in encoded(report) if not re.search("embed_tokens|wte|lm_head", tensor)}
    found = re.search(r", (\d+) of (\d+) matrices", report.method["calibration"])
    assert found is None or int(found[2]) == len(matrices)
    return int(found[1]) if found else len(matrices)


def test_the_table_has_every_architecture() -> None:
    assert [row[1] for row in ROWS] == [model_type for model_type, _, _ in ARCHITECTURES.values()]
    for name, row in zip(ARCHITECTURES, ROWS, strict=True):
        text = {
            (False, False): "yes",
            (False, True): "with experts",
            (True, False): "language model",
            (True, True): "language model, experts",
        }[name in NESTED, name in EXPERTS]
        assert row[2:7] == ["yes", text, text, "yes", "yes"]
        assert (row[7] == "refused") == (name in EXPERTS)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in ARCHITECTURES])
def test_compressed_calibrated_and_distilled_by_blocks(
    pair_of: Callable[[str], Pair], tmp_path: Path, name: str
) -> None:
    pair = pair_of(name)
    settings = DistillSettings(steps=2, blocks=1, batch_size=4)
    report = run(
        pair, tmp_path / "delta", method_class("impart-qt")(compression_ratio=4.0),
        calibration=[TEXT], distill=[TEXT], distill_settings=settings, **SMALL,
    )  # fmt: skip
    matrices = encoded(report)
    language = {tensor for tensor in matrices if not IMAGES.search(tensor)}
    assert (matrices != language) == (name in NESTED)
    wanted = {tensor for tensor in language if not UNCALIBRATED.search(tensor)}
    assert len(wanted) >= 8 and reached(report) == len(wanted)
    assert all("experts" in tensor for tensor in hardly_reached(report))
    assert report.distilled is not None
    assert wanted.isdisjoint(report.distilled.untrained) and matrices - language <= set(report.distilled.untrained)
    if name in EXPERTS:
        assert any("experts" in tensor for tensor in wanted)
    kinds = {part.kind for part in report.parts}
    assert {"attention", "embeddings and output"} < kinds and "others" not in kinds
    assert ("images" in kinds) == (name in NESTED) and ("experts" in kinds) == (name in EXPERTS)
    auto_class: Any = AutoModelForImageTextToText if name in NESTED else AutoModelForCausalLM
    loaded, info = auto_class.from_pretrained(tmp_path / "delta", output_loading_info=True)
    whole = AutoConfig.from_pretrained(pair.finetuned).architectures[0]
    assert type(loaded).__name__ == whole and not info["missing_keys"] and not info["unexpected_keys"]
    assert 0 < divergence(tmp_path / "delta", pair.finetuned) < divergence(pair.base, pair.finetuned)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "impart-rd") for name in ARCHITECTURES]
    + [(name, method) for name in ("llama", "gpt2", "mixtral", "gpt-oss") for method in ("delta-come", "dare-qt")],
)
def test_every_method_is_calibrated(pair_of: Callable[[str], Pair], tmp_path: Path, name: str, method: str) -> None:
    reports = [
        run(pair_of(name), tmp_path / str(bool(text)), method_class(method)(compression_ratio=4.0),
            calibration=text, **SMALL)
        for text in (None, [TEXT])
    ]  # fmt: skip
    wanted = {n for n in encoded(reports[1]) if not UNCALIBRATED.search(n) and not IMAGES.search(n)}
    assert reached(reports[1]) == len(wanted)
    assert all(differing_records(tmp_path, name) for name in wanted - hardly_reached(reports[1]))


def hardly_reached(report: CompressionReport) -> set[str]:
    """The tensors of which the report says that too few tokens reach them."""
    return {tensor.name for tensor in report.tensors if any("too few tokens" in note for note in tensor.notes)}


def differing_records(folder: Path, name: str) -> bool:
    """Whether a tensor's record is another one with text than without."""
    records = [load_tensors(folder / part)[f"{name}.delta"] for part in ("True", "False")]
    return not torch.equal(*records)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_distilled_as_a_whole(pair_of: Callable[[str], Pair], tmp_path: Path, name: str) -> None:
    settings = DistillSettings(steps=6, batch_size=4, trains="scales")
    report = run(
        pair_of(name), tmp_path / "delta", method_class("impart-qt")(compression_ratio=8.0),
        distill=[TEXT], distill_settings=settings, **SMALL,
    )  # fmt: skip
    assert report.distilled is not None and report.distilled.after <= report.distilled.before
    assert set(report.distilled.untrained) == {tensor for tensor in encoded(report) if IMAGES.search(tensor)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tuned(pair_of: Callable[[str], Pair], tmp_path: Path, name: str) -> None:
    pair = pair_of(name)
    method = method_class("impart")(compression_ratio=4.0)
    tuned = tune(
        str(pair.base), str(pair.finetuned), tmp_path / "delta", method,
        validation=[TEXT], betas=(0.5, 0.7), cs=(1.0,), samples=4, length=32,
    )  # fmt: skip
    assert len(tuned.candidates) >= 2 and AutoModelForCausalLM.from_pretrained(tmp_path / "delta")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged(pair_of: Callable[[str], Pair], tmp_path: Path, name: str) -> None:
    pair = pair_of(name)
    base = load_whole(pair.base)
    other = save_model(fine_tune(base, 5), tmp_path / "other")
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(pair.base),
        "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in (pair.finetuned, other)],
        "dtype": "float32",
    }
    merge(config, tmp_path / "merged")
    states = [load_whole(folder).float().state_dict() for folder in (tmp_path / "merged", pair.finetuned, other)]
    for key, merged in states[0].items():
        assert torch.allclose(merged, (states[1][key] + states[2][key]) / 2, atol=1e-2), key


def load_whole(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    is_nested = config.get_text_config() is not config
    return (AutoModelForImageTextToText if is_nested else AutoModelForCausalLM).from_pretrained(folder)


def test_positions_limit_a_texts_length(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    """Those of the language model, which its configuration has inside the whole's."""
    method = method_class("impart-qt")(compression_ratio=4.0)
    report = run(pair_of("qwen3-vl"), tmp_path / "delta", method, calibration=[TEXT], calibration_samples=2,
                 calibration_length=4096)  # fmt: skip
    assert report.method["calibration"].startswith("2 x 128 tokens")


@pytest.mark.parametrize("name", ["gemma3", "qwen2.5-vl", "llama4"])
def test_added_tokens_of_a_language_model_inside(pair_of: Callable[[str], Pair], tmp_path: Path, name: str) -> None:
    """The embeddings are known by the nested vocabulary, and so are their added rows."""
    base = load_whole(pair_of(name).base)
    tuned = fine_tune(base)
    tuned.resize_token_embeddings(330)
    folder = save_model(tuned, tmp_path / "tuned")
    report = run(Pair(pair_of(name).base, folder), tmp_path / "delta", method_class("impart")(compression_ratio=3.0))
    assert any("embed_tokens" in name for name in encoded(report))
    loaded = load_whole(tmp_path / "delta")
    assert loaded.get_input_embeddings().weight.shape[0] == 330
    assert torch.equal(loaded.get_input_embeddings().weight[320:], tuned.get_input_embeddings().weight[320:])
