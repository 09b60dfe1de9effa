"""Compression with distillation, from a user's call to the loaded model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from support.calibrated import HELD_OUT, MATRICES, RATIO, TEXT, divergence, method_of, refuses, run, take_up
from support.messages import naming
from support.tiny_models import Pair, load_tensors
from support.workspaces import Stop, break_off, counted_bytes, differing, finished

from impart_hf.cli.main import main
from impart_hf.common.progress import Progress
from impart_hf.distillation import DistillSettings
from impart_hf.methods import DareQtConfig, ImPartConfig, method_class
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.open import open_repository
from impart_hf.repository.verify import verify
from impart_hf.storage.workspace import Workspace

SETTINGS = DistillSettings(steps=12)
STEPS = {"distill": [TEXT], "distill_settings": SETTINGS, "calibration_samples": 24, "calibration_length": 32}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bitdelta", "impart", "impart-qt"])
def test_distilled_repositories(name: str, tiny_pair: Pair, tmp_path: Path) -> None:
    method = method_class(name)(compression_ratio=8)
    report = run(tiny_pair, tmp_path / "distilled", method, **STEPS)
    plain = run(tiny_pair, tmp_path / "plain", method)
    distilled = report.distilled
    assert plain.distilled is None and distilled is not None
    assert distilled.after < distilled.before and 0 < distilled.best_step <= distilled.steps <= 12
    assert json.loads(json.dumps(report.to_dict()))["distilled"]["after"] == distilled.after
    assert report.method["distillation"] == "codes, 12 steps, 24 x 32 tokens"
    assert method_of(tmp_path / "distilled") == json.loads(json.dumps(report.method))
    # The same tensors of the same sizes; another scale is in them.
    files = [load_tensors(tmp_path / name) for name in ("distilled", "plain")]
    changed = [n for n in files[1] if n.endswith(".delta") and not torch.equal(files[0][n], files[1][n])]
    assert len(changed) == MATRICES
    stated = f"{distilled.before:.4f}, {distilled.after:.4f}"
    cards = [ModelCard.load(tmp_path / name / "README.md").text for name in ("distilled", "plain")]
    line = "KL to the fine-tune on held-out text, before and after distillation"
    assert f"| {line} | {stated} |" in cards[0] and line not in cards[1]
    assert report.repository_bytes == counted_bytes(tmp_path / "distilled")
    found = [divergence(tmp_path / name, tiny_pair.finetuned) for name in ("distilled", "plain")]
    assert found[0] < found[1]
    verify(open_repository(str(tmp_path / "distilled"), HubOptions(), None), Progress(False))


def test_scales_cost_no_byte(tiny_pair: Pair, tmp_path: Path) -> None:
    """Records are as long as without distillation, where the card does not take what it needs from their budget."""
    method = method_class("bitdelta")(compression_ratio=4)  # a bit an entry, whatever the budget
    run(tiny_pair, tmp_path / "distilled", method, **STEPS)
    run(tiny_pair, tmp_path / "plain", method)
    sizes = [(tmp_path / name / "delta_model.safetensors").stat().st_size for name in ("distilled", "plain")]
    assert sizes[0] == sizes[1]


def test_calibration_and_distillation_together(tiny_pair: Pair, tmp_path: Path) -> None:
    method = DareQtConfig(compression_ratio=RATIO)
    report = run(tiny_pair, tmp_path / "delta", method, calibration=[HELD_OUT], **STEPS)
    assert report.method["calibration"] == "24 x 32 tokens"
    assert report.method["distillation"] == "codes, 12 steps, 24 x 32 tokens"
    assert report.distilled.after <= report.distilled.before


def test_the_command_tells_what_distillation_did(
    tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    command = ["compress", str(tiny_pair.base), str(tiny_pair.finetuned), str(tmp_path / "delta"), "--quiet"]
    command += ["--method", "bitdelta", "--ratio", "8", "--distill", str(tmp_path / "text.txt"), "--steps", "5"]
    command += ["--calibration-samples", "16", "--calibration-length", "32"]
    assert main(command) == 0
    assert re.search(r"quality: KL .*\b0\.\d{4}.*\b0\.\d{4}", capsys.readouterr().out)
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["distilled"]["steps"] == 5 and report["distilled"]["after"] <= report["distilled"]["before"]


@pytest.fixture(scope="module")
def distilled(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an unbroken run gives."""
    output = tmp_path_factory.mktemp("distilled") / "delta"
    run(tiny_pair, output, ImPartConfig(compression_ratio=8), **STEPS)
    return output


