"""Forecasts: bytes and disk as `compress` then has them, times exactly as the samples say, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import failure
from support.messages import naming
from support.tiny_models import Pair, edit_tensors, save_pair, tiny_config

from impart_hf import DistillSettings, Forecast, ImPartRdConfig, LowRankConfig, compress, forecast
from impart_hf.cli.main import main
from impart_hf.common.files import OutputError
from impart_hf.compression.matrix_timing import (
    Cost,
    MatrixCosts,
    MatrixKind,
    Sample,
    extrapolated,
    time_matrices,
)
from impart_hf.compression.pipeline import CompressionRequest
from impart_hf.compression.plan import CompressionPlan, make_plan
from impart_hf.compression.resources import RunTimes, forecast_of
from impart_hf.compression.run_timing import price_seconds
from impart_hf.compression.scan import TensorPlan
from impart_hf.methods import MethodConfig, method_class, method_names

TEXT = ["A fine-tuned model is its base model and a small difference. " * 60]
SQUARE, WIDE = MatrixKind(64, 64), MatrixKind(64, 128)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One percent of its repository is more than a component of a matrix; a norm and a layer's output are unchanged."""
    config = tiny_config("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    unchanged = ("model.norm.weight", "model.layers.1.self_attn.o_proj.weight")
    return save_pair(tmp_path_factory.mktemp("pair"), config, only=lambda name: name not in unchanged)


def ask(pair: Pair, method: MethodConfig | None = None, **arguments: Any) -> Forecast:
    return forecast(str(pair.base), str(pair.finetuned), method, **arguments)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * n.startswith(("impart-", "delta"))) for n in method_names()]
)
def test_bytes_of_the_result_and_changed_tensors_are_those_of_the_compression(
    pair: Pair, tmp_path: Path, name: str
) -> None:
    method = method_class(name)(compression_ratio=12)
    found = ask(pair, method, output_dir=tmp_path / "delta")
    assert not list(tmp_path.iterdir())
    report = compress(str(pair.base), str(pair.finetuned), tmp_path / "delta", method)
    assert found.repository_bytes == pytest.approx(report.repository_bytes, rel=0.01)
    assert found.checkpoint_bytes == report.checkpoint_bytes
    assert (found.changed_tensors, found.equal_tensors) == (report.changed_tensors, report.equal_tensors)
    assert found.equal_tensors == 2
    assert found.method == {k: v for k, v in report.method.items() if k != "kl_forecast"}
    assert bool(found.shortfall) == bool(report.shortfall)


