"""The search for a merge's settings, and the commands `merge` and `tune-merge`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.messages import naming
from support.tiny_models import (
    edit_tensors,
    fine_tune,
    load_tensors,
    make_model,
    save_model,
    tiny_config,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from impart_hf.calibration.text import calibration_tokens
from impart_hf.cli.main import main
from impart_hf.evaluation.metrics import load, perplexity
from impart_hf.merging.merge import merge
from impart_hf.merging.search import tune_merge

TEXTS = {"cats": ["the cat sat on the mat " * 30], "dogs": ["a dog ran to the log " * 30]}
SMALL = {"samples": 4, "length": 32}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and fine-tunes `a` and `b`, and `ties.yaml`, `impart.yaml`, …, which merge them; not to be written to."""
    folder = tmp_path_factory.mktemp("tuning")
    base = make_model(tiny_config("llama"))
    save_model(base, folder / "base")
    for seed, name in enumerate("ab", 1):
        save_model(fine_tune(base, seed, strength=0.5), folder / name)
    for method in ("task_arithmetic", "ties", "impart_ties", "dare_linear"):
        content = {
            "merge_method": method,
            "base_model": str(folder / "base"),
            # What the search sets stands in the place of this
            "models": [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in "ab"],
            "parameters": {"lambda": 9.0, "normalize": False},
        }
        (folder / f"{method}.yaml").write_text(yaml.safe_dump(content))
    return folder


def test_every_candidate_is_what_merge_makes(family, tmp_path):
    """The losses are those of the models that `merge` writes with the same settings, and the best is written."""
    grid = {"lambdas": (0.5, 1.0), "trims": (0.3, 0.8), "densities": (0.5, 0.2)}
    found = tune_merge(family / "impart_ties.yaml", tmp_path / "out", TEXTS, **grid, **SMALL)
    assert len(found.candidates) == 8 and found.best.score == min(c.score for c in found.candidates)
    tokenizer = AutoTokenizer.from_pretrained(family / "base")
    content = yaml.safe_load((family / "impart_ties.yaml").read_text())
    for number, candidate in enumerate(found.candidates):
        merge({**content, "parameters": {**content["parameters"], **candidate.settings}}, tmp_path / f"{number}")
        model = load(str(tmp_path / f"{number}"), torch.float32, "cpu")
        for task, text in TEXTS.items():
            tokens = calibration_tokens(text, tokenizer, **SMALL)
            assert candidate.losses[task] == pytest.approx(math.log(perplexity(model, tokens, 8)), abs=2e-3)
        if candidate is found.best:
            ours, theirs = load_tensors(tmp_path / "out"), load_tensors(tmp_path / f"{number}")
            assert all((ours[name] == tensor).all() for name, tensor in theirs.items())
    assert len({round(c.score, 9) for c in found.candidates}) == 8
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("method", "settings", "count"),
    [
        ("task_arithmetic", ["lambda"], 5),
        ("ties", ["lambda", "density"], 15),
        ("dare_linear", ["lambda", "density"], 45),
        ("impart_ties", ["lambda", "density", "trim_density"], 135),
    ],
)
def test_the_papers_grids(family, tmp_path, monkeypatch, method, settings, count):
    monkeypatch.setattr("impart_hf.merging.merge.Merge.write", lambda *_: None)
    monkeypatch.setattr("impart_hf.merging.search.task_losses", lambda *_: {"a": 1.0})
    monkeypatch.setattr("impart_hf.merging.search.StoredDeltas", lambda *_: type("Stored", (), {"of": None}))
    found = tune_merge(family / f"{method}.yaml", tmp_path / "out", {"a": TEXTS["cats"]}, **SMALL)
    assert len(found.candidates) == count and list(found.best.settings) == settings
    assert {c.settings["lambda"] for c in found.candidates} == {0.4, 0.6, 0.8, 1.0, 1.2}


