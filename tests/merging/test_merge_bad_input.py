"""What cannot be merged is refused with one clear message, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.merge_family import config
from support.messages import naming
from support.tiny_models import edit_tensors, fine_tune, make_model, save_model, tiny_config

from impart_hf import ImPartConfig, LowRankConfig, compress, merge


def nothing_left(folder: Path) -> None:
    assert not folder.exists() and not [p for p in folder.parent.iterdir() if p.name.startswith(f".{folder.name}")]


WRONG: dict[str, tuple[dict[str, Any], Any]] = {
    "method": ({"merge_method": "slerp"}, ("merge_method", "'slerp'", "task_arithmetic", "ties")),
    "key": ({"slicse": []}, ("key", "'slicse'", "merge_method")),
    "no models": ({"models": []}, "models"),
    "no method": ({"merge_method": None}, "merge_method"),
    "models": ({"models": {"model": "x"}}, ("models", "list", "{'model'")),
    "model": ({"models": [{"modle": "x"}]}, ("models", "{'modle'")),
    "key of a model": ({"models": [{"model": "x", "weight": 1}]}, ("key", "'weight'", "'x'")),
    "base alone": ({"models": ["BASE"]}, ("models", "base")),
    "twice": ({"models": ["A", "A"]}, ("models", "A", "twice")),
    "twice, in two spellings": ({"models": ["A", "A/."]}, ("models", "a/.", "twice")),
    "parameter": ({"parameters": {"wieght": 1}}, ("parameter", "'wieght'", "lambda")),
    "parameters": ({"parameters": [1]}, ("parameters", "[1]")),
    "dtype": ({"dtype": "int8"}, ("dtype", "float16", "'int8'")),
    "tokenizer": ({"tokenizer_source": "elsewhere"}, ("tokenizer_source", "base", "union", "'elsewhere'")),
    "base": ({"base_model": 3}, ("base_model", 3)),
    "weight": ({"parameters": {"weight": "heavy"}}, ("weight", "'heavy'")),
    "weight, null": ({"parameters": {"weight": None}}, ("weight", "None")),
    "weight, true": ({"parameters": {"weight": True}}, ("weight", "True")),
    "weight, infinite": ({"parameters": {"weight": float("inf")}}, ("weight", "finite", "inf")),
    "weight, huge": ({"parameters": {"weight": 1e39}}, ("weight", "finite", 1e39)),
    "weight, of many digits": ({"parameters": {"weight": 10**400}}, ("weight", "1" + "0" * 79)),
    "method, no name": ({"merge_method": ["ties"]}, ("merge_method", "['ties']")),
    "dtype, no name": ({"dtype": ["float16"]}, ("dtype", "['float16']")),
    "seed, without use": ({"parameters": {"seed": 1}}, ("seed", "ties")),
    "weight, NaN": ({"parameters": {"weight": [1, float("nan")]}}, ("weight", "nan")),
    "weight, empty": ({"parameters": {"weight": []}}, ("weight", "empty list")),
    "weight, list": ({"parameters": {"weight": [1, [2]]}}, ("weight", "number", "[2]")),
    "filter": ({"parameters": {"weight": [{"filter": 3, "value": 1}]}}, ("filter", "weight", 3)),
    "filter without value": ({"parameters": {"weight": [{"filter": "mlp"}]}}, ("weight", "{'filter': 'mlp'}", "value")),
    "filter in filter": ({"parameters": {"weight": [{"value": [{"value": 1}]}]}}, ("value", "weight", "{'value': 1}")),
    "density, 0": ({"parameters": {"density": 0}}, ("density", 0)),
    "density, above 1": ({"parameters": {"density": [0.5, 1.1]}}, ("density", 1.1)),
    "normalize": ({"parameters": {"normalize": "yes please"}}, ("normalize", "'yes please'")),
    "rescale": ({"parameters": {"rescale": True}}, ("rescale", "True", "ties")),
    "beta": ({"parameters": {"beta": 0.5}}, ("beta", "ties")),
    "trim": ({"parameters": {"trim_density": 0.5}}, ("trim_density", "dare_ties", "impart_ties")),
    "seed": ({"merge_method": "dare_ties", "parameters": {"seed": 1.5}}, ("seed", 1.5)),
    "seeds": ({"merge_method": "dare_ties", "parameters": {"seed": [1, 2]}}, ("seed", "[1, 2]")),
    "a model's seed": ({"models": [{"model": "A", "parameters": {"seed": 1}}]}, ("parameters of", "A", "'seed'")),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_configurations(tunes, tmp_path, name):
    changes, names = WRONG[name]
    names = tuple(str(tunes / "a") if n == "A" else n for n in (names if isinstance(names, tuple) else (names,)))
    content = json.loads(
        json.dumps({**config(tunes, "ties", {"a": {}}), **changes})
        .replace('"BASE"', json.dumps(str(tunes / "base")))
        .replace('"A"', json.dumps(str(tunes / "a")))
        .replace('"A/."', json.dumps(str(tunes / "a" / "..") + "/a/."))
    )
    with pytest.raises(ValueError, match=naming(names)):
        merge(content, tmp_path / "out")
    nothing_left(tmp_path / "out")


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "gone.yaml")):
        merge(tmp_path / "gone.yaml", tmp_path / "out")
    for text, named in (("a: [", "YAML"), ("- a", "keys"), ("", "keys")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=naming("bad.yaml", named)):
            merge(tmp_path / "bad.yaml", tmp_path / "out")


@pytest.mark.parametrize("delta", [False, True])
def test_models_of_other_bases(tunes, tmp_path, delta):
    other = make_model(tiny_config("llama", num_hidden_layers=3), seed=7, dtype=torch.float32)
    save_model(other, tmp_path / "other")
    stranger = save_model(fine_tune(other), tmp_path / "stranger")
    if delta:
        compress(str(tmp_path / "other"), str(stranger), tmp_path / "delta", LowRankConfig(compression_ratio=2))
        stranger = tmp_path / "delta"
    names = ("base",) if delta else ("cosine", tunes / "base")
    with pytest.raises(ValueError, match=naming(stranger, names)):
        merge(config(tunes, "ties", {"a": {}, str(stranger): {}}), tmp_path / "out")
    nothing_left(tmp_path / "out")


def test_models_of_other_shapes(tunes, tmp_path):
    for name, changes, names in (
        ("wide", {"intermediate_size": 96, "num_hidden_layers": 3}, ("shape", "[64, 96]", "[64, 128]")),
        ("deep", {"num_hidden_layers": 4}, ("model.layers.3.input_layernorm.weight",)),
    ):
        save_model(make_model(tiny_config("llama", **changes), dtype=torch.float32), tmp_path / name)
        with pytest.raises(ValueError, match=naming(tmp_path / name, names)):
            merge(config(tunes, "ties", {"a": {}, str(tmp_path / name): {}}), tmp_path / "out")
    save_model(make_model(tiny_config("mistral", num_hidden_layers=3), dtype=torch.float32), tmp_path / "mistral")
    with pytest.raises(ValueError, match=naming("'llama'", "'mistral'")):
        merge(config(tunes, "ties", {str(tmp_path / "mistral"): {}}), tmp_path / "out")
    nothing_left(tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(tunes, tmp_path, value):
    shutil.copytree(tunes / "a", tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda tensors: tensors["model.norm.weight"].__setitem__(0, value))
    with pytest.raises(ValueError, match=naming("model.norm.weight", tmp_path / "a", "NaN")):
        merge(config(tmp_path, "ties", {"a": {}}, base_model=str(tunes / "base")), tmp_path / "out")
    nothing_left(tmp_path / "out")


def test_a_result_beyond_its_dtype(tunes, tmp_path):
    models = {"a": {"weight": 1e9}}
    with pytest.raises(ValueError, match="NaN"):
        merge(config(tunes, "task_arithmetic", models, dtype="float16"), tmp_path / "out")
    nothing_left(tmp_path / "out")


def test_models_that_are_not_there(tunes, tmp_path):
    with pytest.raises(OSError, match=naming("gone")):
        merge(config(tunes, "ties", {"gone": {}}), tmp_path / "out")
    nothing_left(tmp_path / "out")


@pytest.mark.parametrize("compression", [None, ImPartConfig(compression_ratio=2)])
def test_an_output_folder_that_holds_something_else(tunes, tmp_path, compression):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(OSError, match=naming(tmp_path / "out")):
        merge(config(tunes, "ties", {"a": {}}), tmp_path / "out", compression=compression)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("compression", [None, ImPartConfig(compression_ratio=2)])
@pytest.mark.parametrize("place", ["base", "c-delta", "link"])
def test_an_output_folder_that_is_one_of_the_models(tunes, tmp_path, compression, place):
    for name in ("base", "c-delta"):
        shutil.copytree(tunes / name, tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "c-delta")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OSError, match=naming(tmp_path / place, "models")):
        merge(config(tmp_path, "ties", {"c-delta": {}}), tmp_path / place, compression=compression)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("which", ["base", "a"])
def test_an_output_projection_that_nobody_would_read(tmp_path, which):
    base = make_model(tiny_config("llama", tie_word_embeddings=True), dtype=torch.float32)
    save_model(base, tmp_path / "base")
    save_model(fine_tune(base), tmp_path / "a")
    other = torch.ones_like(base.get_input_embeddings().weight)
    edit_tensors(tmp_path / which, lambda tensors: tensors.update({"lm_head.weight": other.detach().clone()}))
    with pytest.raises(ValueError, match=naming("config.json", tmp_path / which, "output projection")):
        merge(config(tmp_path, "ties", {"a": {}}), tmp_path / "out")
    nothing_left(tmp_path / "out")


def test_a_failed_merge_makes_no_folders(tunes, tmp_path):
    with pytest.raises(OSError, match=naming("gone")):
        merge(config(tunes, "ties", {"gone": {}}), tmp_path / "some" / "where" / "out")
    assert not list(tmp_path.iterdir())


def test_a_base_that_is_not_finite(tunes, tmp_path):
    shutil.copytree(tunes / "base", tmp_path / "base")
    edit_tensors(tmp_path / "base", lambda tensors: tensors["model.norm.weight"].__setitem__(0, float("nan")))
    with pytest.raises(ValueError, match=naming("model.norm.weight", tmp_path / "base", "NaN")):
        merge(config(tunes, "ties", {"a": {}}, base_model=str(tmp_path / "base")), tmp_path / "out")
    nothing_left(tmp_path / "out")


def test_a_file_of_endless_depth(tmp_path):
    (tmp_path / "deep.yaml").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=naming("deep.yaml", "YAML")):
        merge(tmp_path / "deep.yaml", tmp_path / "out")


def test_a_folder_that_came_meanwhile(tunes, tmp_path, monkeypatch):
    from impart_hf.merging.merge import Merge

    write = Merge.write

    def slowly(*arguments: Any) -> None:
        write(*arguments)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "letter.txt").write_text("dear")

    monkeypatch.setattr(Merge, "write", slowly)
    with pytest.raises(OSError, match=naming(tmp_path / "out")):
        merge(config(tunes, "ties", {"a": {}}), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and len(list((tmp_path / "out").iterdir())) == 1
