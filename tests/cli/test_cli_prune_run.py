"""`impart-hf prune run` as a user runs it."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import failure
from support.messages import naming
from support.tiny_models import make_model, save_model, tiny_config
from transformers import AutoModelForCausalLM

from impart_hf import PrunedLlamaForCausalLM
from impart_hf.cli.main import main
from impart_hf.recipes import Recipe

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven layers, of which the published settings leave four."""
    return save_model(make_model(tiny_config(num_hidden_layers=7)), tmp_path_factory.mktemp("run") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text(Path(str(textwrap.__file__)).read_text("utf-8"), "utf-8")
    return path


def small(name: str, model: Path, text: Path, folder: Path) -> Path:
    """A shipped recipe, without repetitions, for a tiny model, with few steps."""
    content = Recipe.from_yaml(RECIPES / f"{name}.yaml").to_dict() | {"model": str(model), "data": str(text)}
    content["eval"] = {"text": str(text), "length": 32, "samples": 4}
    for entry in content["stages"]:
        for kind, settings in entry.items():
            if kind in ("importance", "recover"):
                settings.pop("epochs", None)
                settings |= {"steps": 2, "length": 32}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_the_six_steps_of_gradpruner(model: Path, text: Path, tmp_path: Path, capsys) -> None:
    recipe = small("gradpruner", model, text, tmp_path)
    assert main(["prune", "run", str(recipe), str(tmp_path / "out"), "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and str(tmp_path / "out/stages/07-recover") in printed.out
    assert printed.out.count("\n| 0") == 4
    result = tmp_path / "out/stages/07-recover"
    assert isinstance(AutoModelForCausalLM.from_pretrained(result), PrunedLlamaForCausalLM)
    dropped, merged, narrowed, recovery = json.loads((result / "config.json").read_text())["pruning"]["steps"]
    assert len(dropped["removed"]) == 2 and not dropped["merged_into"]
    assert len(merged["merged_into"]) == 1 and merged["top_percent"] == 20
    assert narrowed["ratio"] == 0.1 and narrowed["removed_parameters"] > 0
    assert (recovery["method"], recovery["steps"], recovery["learning_rate"]) == ("lora", 2, 1e-4)
    settings = json.loads((tmp_path / "out/stages/01-importance/importance.json").read_text())["settings"]
    assert (settings["rank"], settings["alpha"], settings["batch_size"]) == (8, 32, 4)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_the_shipped_recipes_pass_all_checks(name: str, model: Path, text: Path, tmp_path: Path, capsys) -> None:
    content = Recipe.from_yaml(RECIPES / f"{name}.yaml").to_dict() | {"model": str(model), "data": str(text)}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | {"eval": content["eval"] | {"text": str(text)}}))
    assert main(["prune", "run", str(path), str(tmp_path / "out"), "--dry-run"]) == 0


def test_the_plan(model: Path, text: Path, tmp_path: Path, capsys) -> None:
    recipe, output = small("joint", model, text, tmp_path), tmp_path / "out"
    assert main(["prune", "run", str(recipe), str(output), "--dry-run"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        "model", "01-importance", "02-width", "03-recover", "04-compress",
    ]  # fmt: skip
    assert all("to do" in row for row in rows[3:]) and "ratio: 0.25" in rows[4]
    assert main(["prune", "run", str(recipe), str(output), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    sizes = [stage["parameters"] for stage in plan["stages"]]
    assert plan["parameters"] == sizes[0] > sizes[1] == sizes[3] and plan["stages"][3]["weight_bytes"] == 2 * sizes[3]
    assert plan["to_do"] == [stage["stage"] for stage in plan["stages"]]
    assert not output.exists()


def test_what_is_wrong(model: Path, text: Path, tmp_path: Path, capsys) -> None:
    recipe, output = small("joint", model, text, tmp_path), tmp_path / "out"
    assert naming_failure(capsys, recipe, output, "--dry-run", "--quiet", names=("--quiet", "--dry-run"))
    assert naming_failure(capsys, tmp_path / "missing.yaml", output, names=("missing.yaml",))
    content = yaml.safe_load(recipe.read_text())
    content["stages"][2]["recover"]["steps"] = 0
    recipe.write_text(yaml.safe_dump(content))
    assert naming_failure(capsys, recipe, output, names=("03-recover", "steps", 0))
    del content["stages"][0]
    recipe.write_text(yaml.safe_dump(content))
    assert naming_failure(capsys, recipe, output, names=("joint.yaml", "01-width", "importance"))
    assert not output.exists()


def naming_failure(capsys: Any, *arguments: str | Path, names: tuple) -> bool:

    return re.search(naming(*names), failure(capsys, "prune", "run", *arguments)) is not None
