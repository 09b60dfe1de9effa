"""`impart-hf prune …` as a user runs it, from scores to a trained model and its delta."""

import json
import math
import re
from pathlib import Path

import pytest
from support.commands import failure
from support.messages import naming
from support.tiny_models import edit_json, make_model, save_model, tiny_config
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from impart_hf import PrunedLlamaForCausalLM
from impart_hf.cli.main import main

pytestmark = pytest.mark.xdist_group("prune commands")

TEXT = "\n".join(f"{a} and {b} are {a + b}, the file says." for a in range(30) for b in range(10))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config("llama", num_hidden_layers=5)
    return save_model(make_model(config), tmp_path_factory.mktemp("cli") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def report(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "importance"
    arguments = ["--data", str(text), "--steps", "3", "--length", "32", "--quiet"]
    assert main(["prune", "importance", str(model), *arguments, "--output", str(folder)]) == 0
    return folder


def pruned(name: str, *arguments: str | Path) -> None:
    """Run a command, which must succeed."""
    assert main(["prune", name, *(str(a) for a in arguments), "--quiet"]) == 0


def test_importance_prints_both_scores(model: Path, text: Path, tmp_path: Path, capsys) -> None:
    arguments = ["prune", "importance", str(model), "--data", str(text), "--steps", "2", "--length", "32", "--quiet"]
    assert main([*arguments, "--output", str(tmp_path / "report"), "--no-masks"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert "igia" in table[0] and "gradient-norm" in table[0]
    assert [line.split()[0] for line in table[1:6]] == ["0", "1", "2", "3", "4"]
    assert sum(float(line.split()[1]) for line in table[1:6]) == pytest.approx(1, abs=1e-3)
    assert sorted(int(line.split()[2]) for line in table[1:6]) == [0, 1, 2, 3, 4]
    assert not (tmp_path / "report/masks.safetensors").exists()
    assert (tmp_path / "report/importance.png").stat().st_size > 1000
    assert main([*arguments, "--output", str(tmp_path / "again"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 5


@pytest.mark.slow
def test_from_scores_to_a_delta(model: Path, text: Path, report: Path, tmp_path: Path, capsys) -> None:
    """Layers, importance again, widths with correction, recovery, and recovered - pruned as a delta repository."""
    steps = {name: tmp_path / name for name in ("fewer", "scores", "narrow", "recovered", "delta")}
    pruned("layers", model, steps["fewer"], "--importance", report, "--drop", "1")
    assert "20.0%" in capsys.readouterr().out
    assert type(AutoModelForCausalLM.from_pretrained(steps["fewer"])) is LlamaForCausalLM
    training = ["--data", text, "--length", "32"]
    pruned("importance", steps["fewer"], *training, "--steps", "2", "--output", steps["scores"])
    widths = ["--importance", steps["scores"], "--ratio", "0.3", "--score", "gradient-norm", "--multiple-of", "8"]
    calibration = ["--calibration", text, "--calibration-samples", "4", "--calibration-length", "32"]
    pruned("width", steps["fewer"], steps["narrow"], *widths, *calibration)
    assert "channels" in capsys.readouterr().out
    evaluated = ["--eval-data", str(text), "--steps", "6", "--learning-rate", "1e-2"]
    pruned("recover", steps["narrow"], steps["recovered"], *training, *evaluated)
    assert "perplexity" in (printed := capsys.readouterr().out) and "loss" in printed
    loaded = AutoModelForCausalLM.from_pretrained(steps["recovered"])
    assert type(loaded) is PrunedLlamaForCausalLM
    assert [step["kind"] for step in loaded.config.pruning["steps"]] == ["layers", "width", "recovery"]
    compressed = [str(steps[name]) for name in ("narrow", "recovered", "delta")]
    assert main(["compress", *compressed, "--ratio", "4", "--quiet"]) == 0
    assert main(["verify", str(steps["delta"]), "--quiet"]) == 0
    names = [str(model), *(str(steps[name]) for name in ("fewer", "narrow", "recovered", "delta"))]
    capsys.readouterr()
    assert main(["evaluate", *names, "--text", str(text), "--length", "32", "--samples", "4", "--json", "--quiet"]) == 0
    rows = json.loads(capsys.readouterr().out)
    found = [row["perplexity"] for row in rows["models"]]
    assert all(map(math.isfinite, found)) and found[3] < found[2] and found[4] == pytest.approx(found[3], rel=0.1)


def test_json(model: Path, report: Path, tmp_path: Path, capsys) -> None:
    pruned("layers", model, tmp_path / "out", "--layers", "1,2", "--no-merge", "--base-name", "me/llama", "--json")
    found = json.loads(capsys.readouterr().out)
    assert "base_model: me/llama" in (tmp_path / "out/README.md").read_text()
    assert found["step"]["removed"] == [1, 2] and found["parameters_after"] < found["parameters_before"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("layers", "MODEL", "OUT", "--drop", "1"), "importance.json"),
        (("layers", "MODEL", "OUT", "--importance", "REPORT", "--drop", "4"), ("4 layers", "1 to 3")),
        (("width", "MODEL", "OUT", "--importance", "REPORT", "--ratio", "0.99"), ("ratio", 0.99)),
        (("width", "MODEL", "OUT", "--importance", "REPORT", "--ratio", "0.2", "--parts", "heads"), ("parts", "heads")),
        (
            ("width", "MODEL", "OUT", "--importance", "REPORT", "--ratio", "0.2", "--calibration", "TEXT")
            + ("--device", "tpu9"),
            "tpu9",
        ),
        (("width", "OTHER", "OUT", "--importance", "REPORT", "--ratio", "0.2"), ("importance report", "OTHER")),
        (("layers", "MIXTRAL", "OUT", "--importance", "REPORT", "--drop", "1"), ("MIXTRAL", "'mixtral'")),
        (("importance", "MIXTRAL", "--data", "TEXT", "--output", "OUT"), ("MIXTRAL", "'mixtral'")),
        (("importance", "MODEL", "--data", "EMPTY", "--output", "OUT"), ("EMPTY", "no text")),
        (("importance", "MODEL", "--data", "nowhere.txt", "--output", "OUT"), "nowhere.txt"),
        (("importance", "MODEL", "--data", "TALKS", "--output", "OUT"), ("TALKS", "turns", "--text-field")),
        (("importance", "MODEL", "--data", "TALKS", "--output", "OUT", "--text-field", "body"), ("TALKS", "'body'")),
        (("recover", "MODEL", "OUT", "--data", "TALKS", "--text-field", "body"), ("TALKS", "'body'")),
        (
            ("recover", "MODEL", "OUT", "--data", "TEXT", "--eval-data", "TALKS", "--text-field", "body"),
            ("TALKS", "'body'"),
        ),
        (
            ("width", "MODEL", "OUT", "--importance", "REPORT", "--ratio", "0.2", "--calibration", "TALKS")
            + ("--text-field", "body"),
            ("TALKS", "'body'"),
        ),
        (("recover", "MIXTRAL", "OUT", "--data", "TEXT"), ("MIXTRAL", "'mixtral'")),
        (("recover", "MODEL", "OUT", "--data", "TEXT", "--training", "BAD"), "no_such_setting"),
        (("recover", "MODEL", "OUT", "--data", "TEXT", "--training", "TWICE"), "learning_rate"),
        (("importance", "MODEL", "--data", "TEXT", "--output", "OUT", "--steps", "1"), ("steps", 2, 1)),
        (("recover", "MODEL", "OUT", "--data", "TEXT", "--push", "me/model"), ("--push", "MODEL")),
        (("recover", "MODEL", "OUT", "--data", "TEXT", "--training", "OPTIMISER"), "galore_torch"),
        (("layers", "NAN", "OUT", "--layers", "1", "--no-merge"), ("model.norm.weight", "NaN")),
        (("layers", "nowhere/at-all", "OUT", "--layers", "1", "--no-merge"), "nowhere/at-all"),
    ],
)
def test_bad_input(model: Path, text: Path, report: Path, tmp_path: Path, arguments, names, capsys) -> None:
    other = save_model(make_model(tiny_config("llama", num_hidden_layers=5), seed=7), tmp_path / "other")
    mixtral = save_model(make_model(tiny_config("mixtral")), tmp_path / "mixtral")
    (tmp_path / "empty.txt").write_text(" \n ")
    (tmp_path / "talks.jsonl").write_text('{"id": "x", "turns": ["One.", "Two."]}')
    (tmp_path / "bad.json").write_text('{"no_such_setting": 1}')
    (tmp_path / "twice.json").write_text('{"learning_rate": 1}')
    (tmp_path / "optimiser.json").write_text('{"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}')
    nan = make_model(tiny_config("llama", num_hidden_layers=5))
    nan.model.norm.weight.data[3] = float("nan")
    save_model(nan, tmp_path / "nan")
    places = {
        "MODEL": model, "OUT": tmp_path / "out", "REPORT": report, "TEXT": text, "OTHER": other, "MIXTRAL": mixtral,
        "EMPTY": tmp_path / "empty.txt", "BAD": tmp_path / "bad.json", "TWICE": tmp_path / "twice.json",
        "OPTIMISER": tmp_path / "optimiser.json", "NAN": tmp_path / "nan",
        "TALKS": tmp_path / "talks.jsonl",
    }  # fmt: skip
    before = sorted(tmp_path.iterdir())
    name, *rest = (places.get(a, a) for a in arguments)
    names = (places.get(n, n) for n in (names if isinstance(names, tuple) else (names,)))
    assert re.search(naming(*names), failure(capsys, "prune", name, *rest, "--quiet"))
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_with_scores_that_are_no_numbers(model: Path, text: Path, tmp_path: Path, capsys) -> None:
    report = tmp_path / "report"
    pruned("importance", model, "--data", text, "--steps", "2", "--length", "32", "--output", report)
    layers = json.loads((report / "importance.json").read_text())["layers"]
    layers[1]["igia"] = float("nan")
    edit_json(report / "importance.json", layers=layers)
    line = failure(capsys, "prune", "layers", model, tmp_path / "out", "--importance", report, "--drop", "1", "--quiet")
    assert "nan" in line and "prune importance" in line
