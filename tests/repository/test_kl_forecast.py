"""The forecast of the KL without a text: where it comes from, where it is shown, and that it is no measurement."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.random_deltas import make_delta
from support.tiny_models import Pair, load_tensors
from support.workspaces import break_off, differing

from impart_hf import BitDeltaConfig, ImPartRdConfig, LowRankConfig, compress
from impart_hf.coding.records import empty_record
from impart_hf.methods import MethodConfig, method_class, method_names
from impart_hf.modeling.delta_decode import decode_record
from impart_hf.modeling.delta_file import RECORD_SUFFIX, DeltaFile
from impart_hf.modeling.delta_record import DIRECT, parse_stack
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.inspection import Inspection
from impart_hf.repository.kl_forecast import SPREAD, Losses, TensorErrors, forecast_text, kl_forecast

RESULTS = Path(__file__).parents[2] / "docs" / "methods" / "kl-forecast.jsonl"
USUAL = TensorErrors(0.1, 0.2, 0.8, direct=False, vocabulary=False)


@pytest.mark.parametrize("name", method_names())
def test_records_say_what_is_missing(name: str) -> None:

    delta = make_delta(48, 64)
    encoded = method_class(name)(compression_ratio=8).encode(delta, delta.numel() * 2 // 8, 3)
    decoded = decode_record(parse_stack(np.frombuffer(encoded.data, np.uint8), "d")[0], "d")
    missing = 1 - float((decoded.double() * delta.double()).sum() / delta.double().square().sum())
    assert encoded.record.dropped == pytest.approx(missing, abs=1e-5)


def test_a_record_of_nothing_misses_everything() -> None:
    assert empty_record(8, 8, 1.0).dropped == 1 and empty_record(8, 8).dropped == 0


def test_every_error_counts() -> None:
    share = Losses.of([USUAL]).share()
    for worse in ({"dropped": 0.3}, {"relative_error": 0.9}, {"relative_norm": 0.2}):
        assert Losses.of([replace(USUAL, **worse)]).share() > share
    embedding = replace(USUAL, vocabulary=True)
    assert Losses.of([USUAL, embedding]).share() > share > Losses.of([USUAL, replace(USUAL, dropped=0.0)]).share()
    stack = replace(USUAL, dropped=0.0, relative_error=0.5, matrices=3)
    assert Losses.of([USUAL, stack]).missing == pytest.approx(0.2 / 4)
    assert Losses.of([replace(USUAL, dropped=1.0, relative_error=9.0)]).share() == 1


def test_nothing_lost_is_no_forecast() -> None:
    assert kl_forecast([]) is None and kl_forecast([replace(USUAL, dropped=0.0, relative_error=0.0)]) is None


def test_nine_of_ten_measured_runs_are_within_the_spread() -> None:
    lines = [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()]
    base = {line["pair"]: line["kl"] for line in lines if line["method"] == "base"}
    off = []
    for line in lines:
        if line["method"] != "base":
            losses = Losses(line["missing"], line["missing_tokens"], line["shrunken"], line["noise"])
            off.append(abs(math.log(losses.share() * base[line["pair"]] / line["kl"])))
    assert sum(one <= math.log(SPREAD) for one in off) >= 0.9 * len(off) >= 30


def errors_of(pair: Pair, repository: Path) -> Iterator[TensorErrors]:
    """The errors as they are in the files, by other code than the writer's."""
    base, finetuned = load_tensors(pair.base), load_tensors(pair.finetuned)
    file = DeltaFile(sorted(repository.glob("*.safetensors")))
    for entry in file.names():
        if entry.endswith(RECORD_SUFFIX):
            name = entry.removesuffix(RECORD_SUFFIX)
            whole = finetuned[name].double()
            delta = whole - base[name].double()
            (record,) = parse_stack(file.read_records(name), name)
            decoded = decode_record(record, name).double()
            missing = 1 - float((decoded * delta).sum() / delta.square().sum())
            error = float((decoded - delta).norm() / delta.norm())
            vocabulary = "embed_tokens" in name or "lm_head" in name
            norm = float(delta.norm() / whole.norm())
            yield TensorErrors(norm, missing, error, record.layout == DIRECT, vocabulary)


@pytest.mark.parametrize("method", [ImPartRdConfig(16), BitDeltaConfig(16)])
def test_it_is_of_what_was_written_and_shown_everywhere(tiny_pair: Pair, tmp_path: Path, method: MethodConfig) -> None:
    out = tmp_path / "delta"
    report = compress(str(tiny_pair.base), str(tiny_pair.finetuned), out, method)
    stored = json.loads((out / "config.json").read_text("utf-8"))["method"]["kl_forecast"]
    calibrated = report.inputs["calibrated"] > 0
    assert calibrated == isinstance(method, ImPartRdConfig)
    expected = kl_forecast(errors_of(tiny_pair, out), calibrated)
    assert stored == report.method["kl_forecast"] == pytest.approx(expected, rel=0.06)
    inspection = Inspection(str(out), HubOptions())
    assert inspection.to_dict()["method"]["kl_forecast"] == stored
    text = forecast_text(stored)
    for shown in (inspection.table(), (out / "README.md").read_text("utf-8")):
        (line,) = [line for line in shown.splitlines() if text in line]
        assert "forecast" in line and "not measured" in line and "kl_forecast" not in shown


def test_it_is_that_of_an_unbroken_run_after_a_resumed_one(tiny_pair: Pair, tmp_path: Path) -> None:
    def run(out: Path) -> None:
        compress(str(tiny_pair.base), str(tiny_pair.finetuned), out, LowRankConfig(8))

    run(tmp_path / "unbroken")
    break_off(lambda: run(tmp_path / "resumed"), tmp_path / "resumed", 2)
    run(tmp_path / "resumed")
    assert differing(tmp_path / "unbroken", tmp_path / "resumed") == []


def test_half_with_calibration() -> None:
    (_, without, _), (_, with_text, _) = kl_forecast([USUAL]) or (), kl_forecast([USUAL], calibrated=True) or ()
    assert with_text == pytest.approx(without / 2, rel=0.06)