def test_the_command(family, tmp_path, capsys):
    for task, (text,) in TEXTS.items():
        (tmp_path / f"{task}.txt").write_text(text)
    command = ["tune-merge", str(family / "ties.yaml"), str(tmp_path / "out"), "--quiet"]
    command += ["--samples", "4", "--length", "32", "--lambdas", "0.5,1", "--trims", "0.5"]
    for task in TEXTS:
        command += ["--validation", f"{task}={tmp_path / task}.txt"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["lambda", "density", "cats", "dogs", "mean"] and len(lines) == 5
    assert sum(line.endswith("best") for line in lines) == 1 and re.search(naming(tmp_path / "out", "ties"), lines[-1])
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert main([*command[:2], str(tmp_path / "json"), *command[3:], "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["candidates"]) == 2 and report["report"]["config"]["parameters"]["density"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["OUT", "--validation", "text.txt"], ("--validation", "TASK=TEXT", "'text.txt'")),
        (["OUT", "--validation", "a=t.txt", "--validation", "a=t.txt"], ("--validation", "'a=t.txt'")),
        (["OUT", "--validation", "a=gone.txt"], "'gone.txt'"),
        (["OUT", "--validation", "a=gone.jsonl", "--text-field", "body"], "'gone.jsonl'"),
        (["OUT", "--validation", "a=TALKS", "--text-field", "body"], ("turns", "'body'")),
        (["OUT", "--validation", "a=TEXT", "--densities", "1.5", "--trims", "0.5"], ("density", 1.5)),
        (["OUT", "--validation", "a=TEXT", "--trims", "0"], ("trim_density", 0.0)),
        (["OUT", "--validation", "a=TEXT", "--lambdas", "nan"], ("lambda", "nan")),
        (["OUT", "--validation", "a=TEXT", "--batch-size", "0"], ("batch_size", 0)),
        (["FULL", "--validation", "a=TEXT"], "FULL"),
    ],
)
def test_bad_input(family, tmp_path, capsys, arguments, names):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "text.txt").write_text(TEXTS["cats"][0])
    (tmp_path / "talks.jsonl").write_text('{"id": "x", "turns": ["One.", "Two."]}')
    places = {"OUT": str(tmp_path / "out"), "FULL": str(tmp_path / "full"), "a=TEXT": f"a={tmp_path / 'text.txt'}"}
    places["a=TALKS"] = f"a={tmp_path / 'talks.jsonl'}"
    command = ["tune-merge", str(family / "impart_ties.yaml"), *(places.get(a, a) for a in arguments)]
    assert main([*command, "--quiet"]) == 1
    assert re.search(naming(places.get(names, names) if isinstance(names, str) else names), capsys.readouterr().err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "talks.jsonl", "text.txt"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["OUT"], "--validation"),
        (["OUT", "FINETUNED", "--validation", "a=t.txt"], "FINETUNED"),
        (["OUT", "--validation", "a=t.txt", "--ratio", "8"], "--ratio"),
        (["OUT", "--validation", "a=t.txt", "--betas", "0.5"], "--betas"),
        (["OUT", "--validation", "a=t.txt", "--private"], "--private"),
    ],
)
def test_usage(family, capsys, arguments, names):
    """What belongs to the search for a pair's settings is none of this command's."""
    with pytest.raises(SystemExit) as caught:
        main(["tune-merge", str(family / "impart_ties.yaml"), *arguments])
    assert caught.value.code == 2 and names in capsys.readouterr().err.splitlines()[-1]


def test_no_task(family, tmp_path):
    with pytest.raises(ValueError, match="validation text"):
        tune_merge(family / "ties.yaml", tmp_path / "out", {}, **SMALL)


@pytest.mark.parametrize("arguments", [[], ["--validation", "a.txt", "--validation", "b.txt"]])
def test_a_pair_is_judged_by_one_text(capsys, arguments):
    assert main(["tune", "base", "finetuned", "out", *arguments]) == 1
    assert re.search(naming("--validation", "--task"), capsys.readouterr().err)


def test_the_search_for_a_pair_has_no_option_of_a_merge(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "base", "finetuned", "out", "--validation", "a.txt", "--lambdas", "1"])
    assert "--lambdas" in capsys.readouterr().err


