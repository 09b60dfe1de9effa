"""The study of pruning on a tiny model and two steps of everything: what is run, what is written, how it goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.load_script import load_script
from support.messages import naming
from support.own_answers import write_own_answers
from support.tiny_models import make_model, save_model, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM

from impart_hf.calibration.text import calibration_tokens

pytestmark = [pytest.mark.scripts, pytest.mark.xdist_group("study of pruning")]

LAYERS, SEEDS = 5, (0, 1)
TEXTS = {
    "train.txt": "A fine-tuned model is its base model and a small difference. ",
    "test.txt": "The difference is what a file keeps, and the base model is what it differs from. ",
}


def arguments(folder: Path) -> list[str]:
    """Of the script, for a folder that holds the model and the texts."""
    small = {"counts": "1,2", "seeds": ",".join(map(str, SEEDS)), "importance-steps": 2, "recovery-steps": 2}
    small |= {"batch-size": 2, "length": 32, "tokens": 128, "calibration-samples": 4}
    small |= {"data": folder / "train.txt", "text": folder / "test.txt", "output": folder / "study"}
    small |= {"answers": folder / "tasks"}
    return [str(folder / "model"), *(str(part) for name, value in small.items() for part in (f"--{name}", value))]


def results_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "study" / "study.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for name, text in TEXTS.items():
        (folder / name).write_text(text * 40, encoding="utf-8")
    write_own_answers(save_model(make_model(tiny_config(num_hidden_layers=LAYERS)), folder / "model"), folder / "tasks")
    assert load_script("study_pruning").main(arguments(folder)) == 0
    return folder


def test_what_is_run(study: Path) -> None:
    runs = results_in(study)["runs"]
    keys = [(run["method"], run["amount"], run["seed"]) for run in runs]
    ruled = ["IGIA layers", "IGIA layers, merged", "gradient-norm layers", "gradient-norm layers, merged"]
    expected: list[tuple[str, str, int | None]] = [("unpruned", "0 layers", None)]
    for amount in ("1 layer", "2 layers"):
        expected += [("random layers", amount, seed) for seed in SEEDS]
        expected += [(method, amount, None) for method in ("last layers", *ruled)]
    expected.append(("layers and width", "2 layers", None))
    for ratio in ("0.2", "0.4"):
        expected += [(method, f"{ratio} of the width", None) for method in ("width", "width, corrected")]
    assert keys == expected
    assert all(1 < run["before"] < 1e6 and 1 < run["after"] < 1e6 and run["seconds"] > 0 for run in runs)
    assert runs[0]["right_before"] == 1, "the answers are the model's own"
    assert min(run["right_before"] for run in runs) < 1
    for run in runs:
        assert 0 <= run["right_after"] <= 1
        assert run["before"] != run["after"], "recovery changes something"
        if run["layers"] is not None:
            assert 0 < min(run["layers"]) and max(run["layers"]) < LAYERS - 1, "the first and the last layer stay"
    assert [run["layers"] for run in runs if run["method"] == "last layers"] == [[3], [2, 3]]


def test_sizes_are_comparable(study: Path) -> None:
    """Layers take as many parameters whichever they are; widths and both as many, but for less than half a KV group."""
    runs = results_in(study)["runs"]
    whole = runs[0]["parameters"]
    layer = 64 * 16 * 2 * (4 + 2) + 3 * 64 * 128 + 2 * 64
    group = 16 * 64 * 2 * (2 + 1)
    assert whole == LAYERS * layer + 2 * 320 * 64 + 64
    for run in runs[1:]:
        removed = 1 if run["amount"] in ("1 layer", "0.2 of the width") else 2
        slack = group / 2 if "width" in run["method"] else 0
        assert abs(whole - run["parameters"] - removed * layer) <= slack, run["key"]


@torch.no_grad()
def test_perplexity_is_that_of_the_model_without_the_layers(study: Path) -> None:
    tokens = calibration_tokens(str(study / "test.txt"), tiny_tokenizer(), samples=4, length=32)
    for run in results_in(study)["runs"]:
        if run["method"] in ("unpruned", "random layers", "last layers", "IGIA layers", "gradient-norm layers"):
            model = AutoModelForCausalLM.from_pretrained(study / "model", dtype=torch.float32)
            kept = [layer for n, layer in enumerate(model.model.layers) if n not in (run["layers"] or ())]
            model.model.layers = torch.nn.ModuleList(kept)
            logits = model(tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
            expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).exp().item()
            assert run["before"] == pytest.approx(expected, rel=1e-4), run["key"]


def test_layers_are_those_of_the_lowest_scores(study: Path) -> None:
    results = results_in(study)
    for method, score in (("IGIA layers", "igia"), ("gradient-norm layers", "gradient_norm")):
        inner = sorted(range(1, LAYERS - 1), key=lambda n, s=score: results["layer_scores"][s][n])
        for count in (1, 2):
            chosen = [
                r["layers"] for r in results["runs"] if r["method"].startswith(method) and r["amount"][0] == str(count)
            ]
            assert chosen == [sorted(inner[:count])] * 2
    merged = {run["key"]: run for run in results["runs"]}
    for count in ("1 layer", "2 layers"):
        apart, added = (merged[f"IGIA layers{how} | {count} | None"] for how in ("", ", merged"))
        assert apart["before"] != added["before"] and apart["parameters"] == added["parameters"]


def test_files(study: Path) -> None:
    text = (study / "study" / "study.md").read_text("utf-8")
    for word in (
        "| unpruned |",
        "± ",
        "| width, corrected | 0.2 of the width |",
        "Machine: ",
        "after recovery",
        "| IGIA |",
    ):
        assert word in text
    names = {path.name for path in (study / "study").iterdir()}
    assert names == {"study.md", "study.json", "study.png", "importance"}, "and nothing temporary"
    picture = (study / "study" / "study.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_a_stopped_study_goes_on(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done stays as it was; a run that was lost is made again, and has the same numbers."""
    script, path = load_script("study_pruning"), study / "study" / "study.json"
    whole = results_in(study)
    path.write_text(json.dumps({**whole, "runs": whole["runs"][:-3]}), encoding="utf-8")
    recoveries = []
    real = script.recover

    def counted(*args: Any, **kwargs: Any) -> Any:
        if len(recoveries) == 2:
            raise KeyboardInterrupt
        recoveries.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(script, "recover", counted)
    with pytest.raises(KeyboardInterrupt):
        script.main(arguments(study))
    assert len(results_in(study)["runs"]) == len(whole["runs"]) - 1, "each run is written down when it is done"
    monkeypatch.setattr(script, "recover", real)
    assert script.main(arguments(study)) == 0
    again = results_in(study)["runs"]
    assert again[:-3] == whole["runs"][:-3]
    for found, expected in zip(again[-3:], whole["runs"][-3:], strict=True):
        assert {**found, "seconds": 0} == pytest.approx({**expected, "seconds": 0})


@pytest.mark.parametrize(
    "changes, names",
    [
        (["--counts", "4"], ("--counts", 1, 3)),
        (["--counts", "0"], ("--counts", 1, 3)),
        (["--learning-rate", "3e-4"], ("settings", "--output")),
        (["--text", "gone.txt"], "gone.txt"),
        (["--ratios", "0.2,1", "--output", "other"], "--ratios"),
    ],
)
def test_bad_arguments(
    changes: list[str], names: Any, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    before = results_in(study)
    monkeypatch.chdir(tmp_path)
    assert load_script("study_pruning").main([*arguments(study), *changes]) == 1
    assert re.search(naming(names), capsys.readouterr().err)
    assert results_in(study) == before
