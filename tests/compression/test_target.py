"""Compression to a target instead of a ratio, from a user's call to the repository that it leaves."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from support.commands import failure
from support.messages import naming
from support.refusals import refuses
from support.tiny_models import Pair, save_pair, tiny_config, tiny_tokenizer
from support.workspaces import Stop, differing, hidden

from impart_hf import (
    BitDeltaConfig,
    DareQtConfig,
    DistillSettings,
    ImPartRdConfig,
    LowRankConfig,
    QualityTarget,
    compress,
)
from impart_hf.calibration.text import calibration_tokens
from impart_hf.cli.main import main
from impart_hf.common.progress import Progress
from impart_hf.compression import budgets, encoding
from impart_hf.compression.pair import ModelPair
from impart_hf.evaluation.metrics import evaluate, load
from impart_hf.evaluation.reference import Reference
from impart_hf.methods import MethodConfig
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.open import open_repository
from impart_hf.repository.report import CompressionReport
from impart_hf.repository.verify import verify

pytestmark = pytest.mark.xdist_group("targets")

TEXT = Path(str(textwrap.__file__)).read_text("utf-8")
SIZE: dict[str, Any] = {"samples": 8, "length": 32}
MAX_KL = 0.02  # that leading components reach; impart-rd a twentieth of it
RD_KL = MAX_KL / 20
MATRICES = 16
# What a user's script does; it lives in a process of its own to be killed.
CHILD = """
import sys
from impart_hf import LowRankConfig, QualityTarget, compress
target = QualityTarget(sys.argv[4], max_kl=float(sys.argv[5]), samples=8, length=32)
compress(*sys.argv[1:4], LowRankConfig(), target=target)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair with room between its highest and its lowest ratio; not to be written to."""
    config = tiny_config("llama", hidden_size=96, intermediate_size=128, num_key_value_heads=4)
    return save_pair(tmp_path_factory.mktemp("pair"), config)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held out.txt"
    path.write_text(TEXT, "utf-8")
    return path


def run(
    pair: Pair, output: Path, method: MethodConfig | None = None, *, limits: dict[str, Any] | None = None, **kwargs: Any
) -> CompressionReport:
    target = QualityTarget([TEXT], **SIZE, **(limits or {"max_kl": MAX_KL}))
    return compress(str(pair.base), str(pair.finetuned), output, method or LowRankConfig(), target=target, **kwargs)


def measured(pair: Pair, repository: Path) -> tuple[float, float, float]:
    """Cross-entropy of the fine-tune and of a delta, and KL, as a user would measure them."""
    tokens = calibration_tokens([TEXT], tiny_tokenizer(), **SIZE)
    delta, tuned = (load(str(folder), torch.bfloat16, "cpu") for folder in (repository, pair.finetuned))
    perplexity, divergence = evaluate(delta, tuned, tokens, 8)
    return math.log(evaluate(tuned, None, tokens, 8)[0]), math.log(perplexity), divergence


@pytest.fixture(scope="module")
def searched(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CompressionReport, Path, list]]:
    """A search, its repository, and what was decomposed and scanned meanwhile."""
    output, done = tmp_path_factory.mktemp("searched") / "delta", []
    values, scan = budgets.singular_values, importlib.import_module("impart_hf.compression.pair").scan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budgets, "singular_values", lambda m: done.append("values") or values(m))
        patch.setattr("impart_hf.compression.pair.scan", lambda *args: done.append("scan") or scan(*args))
        report = run(pair, output, ImPartRdConfig(), limits={"max_kl": RD_KL})
    yield report, output, done


def test_the_repository_keeps_the_target(pair: Pair, searched: tuple) -> None:
    report, output, _ = searched
    found = report.target
    reference, loss, divergence = measured(pair, output)
    assert found.measured == found.chosen.kl == pytest.approx(divergence, rel=1e-4) and divergence <= RD_KL
    assert (found.reference_loss, found.chosen.loss) == pytest.approx((reference, loss), rel=1e-4)
    assert found.limit == RD_KL and found.tokens == 8 * 31 and found.remark == ""
    assert report.method["compression_ratio"] == found.chosen.ratio
    # Hardly more compression would have broken it.
    above = [tried for tried in found.tried if tried.ratio > found.chosen.ratio]
    assert above and all(tried.kl > RD_KL for tried in above)
    assert found.measured > 0.9 * RD_KL and 2 <= found.evaluations <= 8
    verify(open_repository(str(output), HubOptions(), None), Progress(False))
    assert [path.name for path in output.parent.iterdir()] == ["delta"]


def test_what_is_recorded(searched: tuple) -> None:
    report, output, _ = searched
    found = report.target
    config = json.loads((output / "config.json").read_text("utf-8"))
    assert config["method"] == json.loads(json.dumps(report.method))
    for part in (f"{RD_KL:g} nats/token", "1 texts", f"{found.measured:.4g}", f"{found.evaluations} ratios"):
        assert part in config["method"]["target"]
    card = ModelCard.load(output / "README.md")
    entry = card.data.to_dict()["impart_hf_target"]
    assert entry["evaluations"] == len(entry["tried"]) == found.evaluations and entry["text"] == "1 texts"
    assert [row["ratio"] for row in entry["tried"]] == [tried.ratio for tried in found.tried]
    assert entry["measured"] == pytest.approx(found.measured, rel=1e-3) and str(RD_KL) in entry["target"]
    assert f"{found.measured:.4g} measured" in card.text and f"requested {found.chosen.ratio:g}" in card.text
    assert "||" not in "".join(line for line in card.text.splitlines() if line.startswith("| method"))
    counted = sum((output / name).stat().st_size for name in ("delta_model.safetensors", "config.json"))
    assert report.repository_bytes - counted >= (output / "README.md").stat().st_size
    as_json = json.loads(json.dumps(report.to_dict()))
    assert as_json["target"]["evaluations"] == found.evaluations
    assert as_json["target"]["chosen"]["kl"] == found.measured
    assert [tensor.notes for tensor in report.tensors] == [tensor["notes"] for tensor in as_json["tensors"]]


def test_everything_is_scanned_and_decomposed_once(searched: tuple) -> None:
    report, _, done = searched
    assert sorted(done) == ["scan", *["values"] * MATRICES] and report.target.evaluations > 1


def test_what_is_published_is_what_was_measured(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: dict[float, bytes] = {}
    load = ModelPair.load

    def watched(pair: ModelPair, repository: Path | None = None) -> Any:
        if repository is not None:
            ratio = json.loads((repository / "config.json").read_text("utf-8"))["method"]["compression_ratio"]
            judged[ratio] = (repository / "delta_model.safetensors").read_bytes()
        return load(pair, repository)

    monkeypatch.setattr(ModelPair, "load", watched)
    found = run(pair, tmp_path / "delta").target
    assert (
        found is not None and list(judged) == [tried.ratio for tried in found.tried] and len(set(judged.values())) > 1
    )
    assert (tmp_path / "delta" / "delta_model.safetensors").read_bytes() == judged[found.chosen.ratio]


@pytest.mark.parametrize("limit", ["0.2%", 0.05])
def test_cross_entropy(limit: float | str, pair: Pair, tmp_path: Path) -> None:
    found = run(pair, tmp_path / "delta", BitDeltaConfig(), limits={"max_loss_increase": limit}).target
    reference, loss, _ = measured(pair, tmp_path / "delta")
    allowed = 0.002 * reference if isinstance(limit, str) else limit
    assert found is not None and found.limit == pytest.approx(allowed, rel=1e-4)
    assert found.measured == pytest.approx(loss - reference, abs=1e-4) and found.measured <= found.limit
    assert all(tried.loss - found.reference_loss > allowed for tried in found.tried if tried.ratio > found.chosen.ratio)


def test_calibrated(pair: Pair, tmp_path: Path) -> None:
    given = {"calibration": [TEXT], "calibration_samples": 8, "calibration_length": 32}
    report = run(pair, tmp_path / "delta", DareQtConfig(), limits={"max_kl": 100.0}, **given)
    assert report.method["calibration"] == "8 x 32 tokens" and report.target is not None
    assert measured(pair, tmp_path / "delta")[2] == pytest.approx(report.target.measured, rel=1e-4)


@pytest.mark.slow
def test_distilled(pair: Pair, tmp_path: Path) -> None:
    given = {"distill": [TEXT], "calibration_samples": 16, "calibration_length": 32}
    report = run(pair, tmp_path / "delta", distill_settings=DistillSettings(steps=4), **given)
    assert report.distilled is not None and report.target is not None and report.target.evaluations > 1
    assert measured(pair, tmp_path / "delta")[2] == pytest.approx(report.target.measured, rel=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta"]


def test_a_loose_target_ends_at_the_highest_ratio(pair: Pair, tmp_path: Path) -> None:
    report = run(pair, tmp_path / "delta", limits={"max_kl": 100.0})
    found = report.target
    assert found is not None and re.search(naming("highest", f"{found.chosen.ratio:g}"), found.remark)
    assert found.chosen.ratio == max(tried.ratio for tried in found.tried) and found.evaluations <= 3
    assert report.shortfall == "" and report.repository_bytes < report.checkpoint_bytes / 10


def test_the_fine_tune_is_the_base(pair: Pair, tmp_path: Path) -> None:
    report = run(Pair(pair.base, pair.base), tmp_path / "delta")
    assert report.target is not None and report.tensors == []
    assert report.target.measured == 0 and report.target.evaluations == 1
    assert "no matrix differs" in report.target.remark


def test_an_older_repository_is_replaced(pair: Pair, searched: tuple, tmp_path: Path) -> None:
    shutil.copytree(searched[1], tmp_path / "delta")
    run(pair, tmp_path / "delta", limits={"max_kl": 100.0})
    assert "lowrank" in (tmp_path / "delta" / "config.json").read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]


# --- stopped and resumed


@pytest.fixture(scope="module")
def unbroken(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[CompressionReport, Path]:
    output = tmp_path_factory.mktemp("unbroken") / "delta"
    return run(pair, output), output


def counting(patch: pytest.MonkeyPatch, stop_at: int | None = None) -> dict[str, int]:
    """Count measurements and encoded tensors; the measurement of this number is stopped before it begins."""
    counts = {"measured": 0, "encoded": 0}
    compare, tasks_of = Reference.compare, encoding.tasks_of

    def compared(*args: Any) -> Any:
        counts["measured"] += 1
        if counts["measured"] == stop_at:
            raise Stop
        return compare(*args)

    def encoded(*args: Any) -> Any:
        counts["encoded"] += 1
        return tasks_of(*args)

    patch.setattr(Reference, "compare", compared)
    patch.setattr(encoding, "tasks_of", encoded)
    return counts


def test_a_stopped_search_goes_on(pair: Pair, unbroken: tuple[CompressionReport, Path], tmp_path: Path) -> None:
    """What was measured is not measured again, and a repository that was made is not made again."""
    report, repository = unbroken
    assert report.target is not None and (count := report.target.evaluations) > 2
    output, encoded = tmp_path / "delta", 0
    for _ in range(2):  # the second run goes on with the same candidate
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            counts = counting(patch, stop_at=3 if not encoded else 1)
            run(pair, output)
        encoded += counts["encoded"]
    assert hidden(output).exists() and not output.exists()
    with pytest.MonkeyPatch.context() as patch:
        counts = counting(patch)
        resumed = run(pair, output)
    assert counts["measured"] == count - 2 and encoded == 3 * MATRICES
    assert counts["encoded"] == (count - 3) * MATRICES
    assert differing(output, repository) == [] and resumed.target is not None
    assert [t.ratio for t in resumed.target.tried] == [t.ratio for t in report.target.tried]
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]


def test_stopped_within_a_candidate(pair: Pair, unbroken: tuple[CompressionReport, Path], tmp_path: Path) -> None:
    output, tasks_of, left = tmp_path / "delta", encoding.tasks_of, iter(range(MATRICES + 5))

    def stopping(*args: Any) -> Any:
        if next(left, None) is None:
            raise Stop
        return tasks_of(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(encoding, "tasks_of", stopping)
        run(pair, output)
    with pytest.MonkeyPatch.context() as patch:
        counts = counting(patch)
        report = run(pair, output)
    assert report.target is not None
    assert counts["encoded"] == report.target.evaluations * MATRICES - MATRICES - 5
    assert differing(output, unbroken[1]) == []


def test_another_target_starts_anew(pair: Pair, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        counting(patch, stop_at=2)
        run(pair, tmp_path / "delta")
    with pytest.MonkeyPatch.context() as patch:
        counts = counting(patch)
        report = run(pair, tmp_path / "delta", limits={"max_kl": 100.0})
    assert report.target is not None and counts["measured"] == report.target.evaluations


def test_a_lost_repository_is_made_again(pair: Pair, unbroken: tuple[CompressionReport, Path], tmp_path: Path) -> None:
    """As after a kill between the last two renames."""
    report, repository = unbroken
    assert report.target is not None
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        counting(patch, stop_at=report.target.evaluations)
        run(pair, tmp_path / "delta")
    for folder in (hidden(tmp_path / "delta") / "candidates").glob("ratio-*/"):
        shutil.rmtree(folder)
    run(pair, tmp_path / "delta")
    assert differing(tmp_path / "delta", repository) == []


@pytest.mark.process
@pytest.mark.slow
def test_a_killed_search_goes_on(pair: Pair, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "delta"
    command = [sys.executable, "-c", CHILD, str(pair.base), str(pair.finetuned), str(output), str(text), str(MAX_KL)]
    child = subprocess.Popen(command)
    tried, deadline = hidden(output) / "candidates" / "tried.json", time.monotonic() + 120
    try:
        while not tried.exists():
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        child.kill()
    assert child.wait() == -signal.SIGKILL and not output.exists()
    with pytest.MonkeyPatch.context() as patch:
        counts = counting(patch)
        target = QualityTarget(str(text), max_kl=MAX_KL, **SIZE)
        report = compress(str(pair.base), str(pair.finetuned), output, LowRankConfig(), target=target)
    assert report.target is not None and counts["measured"] < report.target.evaluations
    assert measured(pair, output)[2] == pytest.approx(report.target.measured, rel=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]


# --- what is refused


@pytest.mark.parametrize(
    ("limits", "names"),
    [
        ({}, ("max_kl", "max_loss_increase")),
        ({"max_kl": 0.1, "max_loss_increase": 0.1}, ("max_kl", "max_loss_increase")),
        ({"max_kl": 0}, ("max_kl", 0)),
        ({"max_kl": -0.001}, ("max_kl", -0.001)),
        ({"max_kl": math.nan}, ("max_kl", "nan")),
        ({"max_kl": math.inf}, ("max_kl", "inf")),
        ({"max_kl": "0.1"}, ("max_kl", "'0.1'")),
        ({"max_loss_increase": "0%"}, ("max_loss_increase", "'0%'")),
        ({"max_loss_increase": "-1%"}, ("max_loss_increase", "'-1%'")),
        ({"max_loss_increase": "nan"}, ("max_loss_increase", "'nan'")),
        ({"max_loss_increase": "half"}, ("max_loss_increase", "'half'")),
        ({"max_loss_increase": True}, ("max_loss_increase", True)),
        ({"max_loss_increase": -0.1}, ("max_loss_increase", -0.1)),
        ({"max_kl": 0.1, "samples": 0}, ("samples", 0)),
        ({"max_kl": 0.1, "length": 1}, ("length", 1)),
        ({"max_kl": 0.1, "batch_size": 0}, ("batch_size", 0)),
        ({"max_kl": 0.1, "validation": None}, ("validation", None)),
    ],
    ids=str,
)
def test_targets_that_are_none(limits: dict[str, Any], names: tuple) -> None:
    with pytest.raises(ValueError, match=naming(names)) as caught:
        QualityTarget(**{"validation": [TEXT], **limits})
    assert "\n" not in str(caught.value)


def test_what_a_number_means() -> None:
    for given, limit in (("0.5%", 0.01), ("50 %", 1.0), ("0.5", 0.5), (0.5, 0.5), (1, 1.0)):
        target = QualityTarget([TEXT], max_loss_increase=given)
        assert target.limit(2.0) == pytest.approx(limit) and target.measured(9.0, 2.25, 2.0) == 0.25
    target = QualityTarget([TEXT], max_kl=0.001)
    assert target.limit(2.0) == 0.001 and target.measured(9.0, 2.25, 2.0) == 9.0


def test_unreachable_targets_leave_nothing(pair: Pair, tmp_path: Path) -> None:
    target = QualityTarget([TEXT], max_kl=1e-12, **SIZE)
    match = naming("1e-12", "1 texts", 1.5, "'lowrank'")
    refuses(pair, ValueError, match, tmp_path / "delta", root=tmp_path, method=LowRankConfig(), target=target)
    # A bit for each entry, whatever the budget: it is seen from two ratios that more bytes do not help.
    target = QualityTarget([TEXT], max_kl=1e-4, **SIZE)
    method = BitDeltaConfig(compression_ratio=8, embeddings="method")
    message = refuses(pair, ValueError, naming("2 ratios", "'bitdelta'"), tmp_path / "delta", root=tmp_path,
                      method=method, target=target)  # fmt: skip
    assert "kB" in message and "choose another method" in message


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"target": QualityTarget([TEXT], 0.1, **SIZE), "max_bytes": "50KB"}, ("target", "max_bytes")),
        ({"target": QualityTarget(["short"], 0.1, **SIZE)}, ("text", 32)),
        ({"target": QualityTarget([TEXT], 0.1, **SIZE), "device": "cuda:99"}, ("device", "'cuda:99'")),
    ],
    ids=["max_bytes", "short text", "device"],
)
def test_bad_input(arguments: dict[str, Any], names: tuple, pair: Pair, tmp_path: Path) -> None:
    refuses(pair, ValueError, naming(names), tmp_path / "delta", root=tmp_path, **arguments)


def test_a_missing_text(pair: Pair, tmp_path: Path) -> None:
    target = QualityTarget("/gone/text.txt", 0.1)
    refuses(pair, FileNotFoundError, naming("'/gone/text.txt'"), tmp_path / "delta", root=tmp_path, target=target)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    """Its tokens are not all in the model's vocabulary, which is seen before anything is encoded."""
    config = tiny_config("llama", vocab_size=64)
    pair = save_pair(tmp_path / "pair", config)
    target = QualityTarget([TEXT], 0.1, **SIZE)
    refuses(pair, ValueError, naming("token", "vocabulary", 64), tmp_path / "delta", root=tmp_path, target=target)


