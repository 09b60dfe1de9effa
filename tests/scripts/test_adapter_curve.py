"""The study of adapters by rank, on a tiny pair: what is measured, how it goes on, and its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.load_script import load_script
from support.tiny_models import fine_tune, make_model, save_model, tiny_config

pytest.importorskip("matplotlib")
pytest.importorskip("peft")
script = load_script("adapter_curve")
pytestmark = pytest.mark.scripts


def test_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_model(tiny_config("llama-tied", head_dim=32), dtype=torch.float32)
    save_model(base, tmp_path / "base")
    save_model(fine_tune(base, only=lambda name: "norm" not in name), tmp_path / "finetuned")
    text, report = tmp_path / "text.txt", tmp_path / "docs" / "results.md"
    text.write_text("A delta holds what fine-tuning changed. " * 60)
    report.parent.mkdir()
    report.write_text("By hand.\n<!-- adapter curve: begin -->\nold\n<!-- adapter curve: end -->\nAlso.\n")
    places = [str(tmp_path / name) for name in ("base", "finetuned", "out")]
    options = ["--text", str(text), "--samples", "4", "--length", "32", "--ratio", "6", "--calibration", "none"]
    arguments = script.parsed([*places, *options, "--ranks", "2,16", "--report", str(report)])
    script.main(arguments)
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    rows = {(line["kind"], line["rank"]): line for line in lines}
    assert len(rows) == len(lines) == 7
    for kind in script.KINDS:
        assert rows[kind, 16]["kl"] < rows[kind, 2]["kl"] < rows["delta", 0]["base_kl"]
    for rank in (2, 16):
        bounded = rows["bounded", rank]
        assert bounded["kl"] == pytest.approx(bounded["delta_kl"], rel=0.02)
        assert bounded["delta_bytes"] <= 1.02 * rows["delta", 0]["delta_bytes"]
        assert rows["budget", rank]["adapter_bytes"] <= rows["cut", rank]["adapter_bytes"]
    assert "old" not in report.read_text() and "| bounded | 16 |" in report.read_text()
    assert (report.parent / "adapter-curve.png").stat().st_size > 1000

    def fail(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(script, "_Study", fail)
    script.main(arguments)
