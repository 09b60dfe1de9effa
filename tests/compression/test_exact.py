"""Method exact, and exact tensors beside another method: the fine-tune's own bits, through every way to load."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.architectures import ARCHITECTURES, NESTED, architecture_pair
from support.commands import failure
from support.forged_files import DELTA, NORM, UP, forge, read_entries
from support.hostile import refuses
from support.loaded_models import decode_all, load, logits
from support.messages import naming
from support.naive_reader import read_repository
from support.tiny_models import Pair, edit_tensors, load_tensors, make_model, save_model, save_pair, tiny_config
from support.workspaces import break_off, counted_bytes, differing
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from impart_hf import ExactConfig, ImPartRdConfig, LowRankConfig, QualityTarget, compress, forecast, load_delta
from impart_hf.cli.main import main
from impart_hf.common import processes
from impart_hf.compression.compatibility import IncompatibleModelsError
from impart_hf.compression.scan import TensorPlan, order_to_take
from impart_hf.modeling.checksums import tensor_bytes
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.inspection import Inspection
from impart_hf.repository.open import open_repository
from impart_hf.repository.reconstruct import reconstruct
from impart_hf.repository.report import CompressionReport
from impart_hf.repository.verify import verify


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        (one[n].dtype, one[n].shape) == (other[n].dtype, other[n].shape)
        and np.array_equal(tensor_bytes(one[n]), tensor_bytes(other[n]))
        for n in one
    )


def exact(pair: Pair, folder: Path, **arguments: Any) -> CompressionReport:
    return compress(str(pair.base), str(pair.finetuned), folder, ExactConfig(), **arguments)


@pytest.fixture(scope="module")
def delta(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pair's exact delta; not to be written to."""
    folder = tmp_path_factory.mktemp("exact") / "delta"
    exact(tiny_pair, folder)
    return folder


