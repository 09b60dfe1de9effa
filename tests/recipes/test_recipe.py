"""The form of a recipe, and the order of its stages: checked without models or texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.messages import naming

from impart_hf.recipes import Recipe, RecipeError
from impart_hf.recipes.recipe import linked

RECIPES = sorted((Path(__file__).parents[2] / "docs" / "recipes").glob("*.yaml"))
IMPORTANCE, LAYERS, WIDTH = "importance", {"layers": {"drop": 1}}, {"width": {"ratio": 0.1}}
NAMED = {"layers": {"layers": [1], "merge": False}}
PUSH = {"push": {"repo": "me/delta", "base_repo": "me/pruned"}}
PRUNED = [IMPORTANCE, WIDTH]


def stages_of(*stages: Any, **keys: Any) -> list[Any]:
    return linked(Recipe.from_dict({"model": "user/model", "stages": list(stages), **keys}))


def test_stages_take_what_earlier_ones_made() -> None:
    stages = stages_of(IMPORTANCE, LAYERS, IMPORTANCE, WIDTH, "recover", "recover", "compress", PUSH)
    assert [stage.name for stage in stages] == [
        "01-importance", "02-layers", "03-importance", "04-width", "05-recover", "06-recover", "07-compress", "08-push",
    ]  # fmt: skip
    assert [stage.model for stage in stages] == [0, 0, 2, 2, 4, 5, 6, 7]
    assert [stage.importance for stage in stages] == [None, 1, None, 3, *[None] * 4]
    assert [stage.base for stage in stages[-2:]] == [4, 4]
    assert [stage.inputs for stage in stages] == [[], [1], [2], [2, 3], [4], [5], [4, 6], [4, 7]]


def test_repetitions_are_written_out() -> None:
    stages = stages_of({"repeat": {"times": 3, "stages": [*PRUNED, "recover"]}}, "compress")
    assert [stage.kind for stage in stages] == ["importance", "width", "recover"] * 3 + ["compress"]
    assert stages[-1].base == 8 and stages[6].model == 6
    nested = {"repeat": {"times": 2, "stages": [{"repeat": {"times": 2, "stages": ["recover"]}}]}}
    assert len(stages_of(nested)) == 4


def test_a_recovery_of_the_recipes_own_model_is_a_delta_on_it() -> None:
    assert stages_of("recover", "compress", {"push": {"repo": "me/delta"}})[1].base == 0


def test_named_layers_that_are_not_merged_need_no_report() -> None:
    assert stages_of(NAMED)[0].importance is None


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_shipped_recipes_have_the_form_of_recipes(path: Path) -> None:
    recipe = Recipe.from_yaml(path)
    assert linked(recipe)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_the_shipped_recipes_are_found() -> None:
    assert [path.stem for path in RECIPES] == ["gradpruner", "iterative", "joint"]


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        ([WIDTH], ("01-width", "importance")),
        ([{"layers": {"layers": [1]}}], ("01-layers", "importance")),
        ([IMPORTANCE, LAYERS, WIDTH], ("03-width", "importance")),
        ([IMPORTANCE, "recover", WIDTH], ("01-importance",)),
        ([IMPORTANCE, IMPORTANCE, WIDTH], ("01-importance",)),
        ([IMPORTANCE, NAMED, "recover"], ("01-importance",)),
        (["recover", IMPORTANCE], ("02-importance",)),
        ([IMPORTANCE], ("01-importance",)),
        ([*PRUNED, "compress"], ("03-compress", "recover")),
        (["compress"], ("01-compress", "recover")),
        (["recover", "compress", "recover"], ("03-recover", "compress")),
        ([{"repeat": {"times": 2, "stages": ["recover", "compress"]}}], ("03-recover", "compress")),
        ([*PRUNED, {"push": {"repo": "a/b"}}, "recover"], ("03-push", "last", "04-recover")),
        ([{"push": {"repo": "a/b"}}], ("01-push", "pruned")),
        (["recover", {"push": {"repo": "a/b"}}], ("02-push", "pruned")),
        ([*PRUNED, "push"], ("03-push", "repo")),
        ([*PRUNED, {"push": {"repo": 3}}], ("03-push", "repo", 3)),
        ([*PRUNED, PUSH], ("03-push", "base_repo")),
        ([*PRUNED, "recover", "compress", {"push": {"repo": "a/b"}}], ("05-push", "base_repo")),
        ([*PRUNED, "recover", "compress", {"push": {"repo": "a/b", "base_repo": "a/b"}}], ("05-push", "base_repo")),
        (["recover", "compress", PUSH], ("03-push", "base_repo")),
        (
            [*PRUNED, "recover", "compress", {"push": {"repo": "a/b", "base_repo": "a/c", "revision": "trial"}}],
            ("05-push", "revision", "base_repo"),
        ),
        ([*PRUNED, IMPORTANCE, LAYERS], ("04-layers", "merge: false")),
        ([{"importance": {"masks": False}}, LAYERS], ("02-layers", "masks", "01-importance")),
        ([], ("stages",)),
        ("recover", ("stages", "recover")),
        ([7], ("entry 1", 7)),
        ([{"width": {"ratio": 0.1}, "layers": {"drop": 1}}], ("entry 1", "width")),
        ([IMPORTANCE, "narrow"], ("entry 2", "'narrow'", "width")),
        ([{"recover": 40}], ("entry 1", "recover", 40)),
        ([{"recover": {4: 5}}], ("entry 1", "recover")),
        ([{"repeat": {"times": 0, "stages": ["recover"]}}], ("entry 1", "times", 0)),
        ([{"repeat": {"times": True, "stages": ["recover"]}}], ("entry 1", "times")),
        ([{"repeat": {"times": 2}}], ("entry 1", "repeat", "stages")),
        ([{"repeat": {"times": 2, "stages": ["recover"], "until": 3}}], ("entry 1", "'until'", "times")),
        ([{"repeat": {"times": 60, "stages": ["recover", "recover"]}}], ("stages", 99)),
        (
            [{"repeat": {"times": 99, "stages": [{"repeat": {"times": 99, "stages": ["recover"] * 99}}]}}],
            ("stages", 99),
        ),
    ],
    ids=str,
)
def test_stages_that_cannot_be(stages: Any, names: tuple) -> None:
    with pytest.raises(RecipeError, match=naming(*names)):
        Recipe.from_dict({"model": "user/model", "stages": stages})


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"steps": 3}, ("'steps'", "stages")),
        ({"model": None}, ("model",)),
        ({"model": 7}, ("model", 7)),
        ({"revision": 7}, ("revision", 7)),
        ({"base_name": ["x"]}, ("base_name",)),
        ({"data": 7}, ("data", 7)),
        ({"data": ""}, ("data", "''")),
        ({"eval": "text.txt"}, ("eval", "text.txt")),
        ({"keep": "some"}, ("keep", "all", "last", "'some'")),
        ({"eval": {"length": float("nan")}}, ("eval",)),
    ],
    ids=str,
)
def test_keys_that_cannot_be(changes: dict, names: tuple) -> None:
    with pytest.raises(RecipeError, match=naming(*names)):
        Recipe.from_dict({"model": "user/model", "stages": ["recover"], **changes})


def test_a_delta_on_a_folder_is_not_pushed_without_the_folders_name_on_the_hub(tmp_path: Path) -> None:
    stages = ["recover", "compress", {"push": {"repo": "me/delta"}}]
    with pytest.raises(RecipeError, match=naming("03-push", "base_name", tmp_path)):
        Recipe.from_dict({"model": str(tmp_path), "stages": stages})
    assert Recipe.from_dict({"model": str(tmp_path), "base_name": "me/base", "stages": stages})


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("model: [", ("YAML",)),
        ("model: a\nstages: &all\n- repeat: {times: 2, stages: *all}", ("YAML",)),
        ("- recover", ("model", "stages")),
        ("", ("model", "stages")),
        ("model: a\nmodel: b\nstages: [recover]", ("model", "twice")),
        ("model: a\nstages:\n- recover: {steps: 3, steps: 4}", ("steps", "twice")),
        ("model: a\nstages: [recover]\ndata: 2020-01-01", ("recipe.yaml", "data")),
        ("model: a\nstages:\n- recover: {data: 2020-01-01}", ("01-recover", "data")),
    ],
)
def test_files_that_are_no_recipe(content: str, names: tuple, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=naming("recipe.yaml", *names)):
        Recipe.from_yaml(path)


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=naming("missing.yaml")):
        Recipe.from_yaml(tmp_path / "missing.yaml")


def test_numbers_with_an_exponent_and_no_point_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: a\nstages:\n- recover: {learning_rate: 1e-4, data: 1.5e3, length: 12}\n")
    assert yaml.safe_load("1e-4") == "1e-4"  # PyYAML's own reading
    assert Recipe.from_yaml(path).stages == [{"recover": {"learning_rate": 1e-4, "data": 1500.0, "length": 12}}]