def test_settings_that_a_method_has_no_use_for(family, tmp_path, capsys):
    command = ["tune-merge", str(family / "task_arithmetic.yaml"), str(tmp_path / "out"), "--validation", "a=t.txt"]
    for name, value in (("trims", "0.5"), ("densities", "0.5")):
        assert main([*command, f"--{name}", value]) == 1
        assert re.search(naming("task_arithmetic", name), capsys.readouterr().err)


def test_an_output_folder_that_is_one_of_the_models(family, capsys):
    command = ["tune-merge", str(family / "ties.yaml"), str(family / "a"), "--validation", "a=t.txt"]
    assert main(command) == 1
    assert re.search(naming(family / "a", "models"), capsys.readouterr().err)


def test_a_model_of_few_positions_by_another_name(tmp_path):
    """GPT-2's `n_positions`; and what the model holds besides matrices is merged as well."""
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": len(tiny_tokenizer())}
    base = make_model(GPT2Config(**shape, n_positions=16), dtype=torch.float32)
    save_model(base, tmp_path / "base")
    save_model(fine_tune(base), tmp_path / "a")
    for name in ("base", "a"):
        edit_tensors(tmp_path / name, lambda t: t.update({"scale": torch.tensor(1.0), "none": torch.empty(0, 3)}))
    content = {"merge_method": "ties", "base_model": str(tmp_path / "base"), "models": [str(tmp_path / "a")]}
    found = tune_merge(content, tmp_path / "out", TEXTS, lambdas=np.array([0.5, 1]), trims=np.array([0.5]), **SMALL)
    assert len(found.candidates) == 2 and json.dumps(found.to_dict())
    found = merge({**content, "parameters": {"lambda": np.float64(0.5)}}, tmp_path / "merged")
    assert json.dumps(found.to_dict())


def test_a_tokenizer_of_another_model(tmp_path):
    base = make_model(tiny_config("llama", vocab_size=40))
    save_model(base, tmp_path / "base")
    save_model(fine_tune(base), tmp_path / "a")
    content = {"merge_method": "ties", "base_model": str(tmp_path / "base"), "models": [str(tmp_path / "a")]}
    with pytest.raises(ValueError, match=naming("vocabulary", 40)):
        tune_merge(content, tmp_path / "out", TEXTS, **SMALL)


def test_merge_as_a_command(family, tmp_path, capsys):
    assert main(["merge", str(family / "ties.yaml"), str(tmp_path / "dense"), "--quiet"]) == 0
    assert re.search(naming(tmp_path / "dense", "ties"), capsys.readouterr().out)
    command = ["merge", str(family / "ties.yaml"), str(tmp_path / "delta"), "--quiet", "--json"]
    assert main([*command, "--method", "lowrank", "--ratio", "2", "--base-name", "user/base"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["compression"]["method"]["compression_ratio"] == 2
    content = json.loads((tmp_path / "delta" / "config.json").read_text())
    assert content["base_model_name_or_path"] == "user/base"
    command = [
        "merge",
        str(family / "ties.yaml"),
        str(tmp_path / "qt"),
        "--quiet",
        "--method",
        "impart-qt",
        "--ratio",
        "2",
    ]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "no calibration" in text and "--calibration" not in text  # an option that `merge` has not
    for option, value in (("--ratio", "4"), ("--beta", "0.5"), ("--push", "user/x"), ("--base-name", "user/base")):
        assert main(["merge", str(family / "ties.yaml"), str(tmp_path / "no"), option, value]) == 1
        assert re.search(naming(option, "--method"), capsys.readouterr().err)
    assert main(["merge", str(family / "ties.yaml"), str(tmp_path / "no"), "--method", "impart", "--push", "u/x"]) == 1
    assert re.search(naming("--push", "--base-name"), capsys.readouterr().err)
    assert main(["merge", str(tmp_path / "gone.yaml"), str(tmp_path / "no")]) == 1
    assert str(tmp_path / "gone.yaml") in capsys.readouterr().err