@pytest.fixture
def repository(delta: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(delta, tmp_path / "delta")


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    return functools.cache(lambda name: architecture_pair(tmp_path_factory.mktemp("pair"), name))


# --- every way to load


def test_every_way_to_load_gives_the_fine_tune(tiny_pair: Pair, delta: Path, tmp_path: Path) -> None:
    expected = load_tensors(tiny_pair.finetuned)
    assert same_bits(decode_all(delta), expected)
    finetuned = AutoModelForCausalLM.from_pretrained(tiny_pair.finetuned)
    model = load(delta)
    assert same_bits(dict(model.state_dict()), dict(finetuned.state_dict()))
    assert torch.equal(logits(model), logits(finetuned))
    opened = open_repository(str(delta), HubOptions())
    verify(opened)
    reconstruct(opened, tmp_path / "dense")
    assert same_bits(load_tensors(tmp_path / "dense"), expected)
    model.save_pretrained(tmp_path / "saved")
    assert differing(delta, tmp_path / "saved") in ([], ["generation_config.json"])


def test_beside_a_base_in_memory(tiny_pair: Pair, delta: Path) -> None:
    model = load_delta(AutoModelForCausalLM.from_pretrained(tiny_pair.base), str(delta), adapter_name="tuned")
    model.set_adapter("tuned")
    finetuned = AutoModelForCausalLM.from_pretrained(tiny_pair.finetuned)
    assert torch.equal(logits(model), logits(finetuned))


def test_a_reader_written_from_the_document_agrees(tiny_pair: Pair, delta: Path) -> None:
    expected = {name: tensor.double().numpy() for name, tensor in load_tensors(tiny_pair.finetuned).items()}
    read = read_repository(delta, tiny_pair.base)
    assert read.keys() == expected.keys() and all(np.array_equal(read[n], expected[n]) for n in expected)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture(name: str, pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    pair = pair_of(name)
    report = exact(pair, tmp_path / "delta")
    assert report.ratio > 1 and report.exact_tensors and not report.encoded_tensors
    auto_class: Any = AutoModelForImageTextToText if name in NESTED else AutoModelForCausalLM
    model, finetuned = (auto_class.from_pretrained(folder) for folder in (tmp_path / "delta", pair.finetuned))
    assert same_bits(dict(model.state_dict()), dict(finetuned.state_dict()))
    verify(open_repository(str(tmp_path / "delta"), HubOptions()))


# --- bits and dtypes


def test_numbers_that_no_lossy_method_takes(pair: Pair, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        special = torch.tensor([0x7FC1, -1, 0x7F80, -0x80, -0x8000, 1, 0x7F7F], dtype=torch.int16)
        tensors[UP][3, :7] = special.view(torch.bfloat16)
        tensors[NORM][:7] = special.view(torch.bfloat16)

    edit_tensors(pair.finetuned, spoil)
    exact(pair, tmp_path / "delta")
    assert same_bits(decode_all(tmp_path / "delta"), load_tensors(pair.finetuned))
    verify(open_repository(str(tmp_path / "delta"), HubOptions()))
    with pytest.raises(IncompatibleModelsError, match="NaN"):
        compress(str(pair.base), str(pair.finetuned), tmp_path / "lossy", LowRankConfig(4))


def test_a_zero_of_the_other_sign_is_a_change(pair: Pair, tmp_path: Path) -> None:
    for folder in (pair.base, pair.finetuned):
        edit_tensors(folder, lambda tensors: tensors[NORM].zero_())
    edit_tensors(pair.finetuned, lambda tensors: tensors[NORM].neg_())
    exact(pair, tmp_path / "delta")
    assert same_bits(decode_all(tmp_path / "delta"), load_tensors(pair.finetuned))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("which", ["base", "finetuned", "both"])
def test_other_dtypes(dtype: torch.dtype, which: str, pair: Pair, tmp_path: Path) -> None:
    for folder in (pair.base, pair.finetuned):
        if which in ("both", "base" if folder == pair.base else "finetuned"):
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    exact(pair, tmp_path / "delta")
    assert same_bits(decode_all(tmp_path / "delta"), load_tensors(pair.finetuned))
    model = load(tmp_path / "delta", dtype="auto")
    assert model.dtype == (torch.bfloat16 if which == "base" else dtype)


def test_buffers_of_integers(pair: Pair, tmp_path: Path) -> None:
    """Tensors that no model reads are a part of the pair if both have them."""
    for folder, start in ((pair.base, 0), (pair.finetuned, 5)):
        edit_tensors(folder, lambda t, start=start: t.update(steps=torch.arange(start, start + 400)))
    exact(pair, tmp_path / "delta")
    assert torch.equal(decode_all(tmp_path / "delta")["steps"], torch.arange(5, 405))


@pytest.mark.parametrize("dtypes", [(torch.uint8, torch.bool), (torch.int64, torch.int32)])
def test_buffers_of_other_integers(dtypes: tuple[torch.dtype, torch.dtype], pair: Pair, tmp_path: Path) -> None:
    """A mask that the base has as bytes and the fine-tune as booleans is the fine-tune's, in dtype too."""
    for folder, dtype, start in ((pair.base, dtypes[0], 0), (pair.finetuned, dtypes[1], 5)):
        edit_tensors(
            folder, lambda t, dtype=dtype, start=start: t.update(mask=torch.arange(start, start + 40).to(dtype))
        )
    exact(pair, tmp_path / "delta")
    assert same_bits(decode_all(tmp_path / "delta"), load_tensors(pair.finetuned))


def test_added_tokens(tmp_path: Path) -> None:
    base = make_model(tiny_config("llama"))
    save_model(base, tmp_path / "base")
    base.resize_token_embeddings(330)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.01)
    save_model(base, tmp_path / "finetuned")
    pair = Pair(tmp_path / "base", tmp_path / "finetuned")
    exact(pair, tmp_path / "delta")
    assert same_bits(decode_all(tmp_path / "delta"), load_tensors(pair.finetuned))


def test_processes_share_out_tensors_without_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "is_distributed", lambda: True)
    plans = [TensorPlan("scale", "exact", (), torch.float32), TensorPlan("up", "exact", (4, 4), torch.float32)]
    assert [plan.name for plan in order_to_take(plans)] == ["up", "scale"]


# --- what comes out


def test_the_report_says_what_came_out(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compress", tiny_pair.base, tiny_pair.finetuned, tmp_path / "delta", "--method", "exact", "--quiet"]
    assert main([*map(str, arguments), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["method"] == {"name": "exact"} and report["requested_ratio"] is None and not report["shortfall"]
    assert report["repository_bytes"] == counted_bytes(tmp_path / "delta")
    assert {tensor["kind"] for tensor in report["tensors"]} == {"exact"}
    assert main(list(map(str, arguments))) == 0
    summary = capsys.readouterr().out
    assert "stored exactly" in summary and "requested" not in summary and "calibration" not in summary
    assert main(["inspect", str(tmp_path / "delta")]) == 0
    table = capsys.readouterr().out
    assert "method      exact\n" in table and table.count(" exact ") == len(report["tensors"])
    card = (tmp_path / "delta" / "README.md").read_text("utf-8")
    assert f"stored exactly, bit for bit | {len(report['tensors'])} tensors" in card and "relative error" not in card


def test_a_fine_tune_that_equals_its_base(tiny_pair: Pair, tmp_path: Path) -> None:
    report = exact(Pair(tiny_pair.base, tiny_pair.base), tmp_path / "delta")
    assert report.tensors == [] and same_bits(decode_all(tmp_path / "delta"), load_tensors(tiny_pair.base))


def test_the_file_has_one_entry_for_each_changed_tensor(tiny_pair: Pair, delta: Path) -> None:
    before, after = load_tensors(tiny_pair.base), load_tensors(tiny_pair.finetuned)
    changed = {f"{name}.exact" for name in after if not torch.equal(before[name], after[name])}
    assert read_entries(delta / DELTA).keys() - {"crc32", "base_checksums"} == changed
    assert {t.name for t in Inspection(str(delta), HubOptions()).tensors} == {n.removesuffix(".exact") for n in changed}


def test_sharded(tiny_pair: Pair, tmp_path: Path) -> None:
    exact(tiny_pair, tmp_path / "delta", max_shard_size="40KB")
    assert len(list((tmp_path / "delta").glob("delta_model-*.safetensors"))) > 2
    assert same_bits(decode_all(tmp_path / "delta"), load_tensors(tiny_pair.finetuned))


def test_an_interrupted_run_is_resumed(tiny_pair: Pair, delta: Path, tmp_path: Path) -> None:
    output = tmp_path / "delta"
    stored = break_off(lambda: exact(tiny_pair, output), output, after=3)
    assert len(stored) == 3 and not output.exists()
    exact(tiny_pair, output)
    assert differing(output, delta) == []


# --- beside another method


def test_named_tensors_are_exact_beside_any_method(tiny_pair: Pair, tmp_path: Path) -> None:
    patterns = ["*norm*", "lm_head.weight", "model.layers.0.*down_proj*"]
    report = compress(
        str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / "delta", LowRankConfig(4), exact=patterns
    )
    expected, decoded = load_tensors(tiny_pair.finetuned), decode_all(tmp_path / "delta")
    named = {n for n in expected if "norm" in n or n in ("lm_head.weight", "model.layers.0.mlp.down_proj.weight")}
    assert {tensor.name for tensor in report.exact_tensors} == named
    assert same_bits({n: decoded[n] for n in named}, {n: expected[n] for n in named})
    assert not torch.equal(decoded[UP], expected[UP]) and report.encoded_tensors


def test_their_bytes_count(tmp_path: Path) -> None:
    pair = save_pair(tmp_path / "pair", tiny_config("llama", hidden_size=128, intermediate_size=512))
    reports = {
        patterns: compress(
            str(pair.base), str(pair.finetuned), tmp_path / "delta", ImPartRdConfig(4), exact=patterns, calibration=None
        )
        for patterns in ((), ("*k_proj*",))
    }
    for report in reports.values():
        assert not report.shortfall and 4 <= report.ratio < 4.3
    sizes = [sum(t.bytes for t in report.encoded_tensors if "up_proj" in t.name) for report in reports.values()]
    assert sizes[1] < sizes[0]  # the others get what is left


def test_bytes_of_all_tensors_count(tiny_pair: Pair, tmp_path: Path) -> None:
    """A pattern for all tensors, beside a method with a limit, keeps the limit."""
    arguments = dict(exact=["*"], calibration=None, max_bytes="60KB")
    with pytest.raises(ValueError, match="cannot be made"):
        compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / "delta", ImPartRdConfig(), **arguments)


def test_exact_tensors_may_hold_nan(pair: Pair, tmp_path: Path) -> None:
    edit_tensors(pair.finetuned, lambda tensors: tensors[NORM][:2].fill_(float("nan")))
    compress(str(pair.base), str(pair.finetuned), tmp_path / "delta", ImPartRdConfig(4), exact=[NORM], calibration=None)
    assert same_bits({NORM: decode_all(tmp_path / "delta")[NORM]}, {NORM: load_tensors(pair.finetuned)[NORM]})


def test_calibration_and_exact_tensors(tiny_pair: Pair, tmp_path: Path) -> None:
    """Layers are calibrated on the outputs of those before them, of which exact ones are the fine-tune's."""
    report = compress(
        str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / "delta", ImPartRdConfig(4), exact=["*.layers.0.*"],
        calibration=["A sentence of a text that layers are calibrated on. " * 40], calibration_length=32,
    )  # fmt: skip
    assert {t.name for t in report.exact_tensors} >= {UP} and any(t.inputs for t in report.encoded_tensors)


def step(tensor: torch.Tensor, share: float) -> torch.Tensor:
    """The tensor with so many of its numbers one representable number higher."""
    chosen = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)) < share
    return torch.where(chosen, torch.nextafter(tensor, torch.full_like(tensor, torch.inf)), tensor)


def test_the_budget_takes_exact_records_where_they_are_smaller(pair: Pair, tmp_path: Path) -> None:
    base = load_tensors(pair.base)
    sparse = [name for name in base if "layers.0.mlp" in name]
    # All changes are about as large: a budget gives nearly nothing to what changed much less than the rest.
    edit_tensors(
        pair.finetuned, lambda t: t.update({n: step(x, 0.02 if n in sparse else 0.15) for n, x in base.items()})
    )
    arguments = dict(exact=(), calibration=None)
    report = compress(str(pair.base), str(pair.finetuned), tmp_path / "delta", ImPartRdConfig(4), **arguments)
    assert {tensor.name for tensor in report.exact_tensors} == set(sparse) and report.encoded_tensors
    assert report.ratio >= 4 and not report.shortfall
    expected, decoded = load_tensors(pair.finetuned), decode_all(tmp_path / "delta")
    assert same_bits({n: decoded[n] for n in sparse}, {n: expected[n] for n in sparse})
    whole = Pair(pair.base, tmp_path / "whole")
    shutil.copytree(pair.finetuned, whole.finetuned)
    edit_tensors(whole.finetuned, lambda tensors: tensors.update({n: step(t, 0.02) for n, t in base.items()}))
    report = compress(str(whole.base), str(whole.finetuned), tmp_path / "all", ImPartRdConfig(4), **arguments)
    assert not report.encoded_tensors and report.ratio > 4


# --- bad input


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"max_bytes": "1MB"}, "max_bytes.*whatever size"),
        ({"distill": ["a text"]}, "distill.*whatever size"),
        ({"target": QualityTarget("text.txt", max_kl=1.0)}, "target.*whatever size"),
        ({"calibration": ["a text"]}, "calibration is for the methods that quantise"),
        ({"exact": ["*norm*"]}, "exact stores every tensor|stores every tensor exactly"),
    ],
)
def test_what_has_no_effect_is_refused(arguments: dict[str, Any], match: str, tiny_pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        exact(tiny_pair, tmp_path / "delta", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, match",
    [
        (["--ratio", "8"], "--ratio"),
        (["--max-bytes", "1MB"], "--max-bytes"),
        (["--max-kl", "1", "--validation", "text.txt"], "--max-kl"),
        (["--calibration", "built-in"], "--calibration"),
        (["--distill", "text.txt"], "--distill"),
        (["--dry-run"], "--dry-run"),
        (["--exact", "*norm*"], "--exact"),
    ],
)
def test_the_command_refuses_it_too(
    options: list[str], match: str, tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compress", tiny_pair.base, tiny_pair.finetuned, tmp_path / "delta", "--method", "exact"]
    assert match in failure(capsys, *command, *options)
    assert list(tmp_path.iterdir()) == []


def test_a_name_without_a_tensor(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compress", tiny_pair.base, tiny_pair.finetuned, tmp_path / "delta", "--exact", "*.rooter.*"]
    assert "'*.rooter.*'" in failure(capsys, *command)
    with pytest.raises(TypeError, match="list of names"):
        compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / "delta", LowRankConfig(4), exact="*norm*")
    assert list(tmp_path.iterdir()) == []


def test_there_is_no_forecast(tiny_pair: Pair) -> None:
    with pytest.raises(ValueError, match="no forecast for method 'exact'"):
        forecast(str(tiny_pair.base), str(tiny_pair.finetuned), ExactConfig())


# --- hostile files


def entry(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda entries: entries.update({name: ("U8", [40], bytes(40))})


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], Any]] = {
    "exact and encoded": (entry(f"{UP}.delta"), (UP, "two of these")),
    "exact and replaced": (lambda e: e.update({NORM: ("BF16", [64], bytes(128))}), (NORM, "two of these")),
    "exact of no tensor": (entry("model.ghost.exact"), "model.ghost"),
    "exact of words": (lambda e: e.update({f"{UP}.exact": ("U32", [10], bytes(40))}), (UP, "U8")),
    "an exact record of zeros": (entry(f"{UP}.exact"), (UP, "unknown exact record")),
    "of another tensor": (
        lambda e: e.update({f"{UP}.exact": e["model.layers.0.mlp.down_proj.weight.exact"]}), (UP, "64x128", "128x64")
    ),
    "of a tensor of the same shape": (
        lambda e: e.update({f"{UP}.exact": e["model.layers.0.mlp.gate_proj.weight.exact"]}), UP
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_entries(what: str, repository: Path) -> None:
    edit, words = HOSTILE[what]
    forge(repository, edit)
    refuses(repository, naming(*([words] if isinstance(words, str) else words)))
