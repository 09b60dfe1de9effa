"""What is found before any work: wrong settings, texts and models; and the sizes that are to be expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.messages import naming
from support.pruning_reports import made_up_importance
from support.tiny_models import make_model, save_model, tiny_config

from impart_hf.pruning import prune_layers, prune_width
from impart_hf.recipes import RecipeError, plan_recipe

HERE = Path(__file__)


def with_stage(recipe: dict[str, Any], number: int, **settings: Any) -> dict[str, Any]:
    """The recipe with more settings of a stage, counted from 1."""
    stages = list(recipe["stages"])
    ((kind, old),) = stages[number - 1].items()
    return {**recipe, "stages": [*stages[: number - 1], {kind: {**old, **settings}}, *stages[number:]]}


def refused(recipe: dict[str, Any], *names: object) -> None:
    with pytest.raises(RecipeError, match=naming(*names)):
        plan_recipe(recipe)


@pytest.mark.parametrize(
    ("number", "settings", "names"),
    [
        (1, {"stepz": 3}, ("01-importance", "'stepz'", "steps")),
        (1, {"steps": 1}, ("01-importance", "steps", 1)),
        (1, {"steps": "many"}, ("01-importance", "steps", "'many'", "whole number")),
        (1, {"steps": True}, ("01-importance", "steps", "True")),
        (1, {"top_percent": 101}, ("01-importance", "top_percent", 101)),
        (1, {"masks": "no"}, ("01-importance", "masks", "'no'", "true or false")),
        (1, {"training": {"epochs": 1}}, ("01-importance", "training", "'epochs'")),
        (1, {"training": {"fp16": True}}, ("01-importance", "training", "'fp16'")),
        (1, {"data": "missing.txt"}, ("01-importance", "data", "missing.txt")),
        (1, {"data": {"source": "missing.jsonl", "field": "text"}}, ("01-importance", "data", "missing.jsonl")),
        (1, {"data": {"sauce": "missing.jsonl"}}, ("01-importance", "data", "sauce")),
        (1, {"data": ["  "]}, ("01-importance", "data")),
        (1, {"model": "x"}, ("01-importance", "model")),
        (1, {"progress": False}, ("01-importance", "progress")),
        (1, {"device": "cpu"}, ("01-importance", "device")),
        (2, {"ratio": 0.5}, ("02-layers", "drop", "ratio")),
        (2, {"drop": 3}, ("02-layers", "drop", 3)),
        (2, {"drop": 0.5}, ("02-layers", "drop", 0.5)),
        (2, {"score": "taylor"}, ("02-layers", "score", "taylor")),
        (2, {"max_shard_size": "big"}, ("02-layers", "max_shard_size", "big")),
        (4, {"ratio": 1.5}, ("04-width", "ratio", 1.5)),
        (4, {"ratio": None}, ("04-width", "ratio")),
        (4, {"ratio": 0.99}, ("04-width", "ratio", 0.99)),
        (4, {"parts": ["heads"]}, ("04-width", "parts", "heads")),
        (4, {"parts": 3}, ("04-width", "parts", 3, "list")),
        (4, {"parts": "mlp"}, ("04-width", "parts", "mlp", "list")),
        (4, {"exponent": 11}, ("04-width", "exponent", 11)),
        (4, {"calibration": "missing.txt"}, ("04-width", "calibration", "missing.txt")),
        (5, {"steps": 0}, ("05-recover", "steps", 0)),
        (5, {"learning_rate": -1}, ("05-recover", "learning_rate", -1)),
        (5, {"eval_data": "missing.txt"}, ("05-recover", "eval_data", "missing.txt")),
        (5, {"batch_size": 3, "training": {"gradient_accumulation_steps": 2}}, ("05-recover", "batch_size", 3)),
        (6, {"method": "zip"}, ("06-compress", "method", "'zip'", "lowrank")),
        (6, {"ratio": 1}, ("06-compress", "compression_ratio", 1)),
        (6, {"ratio": "3"}, ("06-compress", "ratio", "'3'")),
        (6, {"beta": 0.5}, ("06-compress", "'beta'", "ratio", "max_bytes")),
        (6, {"calibration": "built-in"}, ("06-compress", "calibration", "lowrank")),
        (6, {"exact": "lm_head.*"}, ("06-compress", "exact", "lm_head.*")),
        (6, {"target": {"max_kl": 0.1, "validation": "missing.txt"}}, ("06-compress", "target", "missing.txt")),
        (6, {"target": {"max_kl": -1, "validation": "t.txt"}}, ("06-compress", "target", "max_kl", -1)),
        (6, {"max_bytes": "1MB", "target": {"max_kl": 1, "validation": "t"}}, ("06-compress", "max_bytes", "target")),
        (6, {"distill": "missing.txt"}, ("06-compress", "distill", "missing.txt")),
        (6, {"distill_settings": {"steps": 0}, "distill": "t"}, ("06-compress", "distill_settings", "steps")),
        (6, {"base_name": "me/x"}, ("06-compress", "base_name")),
    ],
    ids=str,
)
def test_settings_that_cannot_be(recipe: dict, number: int, settings: dict, names: tuple) -> None:
    refused(with_stage(recipe, number, **settings), *names)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"eval": {"texts": "t"}}, ("eval", "'texts'", "text")),
        ({"eval": {"text": "missing.txt"}}, ("eval", "text", "missing.txt")),
        ({"eval": {"samples": "4"}}, ("eval", "samples", "'4'")),
        ({"eval": {"models": ["x"]}}, ("eval", "models")),
        ({"data": None}, ("01-importance", "data")),
        ({"data": str(HERE)}, ("01-importance", "data", HERE.name)),
        ({"model": "no/such-model"}, ("model", "no/such-model")),
        ({"model": str(HERE.parent)}, ("model", "config.json")),
    ],
    ids=str,
)
def test_keys_that_cannot_be(recipe: dict, changes: dict, names: tuple) -> None:
    refused({**recipe, **changes}, *names)


def test_models_that_cannot_be_pruned(recipe: dict, tmp_path: Path) -> None:
    gpt2 = save_model(make_model(tiny_config("gpt2")), tmp_path / "gpt2")
    refused({**recipe, "model": str(gpt2)}, "model", "gpt2")


def test_a_device_that_is_not_there(recipe: dict) -> None:
    with pytest.raises(RecipeError, match=naming("device", "cuda:99")):
        plan_recipe(recipe, device="cuda:99")


def test_settings_that_are_objects(recipe: dict, text: Path) -> None:
    stages = recipe["stages"][:-1]
    target = {"max_kl": 0.1, "validation": str(text)}
    call = plan_recipe({**recipe, "stages": [*stages, {"compress": {"target": target}}]}).stages[-1].call
    assert call.arguments["target"].max_kl == 0.1 and call.texts == {"target": str(text)}
    settings = {"method": "delta-come", "bits": [8, 3, 2], "ratio": 4, "distill": str(text)}
    settings["distill_settings"] = {"steps": 3}
    call = plan_recipe({**recipe, "stages": [*stages, {"compress": settings}]}).stages[-1].call
    assert call.arguments["method"].bits == (8, 3, 2) and call.arguments["method"].compression_ratio == 4
    assert call.arguments["distill_settings"].steps == 3 and call.texts == {"distill": str(text)}
    exact = plan_recipe({**recipe, "stages": [*stages, {"compress": {"method": "exact"}}]}).stages[-1].call
    assert exact.arguments["method"].name == "exact"


def test_texts_with_a_field(recipe: dict, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({"body": "A record of some length. " * 9, "id": "x"}))
    plan = plan_recipe({**recipe, "data": {"source": str(path), "field": "body"}})
    assert plan.stages[0].call.texts["data"].field == "body"
    refused({**recipe, "data": {"source": str(path), "field": "title"}}, "01-importance", "data", "title")


@pytest.mark.parametrize(
    ("kind", "settings", "family"),
    [
        ("layers", {"drop": 2}, "llama"),
        ("layers", {"ratio": 0.3}, "qwen3"),
        ("layers", {"layers": [0, 2], "protect": False}, "llama"),
        ("width", {"ratio": 0.3}, "llama"),
        ("width", {"ratio": 0.4, "parts": ["mlp"], "multiple_of": 8}, "llama"),
        ("width", {"ratio": 0.2, "query_heads": True}, "qwen2"),
    ],
    ids=str,
)
def test_the_sizes_to_expect(recipe: dict, tmp_path: Path, kind: str, settings: dict, family: str) -> None:
    """Exact for layers of one size; for widths to within a channel or what they are multiples of."""
    model = save_model(make_model(tiny_config(family, num_hidden_layers=4)), tmp_path / "model")
    prune = {"layers": prune_layers, "width": prune_width}[kind]
    report = prune(str(model), tmp_path / "out", made_up_importance(model), progress=False, **settings)
    plan = plan_recipe({**recipe, "model": str(model), "stages": [{"importance": {}}, {kind: settings}]})
    unit = 3 * 64 * settings.get("multiple_of", 1) if kind == "width" else 0
    assert plan.stages[-1].parameters == pytest.approx(report.parameters_after, abs=unit)
    assert plan.parameters == report.parameters_before and plan.bytes_per_parameter == 2


def test_sizes_of_several_stages(recipe: dict) -> None:
    plan = plan_recipe(recipe)
    sizes = [planned.parameters for planned in plan.stages]
    assert sizes[0] == plan.parameters > sizes[1] == sizes[2] > sizes[3] == sizes[4] == sizes[5]
    assert plan.results == {4, 6}
    assert [stage["stage"] for stage in plan.to_dict()["stages"]] == [planned.name for planned in plan.stages]


def test_conditions_change_with_what_measuring_reads(recipe: dict, tmp_path: Path) -> None:
    task, data = tmp_path / "task.yaml", tmp_path / "data"
    data.mkdir()
    measured = {**recipe, "eval": {"tasks": [str(task), "gsm8k"], "task_settings": {"data_dir": str(data)}}}
    found = {plan_recipe(measured).conditions}
    for path in (task, data / "test.jsonl"):
        path.write_text("{}")
        assert plan_recipe(measured).conditions == plan_recipe(measured).conditions
        found.add(plan_recipe(measured).conditions)
    assert len(found) == 3


def test_fingerprints_change_from_the_changed_stage_on(recipe: dict, text: Path, tmp_path: Path) -> None:
    def same(other: dict) -> list[bool]:
        pairs = zip(plan_recipe(recipe).stages, plan_recipe(other).stages, strict=True)
        return [one.fingerprint == two.fingerprint for one, two in pairs]

    assert same(recipe) == [True] * 6
    assert same(with_stage(recipe, 4, ratio=0.3)) == [True, True, True, False, False, False]
    assert same(with_stage(recipe, 1, seed=1)) == [False] * 6
    assert same({**recipe, "eval": {}}) == [True] * 6
    # The first pruning stage records the name, and stages after it take its model.
    assert same({**recipe, "base_name": "me/llama"}) == [True] + [False] * 5
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes())
    assert same({**recipe, "data": str(other)}) == [False] * 6