def test_disk_is_what_a_compression_asks_for(tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ask(tiny_pair, ImPartRdConfig(compression_ratio=3)).disk_bytes
    usage = namedtuple("usage", "total used free")

    def compress_with(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free))
        compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / "delta", ImPartRdConfig(compression_ratio=3))

    with pytest.raises(OutputError, match=naming(needed, needed - 1)):
        compress_with(needed - 1)
    compress_with(needed)


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": ImPartRdConfig(compression_ratio=900)},
        {"max_bytes": 7000},
        {"method": LowRankConfig(), "calibration": TEXT},
        {"calibration": ["too short"]},
        {"device": "nowhere"},
        {"method": "impart"},
    ],
)
def test_errors_are_those_of_the_compression(pair: Pair, tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as expected:
        compress(str(pair.base), str(pair.finetuned), tmp_path / "delta", **arguments)
    with pytest.raises(type(expected.value)) as found:
        ask(pair, **arguments)
    assert str(found.value) == str(expected.value)


def test_an_output_that_cannot_be_written_is_refused(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=naming(tmp_path)):
        ask(pair, output_dir=tmp_path)
    with pytest.raises(ValueError, match=naming("process_count", 0)):
        ask(pair, process_count=0)


def test_a_change_outside_the_sample_is_not_seen_and_one_in_a_small_tensor_is(tiny_pair: Pair, tmp_path: Path) -> None:
    pair = save_pair(tmp_path, tiny_config("llama", vocab_size=4096), only=lambda name: False)
    assert ask(pair).changed_tensors == 0

    def change(name: str, row: int) -> Callable[[dict[str, torch.Tensor]], None]:
        return lambda tensors: tensors[name][row].add_(1)

    edit_tensors(pair.finetuned, change("model.embed_tokens.weight", 100))  # 512 kB, sampled from row 0 and row 256
    assert ask(pair).changed_tensors == 0
    edit_tensors(pair.finetuned, change("model.layers.0.self_attn.q_proj.weight", 63))  # 8 kB, compared whole
    assert ask(pair).changed_tensors == 1
    edit_tensors(pair.finetuned, change("model.embed_tokens.weight", 256))
    assert ask(pair).changed_tensors == 2


def test_a_calibrated_run_has_its_stage(tiny_pair: Pair) -> None:
    found = ask(tiny_pair, ImPartRdConfig(compression_ratio=3), calibration=TEXT, calibration_length=32)
    seconds = {stage.name: stage.seconds for stage in found.stages}
    assert list(seconds) == [
        "open and check", "scan", "singular values", "sensitivity", "price", "vectors and encoding", "calibration",
        "writing",
    ]  # fmt: skip
    assert all(value > 0 for value in seconds.values())
    assert "tokens" in found.method["calibration"]


def test_a_distilled_run_has_its_stage_and_room_for_checkpoints(tiny_pair: Pair) -> None:
    found = ask(
        tiny_pair, LowRankConfig(compression_ratio=3),
        distill=TEXT, calibration_length=32, distill_settings=DistillSettings(steps=4, batch_size=2),
    )  # fmt: skip
    alone = ask(tiny_pair, LowRankConfig(compression_ratio=3))
    names = [stage.name for stage in found.stages]
    assert names == ["open and check", "scan", "vectors and encoding", "distillation", "writing"]
    assert found.stages[3].seconds > 0
    assert found.disk_bytes > alone.disk_bytes and "4 steps" in found.method["distillation"]


def test_a_matrix_of_another_size_follows_from_two_samples() -> None:
    def seconds(m: int, n: int) -> float:
        return 3e-9 * m * n + 2e-11 * m * n * min(m, n)

    samples = [(m, n, seconds(m, n)) for m, n in ((64, 128), (256, 512))]
    assert extrapolated(samples, 4096, 8192) == pytest.approx(seconds(4096, 8192))
    # One sample tells the operations of a decomposition only.
    assert extrapolated([(64, 64, 1.0)], 128, 256) == pytest.approx(16)
    # Seconds that grow with less than the entries are no reason for negative terms.
    assert extrapolated([(64, 64, 1.0), (128, 128, 3.0)], 256, 256) == pytest.approx(12, rel=0.3)


def test_a_kind_that_was_not_timed_follows_from_the_one_with_most_like_work() -> None:
    cost = Cost(1.0, 2.0, 0.0, peak=64 * 64 * 8.0, fill=0.9, rank=0.5)
    much = Cost(9.0, 9.0, 0.0, peak=0.0)
    costs = MatrixCosts({SQUARE: [Sample(64, 64, cost)], MatrixKind(1000, 1000): [Sample(1000, 1000, much)]})
    found = costs.of(MatrixKind(128, 64))
    assert (found.spectrum, found.encoding) == pytest.approx((2.0, 4.0))
    assert (found.peak, found.fill, found.rank) == (128 * 64 * 8, 0.9, 0.5)


def test_samples_fit_the_time_that_there_is() -> None:
    now, asked = 0.0, []

    def timed(kind: MatrixKind, rows: int, columns: int, number: int) -> Cost:
        nonlocal now
        asked.append((kind, rows, columns, number))
        seconds = 1e-9 * rows * columns * min(rows, columns)
        now += seconds
        return Cost(0.0, seconds, 0.0, 0.0)

    small, large, rare = MatrixKind(256, 512), MatrixKind(4096, 8192), MatrixKind(2048, 2048)
    costs = time_matrices({small: 9, large: 2, rare: 1}, timed, 12.0, lambda: now)
    assert now <= 12.5
    assert set(costs.samples) == {small, large, rare}
    assert all((s.rows, s.columns) == (256, 512) for s in costs.samples[small])  # whole, and several
    assert len(costs.samples[small]) > 1
    largest = costs.samples[large][-1]
    assert 1024 < largest.rows < 4096 and largest.columns == pytest.approx(2 * largest.rows, abs=2)
    assert costs.of(large).encoding == pytest.approx(1e-9 * large.work, rel=0.01)
    # However little time there is, one kind is timed, and the others follow.
    costs = time_matrices({small: 9, large: 2}, timed, 0.0, lambda: now)
    assert list(costs.samples) == [large]
    assert costs.of(small).encoding == pytest.approx(1e-9 * small.work, rel=0.02)


def plan_of(method: MethodConfig) -> tuple[CompressionPlan, dict[str, MatrixKind]]:
    """Three square matrices, one wide one that is four times as costly, and a norm."""
    kinds = {f"square.{n}.weight": SQUARE for n in range(3)} | {"wide.weight": WIDE}
    tensors = [TensorPlan(name, "encoded", (k.rows, k.columns), torch.bfloat16) for name, k in kinds.items()]
    tensors.append(TensorPlan("norm.weight", "kept", (64,), torch.bfloat16))
    size = sum(t.dense_bytes for t in tensors)
    return make_plan(tensors, method, size, 100, 100, 10**9), kinds


COSTS = MatrixCosts(
    {SQUARE: [Sample(64, 64, Cost(1.0, 2.0, 0.0, 1e6))], WIDE: [Sample(64, 128, Cost(4.0, 8.0, 0.0, 3e6))]}
)


def added_up(method: MethodConfig, **arguments: Any) -> Forecast:
    plan, kinds = plan_of(method)
    request = CompressionRequest(method, **arguments.pop("request", {}))
    times = RunTimes(opening=0.5, scan_rate=1024.0, price=3.0, calibration=7.0, training_speed=1e6)
    config = {"method": method.to_dict()}
    return forecast_of(plan, request, config, kinds, COSTS, times, kept_bytes=0, model_config={}, **arguments)


def test_times_are_those_of_the_matrices_added_up() -> None:
    method = ImPartRdConfig(compression_ratio=3)
    found = added_up(method, resident=10_000_000)
    stages = {stage.name: stage.seconds for stage in found.stages}
    scanned = 2 * (3 * 8192 + 16384 + 128) / 1024
    assert stages.pop("writing") > 0
    assert stages == pytest.approx(
        {"open and check": 0.5, "scan": scanned, "singular values": 7.0, "price": 3.0, "vectors and encoding": 14.0}
    )
    assert found.seconds == sum(stage.seconds for stage in found.stages)
    assert found.memory_bytes == 13_000_000
    assert added_up(method, resident=10_000_000, training_bytes=50_000_000).memory_bytes == 60_000_000
    assert added_up(method).memory_bytes is None


def test_the_processes_of_a_job_divide_what_is_shared_out() -> None:
    method = ImPartRdConfig(compression_ratio=3)
    one, two = added_up(method), added_up(method, process_count=2)
    for single, shared in zip(one.stages, two.stages, strict=True):
        least = {"singular values": 4.0, "vectors and encoding": 8.0}.get(single.name, 0.0)
        expected = max(single.seconds / 2, least) if single.shared else single.seconds
        assert shared.seconds == pytest.approx(expected)
    many = {stage.name: stage.seconds for stage in added_up(method, process_count=1000).stages}
    assert many["vectors and encoding"] == 8.0  # of the largest matrix, which one process encodes
    assert one.repository_bytes == two.repository_bytes


def test_stages_of_methods_and_texts() -> None:
    names = [stage.name for stage in added_up(LowRankConfig(compression_ratio=3)).stages]
    assert names == ["open and check", "scan", "vectors and encoding", "writing"]
    tokens = torch.zeros(8, 16, dtype=torch.int64)
    request = {"calibration": tokens, "distillation": tokens}
    found = added_up(ImPartRdConfig(compression_ratio=3), request=request)
    seconds = {stage.name: stage.seconds for stage in found.stages}
    assert list(seconds)[-3:] == ["calibration", "distillation", "writing"]
    assert seconds["calibration"] == 7.0
    fewer = added_up(ImPartRdConfig(compression_ratio=3), request=request | {"calibration": tokens[:4]})
    measuring = {stage.name: stage.seconds for stage in fewer.stages}["sensitivity"]
    assert measuring == pytest.approx(seconds["sensitivity"] / 2) and measuring > 0
    request["distillation"] = tokens[:, :8]
    shorter = added_up(ImPartRdConfig(compression_ratio=3), request=request)
    assert shorter.stages[-2].seconds == pytest.approx(seconds["distillation"] / 2)


def test_the_price_of_many_components_follows_from_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    method, asked = ImPartRdConfig(), []
    monkeypatch.setattr(ImPartRdConfig, "allocate", lambda self, spectra, most: asked.append((spectra, most)))
    ticks = iter([10.0, 12.0])
    seconds = price_seconds(method, [(SQUARE, 6000), (WIDE, 2000)], 0.1, lambda: next(ticks))
    ((spectra, most),) = asked
    components = sum(len(spectrum.sigma) for spectrum in spectra)
    assert components == 1 << 18 and most == int(0.1 * sum(s.rows * s.columns for s in spectra))
    assert seconds == pytest.approx(2.0 * 8000 * 64 / (1 << 18))


def test_the_command_prints_a_table_or_json(
    tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "compress",
        str(tiny_pair.base),
        str(tiny_pair.finetuned),
        str(tmp_path / "delta"),
        "--ratio",
        "3",
        "--dry-run",
    ]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("scan", "singular values", "peak memory", "disk while running", "result"))
    assert "the result takes at most" in text and "estimates" in text
    assert main([*command, "--json", "--processes", "4"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["process_count"] == 4 and content["free_bytes"] > 0
    assert [set(stage) for stage in content["stages"]] == [{"name", "seconds", "shared"}] * len(content["stages"])
    assert {(k["rows"], k["columns"], k["matrices"]) for k in content["timed"]} >= {(128, 64, 4), (64, 64, 4)}
    assert content["seconds"] == pytest.approx(sum(stage["seconds"] for stage in content["stages"]))
    assert not list(tmp_path.iterdir())


def test_options_without_effect_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = ("compress", "user/base", "user/finetuned", "out")
    assert "--processes" in failure(capsys, *command, "--processes", "2")
    assert "--push" in failure(capsys, *command, "--dry-run", "--push", "user/delta")
    assert "--quiet" in failure(capsys, *command, "--dry-run", "--quiet")