@pytest.mark.slow
def test_distillation_is_the_same_again(tiny_pair: Pair, distilled: Path, tmp_path: Path) -> None:
    """Also into the same folder, where the first run's repository is replaced, not distilled further."""
    shutil.copytree(distilled, tmp_path / "delta")
    assert len(take_up(tiny_pair, tmp_path / "delta", ImPartConfig(compression_ratio=8), **STEPS)) == MATRICES
    assert differing(tmp_path / "delta", distilled) == []


@pytest.mark.slow
def test_a_run_broken_off_before_distillation_goes_on(tiny_pair: Pair, distilled: Path, tmp_path: Path) -> None:
    method = ImPartConfig(compression_ratio=8)
    output = tmp_path / "delta"
    break_off(lambda: run(tiny_pair, output, method, **STEPS), output, 7)
    assert len(take_up(tiny_pair, tmp_path / "delta", method, **STEPS)) == MATRICES - 7
    assert differing(tmp_path / "delta", distilled) == []


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in distillation", "while distilled records are kept", "after distillation"])
def test_a_run_broken_off_in_distillation_goes_on(where: str, tiny_pair: Pair, distilled: Path, tmp_path: Path) -> None:
    """From the records as they were before: scales trained twice would be other scales."""
    put, kept = Workspace.put_distilled, []

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise Stop

    def keep_some(self: Workspace, name: str, data: bytes) -> None:
        kept.append(name)
        if len(kept) > 5:
            raise Stop
        put(self, name, data)

    method, output = ImPartConfig(compression_ratio=8), tmp_path / "delta"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        if where == "in distillation":
            patch.setattr("impart_hf.distillation.record_trainer.train", stop)
        elif where == "after distillation":
            patch.setattr("impart_hf.compression.pipeline.write_repository", stop)
        else:
            patch.setattr(Workspace, "put_distilled", keep_some)
        run(tiny_pair, output, method, **STEPS)
    assert len(finished(output)) == MATRICES and not output.exists()
    assert take_up(tiny_pair, output, method, **STEPS) == []
    assert differing(output, distilled) == []
    assert [p.name for p in tmp_path.iterdir()] == ["delta"]


@pytest.mark.slow
def test_other_distillation_starts_afresh(tiny_pair: Pair, distilled: Path, tmp_path: Path) -> None:
    method = ImPartConfig(compression_ratio=8)
    output = tmp_path / "delta"
    break_off(
        lambda: run(tiny_pair, output, method, **{**STEPS, "distill_settings": DistillSettings(steps=11)}), output, 7
    )
    assert len(take_up(tiny_pair, tmp_path / "delta", method, **STEPS)) == MATRICES
    assert differing(tmp_path / "delta", distilled) == []


def test_what_distillation_cannot_do_shows_before_any_work(
    tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = ImPartConfig(compression_ratio=8)
    for settings, match in (
        (DistillSettings(training={"no_such_field": 1}), naming("'no_such_field'")),
        (
            DistillSettings(batch_size=8, training={"gradient_accumulation_steps": 3}),
            naming("batch_size", 8, 3),
        ),
    ):
        refuses(tiny_pair, tmp_path, ValueError, match, method, **{**STEPS, "distill_settings": settings})


@pytest.mark.process
def test_two_processes_distil_together(tiny_pair: Pair, distilled: Path, tmp_path: Path) -> None:
    """The gradient of a batch is the mean over the processes: the result is nearly that of one process."""
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["impart_hf.cli", "compress", str(tiny_pair.base), str(tiny_pair.finetuned), str(tmp_path / "delta")]
    command += ["--method", "impart", "--ratio", "8", "--distill", str(tmp_path / "text.txt"), "--steps", "12"]
    command += ["--calibration-samples", "24", "--calibration-length", "32", "--quiet"]
    launched = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert launched.stdout.count("quality: KL ") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta", "text.txt"]
    found = [divergence(folder, tiny_pair.finetuned) for folder in (tmp_path / "delta", distilled)]
    assert found[0] == pytest.approx(found[1], rel=0.2)


@pytest.mark.process
def test_only_distillation_waits_for_the_trainer() -> None:
    program = "import sys; import impart_hf.compression.compress; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert "transformers.trainer" not in loaded.stdout.split()
