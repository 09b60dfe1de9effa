"""Options that have no effect in a combination are refused, also at their default values, and nothing is loaded."""

from pathlib import Path

import pytest
from support.commands import failure

MERGE = """
merge_method: {method}
base_model: {folder}
models: [user/fine-tune]
"""
PAIR = ("user/base", "user/finetuned", "out")


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """What stands for files in the arguments."""
    for method in ("ties", "task_arithmetic", "dare_linear"):
        (tmp_path / f"{method}.yaml").write_text(MERGE.format(method=method, folder=tmp_path))
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "config.json").write_text('{"pruning": {"steps": []}}')
    return {
        "PRUNED": str(tmp_path / "pruned"),
        "FOLDER": str(tmp_path),
        **{p.stem.upper(): str(p) for p in tmp_path.glob("*.yaml")},
    }


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("diff", "user/a", "--base-revision", "main"), ["--base-revision", "--revision"]),
        (("diff", "user/a", "FOLDER", "--revision", "main"), ["--revision", "FOLDER"]),
        (("diff", "FOLDER", "user/a", "--base-revision", "main"), ["--base-revision", "FOLDER"]),
        (("diff", "FOLDER", "PRUNED", "--token", "hf_x", "--cache-dir", "c"), ["--token, --cache-dir"]),
        (("compress", *PAIR, "--steps", "300"), ["--steps", "--distill TEXT"]),
        (("compress", *PAIR, "--trains", "codes", "--distill-batch-size", "8"), ["--trains, --distill-batch-size"]),
        (("compress", *PAIR, "--training", "training.json"), ["--training"]),
        (
            ("compress", *PAIR, "--method", "impart-qt", "--calibration-samples", "128"),
            ["--calibration-samples", "--distill"],
        ),
        (("compress", *PAIR, "--calibration", "none", "--calibration-length", "2048"), ["--calibration-length"]),
        (("compress", *PAIR, "--method", "dare", "--calibration", "text.txt"), ["--calibration", "dare"]),
        (("compress", *PAIR, "--method", "dare", "--beta", "0.6"), ["--beta", "impart", "dare"]),
        (("compress", *PAIR, "--method", "lowrank", "--seed", "0"), ["--seed", "lowrank"]),
        (("compress", *PAIR, "--ratio", "32", "--max-bytes", "1MB"), ["--ratio", "--max-bytes"]),
        (("compress", *PAIR, "--max-kl", "0.1"), ["--max-kl", "--validation"]),
        (("compress", *PAIR, "--max-loss-increase", "1%"), ["--max-loss-increase", "--validation"]),
        (("compress", *PAIR, "--validation", "t"), ["--validation", "--max-kl", "--max-loss-increase"]),
        (("compress", *PAIR, "--samples", "64", "--batch-size", "8"), ["--samples, --batch-size", "--max-kl"]),
        (
            ("compress", *PAIR, "--max-kl", "1", "--max-loss-increase", "1", "--validation", "t"),
            ["max_kl", "max_loss_increase"],
        ),
        (("compress", *PAIR, "--max-kl", "1", "--validation", "t", "--ratio", "32"), ["--ratio", "--max-kl"]),
        (("compress", *PAIR, "--max-kl", "1", "--validation", "t", "--max-bytes", "1MB"), ["--max-bytes", "--max-kl"]),
        (("compress", *PAIR, "--max-kl", "1", "--validation", "t", "--dry-run"), ["--max-kl", "--ratio", "several"]),
        (("compress", *PAIR, "--max-kl", "0", "--validation", "t"), ["max_kl", "0"]),
        (("compress", *PAIR, "--max-kl", "nan", "--validation", "t"), ["max_kl", "nan"]),
        (("compress", *PAIR, "--max-loss-increase=-1%", "--validation", "t"), ["max_loss_increase", "-1%"]),
        (("compress", *PAIR, "--private"), ["--private", "--push"]),
        (("compress", "user/base", "FOLDER", "out", "--revision", "main"), ["--revision", "FOLDER"]),
        (("compress", "FOLDER", "user/ft", "out", "--base-revision", "main"), ["--base-revision", "--base-name"]),
        (("compress", *PAIR, "--text-field", "body"), ["--text-field"]),
        (("compress", *PAIR, "--calibration", "text.txt", "--text-field", "body"), ["--text-field", ".txt"]),
        (("tune", *PAIR, "--task", "arc_easy", "--text-field", "body"), ["--text-field"]),
        (("evaluate", "user/a", "--task", "arc_easy", "--text-field", "body"), ["--text-field"]),
        (("prune", "importance", "user/a", "--data", "text.txt", "--text-field", "body"), ["--text-field"]),
        (("prune", "width", "user/a", "out", "--ratio", "0.2", "--text-field", "body"), ["--text-field"]),
        (("tune", *PAIR, "--task", "arc_easy", "--samples", "64"), ["--samples", "--validation"]),
        (("tune", *PAIR, "--task", "arc_easy", "--length", "512"), ["--length", "--validation"]),
        (("tune", *PAIR, "--validation", "text.txt", "--limit", "9"), ["--limit", "--task"]),
        (("tune", *PAIR, "--validation", "text.txt", "--calibration", "text.txt"), ["--calibration", "impart"]),
        (("tune", *PAIR, "--validation", "text.txt", "--calibration-length", "9"), ["--calibration-length"]),
        (("merge", "TIES", "out", "--embeddings", "lowrank"), ["--embeddings", "--method"]),
        (("merge", "TIES", "out", "--seed", "0"), ["--seed", "--method"]),
        (("merge", "TIES", "out", "--ratio", "32"), ["--ratio", "--method"]),
        (("merge", "TIES", "out", "--max-bytes", "1MB"), ["--max-bytes", "--method"]),
        (("merge", "TIES", "out", "--push", "user/merged"), ["--push", "--method"]),
        (("merge", "TIES", "out", "--private"), ["--private"]),
        (("merge", "TIES", "out", "--base-name", "user/base"), ["--base-name", "--method"]),
        (("merge", "TIES", "out", "--method", "delta-come", "--seed", "0"), ["--seed", "delta-come"]),
        (("tune-merge", "TIES", "out", "--validation", "a=b", "--densities", "0.9"), ["--densities", "ties"]),
        (("tune-merge", "DARE_LINEAR", "out", "--validation", "a=b", "--trims", "0.4"), ["--trims", "dare_linear"]),
        (("inspect", "FOLDER", "--revision", "main"), ["--revision", "FOLDER"]),
        (("verify", "FOLDER", "--revision", "main"), ["--revision", "FOLDER"]),
        (("reconstruct", "FOLDER", "out", "--revision", "main"), ["--revision", "FOLDER"]),
        (("flatten", "FOLDER", "out", "--revision", "main"), ["--revision", "FOLDER"]),
        (("flatten", "user/delta", "out", "--private"), ["--private", "--push"]),
        (("export-lora", "FOLDER", "out", "--revision", "main"), ["--revision", "FOLDER"]),
        (("evaluate", "FOLDER", "--revision", "main"), ["--revision", "FOLDER"]),
        (("evaluate", "user/a", "--task", "arc_easy", "--samples", "64"), ["--samples", "--text"]),
        (("evaluate", "user/a", "--latency", "--batch-size", "8"), ["--batch-size", "--text", "--task"]),
        (("evaluate", "user/a", "--text", "text.txt", "--limit", "9"), ["--limit", "--task"]),
        (("evaluate", "user/a", "--text", "text.txt", "--new-tokens", "64"), ["--new-tokens", "--latency"]),
        (("evaluate", "user/a", "--repeats", "5"), ["--repeats", "--latency"]),
        (("evaluate", "user/a", "--device", "cpu"), ["--device", "--latency"]),
        (("evaluate", "user/a", "--base-model", "user/b"), ["--base-model", "--latency"]),
        (("prune", "importance", "user/a", "--data", "t", "--no-masks", "--top-percent", "20"), ["--top-percent"]),
        (("prune", "importance", "FOLDER", "--data", "t", "--revision", "main"), ["--revision"]),
        (("prune", "layers", "user/a", "out", "--layers", "1", "--score", "igia"), ["--score", "--layers"]),
        (
            ("prune", "layers", "user/a", "out", "--layers", "1", "--no-merge", "--importance", "importance"),
            ["--importance", "--no-merge"],
        ),
        (("prune", "width", "user/a", "out", "--ratio", "0.2", "--device", "cpu"), ["--device", "--calibration"]),
        (("prune", "width", "user/a", "out", "--ratio", "0.2", "--calibration-samples", "128"), ["--calibration"]),
        (
            ("prune", "width", "user/a", "out", "--ratio", "0.2", "--parts", "attention", "--multiple-of", "1"),
            ["--multiple-of", "--parts"],
        ),
        (
            ("prune", "width", "user/a", "out", "--ratio", "0.2", "--parts", "mlp", "--query-heads"),
            ["--query-heads", "--parts"],
        ),
        (("prune", "width", "PRUNED", "out", "--ratio", "0.2", "--base-name", "user/a"), ["--base-name", "PRUNED"]),
        (("prune", "width", "user/a", "out", "--ratio", "0.2", "--private"), ["--private", "--push"]),
        (("prune", "recover", "user/a", "out", "--data", "t", "--full", "--rank", "8"), ["--rank", "--full"]),
        (("prune", "recover", "user/a", "out", "--data", "t", "--full", "--alpha", "32"), ["--alpha", "--full"]),
        (
            ("prune", "recover", "user/a", "out", "--data", "t", "--steps", "9", "--epochs", "1"),
            ["--epochs", "--steps"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refused(
    arguments: tuple[str, ...],
    options: list[str],
    places: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("impart_hf.cli.main.load_libraries", lambda: pytest.fail("the command was run"))
    line = failure(capsys, *(places.get(argument, argument) for argument in arguments))
    for option in options:
        assert places.get(option, option) in line


def test_a_revision_needs_one_model_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A revision has an effect if one of the models is on the Hub."""
    monkeypatch.setattr("impart_hf.cli.main.load_libraries", lambda: (_ for _ in ()).throw(ValueError("run")))
    line = failure(capsys, "evaluate", tmp_path, "user/a", "--revision", "main")
    assert line.endswith("run")