# --- from the shell


def command(pair: Pair, output: Path, *more: str) -> list[str]:
    return ["compress", str(pair.base), str(pair.finetuned), str(output), "--method", "lowrank", *more]


def test_the_command(pair: Pair, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-kl", str(MAX_KL), "--validation", str(text), "--samples", "8", "--length", "32"]
    assert main(command(pair, tmp_path / "delta", *options)) == 0
    printed = capsys.readouterr()
    (line,) = (line for line in printed.out.splitlines() if line.startswith("target kept"))
    assert re.search(naming(MAX_KL, text.name), line)
    rows = printed.out.splitlines()[printed.out.splitlines().index(line) + 2 :]
    count = len(re.findall(r"^ratio [\d.]+: .* of 0.02 nats/token", printed.err, re.MULTILINE))
    ratios = [float(row.split()[0]) for row in rows[:count]]
    assert count > 2 and ratios == sorted(ratios)
    assert len([row for row in rows if row.endswith("chosen")]) == 1
    options[1] = "100"
    assert main(command(pair, tmp_path / "delta", *options, "--batch-size", "3", "--quiet", "--json")) == 0
    found = json.loads(capsys.readouterr().out)["target"]
    assert found["text"] == text.name and found["limit"] == 100 and "highest" in found["remark"]


def test_the_command_refuses_in_one_line(
    pair: Pair, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = ["--max-kl", "1e-12", "--validation", str(text), "--samples", "8", "--length", "32"]
    line = failure(capsys, *command(pair, tmp_path / "delta", "--quiet", *limit))
    assert re.search(naming("1e-12", text.name, "'lowrank'"), line)
    assert list(tmp_path.iterdir()) == []
