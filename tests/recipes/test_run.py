"""Runs of recipes: what they write, how they are resumed, and what they do again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from support.messages import naming
from support.tiny_models import edit_json, load_tensors
from transformers import AutoModelForCausalLM

from impart_hf import PrunedLlamaForCausalLM
from impart_hf.common.files import OutputError
from impart_hf.evaluation import compare
from impart_hf.pruning import importance, pruned_writer, recovery
from impart_hf.recipes import RecipeError, RecipeReport, plan, run_recipe
from impart_hf.recipes.folder import RunFolder
from impart_hf.storage.folder_lock import FolderLock

pytestmark = pytest.mark.xdist_group("recipes")

NAMES = ["01-importance", "02-layers", "03-importance", "04-width", "05-recover", "06-compress"]


def run(recipe: Any, output: Path) -> RecipeReport:
    return run_recipe(recipe, output, device="cpu", progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `done` lies; the folder of a whole run of `recipe`, not to be written to."""
    return tmp_path_factory.mktemp("whole") / "tiny-llama"


@pytest.fixture
def done(recipe: dict, whole: Path) -> Path:
    if not whole.exists():
        run(recipe, whole)
    return whole


@pytest.fixture
def output(done: Path, tmp_path: Path) -> Path:
    """A copy of the whole run that a test may spoil."""
    return Path(shutil.copytree(done, tmp_path / "out"))


def stages_in(output: Path) -> dict[str, int]:
    """The folders of finished stages, and what tells whether they are still the same."""
    return {path.name: path.stat().st_ino for path in sorted((output / "stages").iterdir())}


def changed(recipe: dict, number: int, **settings: Any) -> dict[str, Any]:
    stages = [dict(stage) for stage in recipe["stages"]]
    ((kind, old),) = stages[number - 1].items()
    stages[number - 1] = {kind: {**old, **settings}}
    return {**recipe, "stages": stages}


def test_a_whole_run(done: Path, recipe: dict, llama: Path) -> None:
    report = json.loads((done / "report.json").read_text())
    assert report["recipe"] == recipe and report["folder"] == str(done / "stages/06-compress")
    assert [stage["stage"] for stage in report["stages"]] == ["model", *NAMES]
    models = {stage["stage"]: stage for stage in report["stages"] if stage["evaluation"]}
    assert list(models) == ["model", "02-layers", "04-width", "05-recover", "06-compress"]
    costs = [stage["evaluation"]["cost"] for stage in models.values()]
    assert costs[0]["parameters"] > costs[1]["parameters"] > costs[2]["parameters"] == costs[4]["parameters"]
    assert costs[0]["decode_flops_per_token"] > costs[1]["decode_flops_per_token"] > costs[2]["decode_flops_per_token"]
    assert sum(costs[0]["kv_cache_bytes_per_token"]) > sum(costs[1]["kv_cache_bytes_per_token"])
    sizes = [p.stat().st_size for p in (done / "stages/06-compress").iterdir() if p.name != "README.md"]
    assert models["06-compress"]["disk_bytes"] == sum(sizes)
    assert all(stage["seconds"] > 0 for name, stage in models.items() if name != "model")
    assert len((done / "report.md").read_text().splitlines()) == 2 + 2 + len(models)
    assert (done / "report.png").stat().st_size > 5000


def test_what_it_makes(done: Path) -> None:
    delta = AutoModelForCausalLM.from_pretrained(done / "stages/06-compress")
    recovered = AutoModelForCausalLM.from_pretrained(done / "stages/05-recover")
    assert isinstance(delta, PrunedLlamaForCausalLM) and delta.config.widths == recovered.config.widths
    assert delta.delta_config.base_model_name_or_path == str(done / "stages/04-width")
    steps = json.loads((done / "stages/05-recover/config.json").read_text())["pruning"]["steps"]
    assert [step["kind"] for step in steps] == ["layers", "width", "recovery"]
    assert (steps[0]["merged_into"] != {}, steps[2]["steps"]) == (True, 3)


def test_measurements_are_those_of_compare_models(done: Path, recipe: dict) -> None:
    models = [recipe["model"], *(str(done / "stages" / name) for name in ("02-layers", "05-recover", "06-compress"))]
    found = compare.compare_models(models, **recipe["eval"]).evaluations
    stages = {stage["stage"]: stage["evaluation"] for stage in json.loads((done / "report.json").read_text())["stages"]}
    for evaluation, name in zip(found, ("model", "02-layers", "05-recover", "06-compress"), strict=True):
        assert stages[name]["perplexity"] == pytest.approx(evaluation.perplexity, rel=1e-6)
        assert stages[name]["cost"]["parameters"] == evaluation.cost.parameters


def test_the_card_has_the_recipe_and_the_table(done: Path, recipe: dict) -> None:
    card = ModelCard.load(done / "stages/06-compress/README.md")
    assert card.text.strip().startswith("# tiny-llama, as a compressed delta")
    for line in (done / "report.md").read_text().splitlines()[2:]:
        assert line in card.text
    assert "model: llama" in card.text and "data: train.txt" in card.text and recipe["model"] not in card.text
    assert "delta-compressed" in card.data.tags
    assert "stage by stage" not in (done / "stages/05-recover/README.md").read_text()


def test_a_finished_run_does_nothing_again(output: Path, recipe: dict) -> None:
    before, card = stages_in(output), (output / "stages/06-compress/README.md").read_text()
    report = run(recipe, output)
    assert stages_in(output) == before and report.folder == output / "stages/06-compress"
    assert (output / "stages/06-compress/README.md").read_text() == card


def test_a_changed_stage_is_done_again_with_what_follows(output: Path, recipe: dict, capsys) -> None:
    before = stages_in(output)
    run_recipe(changed(recipe, 5, steps=2), output, device="cpu")
    after = stages_in(output)
    assert [name for name in NAMES if before[name] != after[name]] == ["05-recover", "06-compress"]
    note = next(line for line in capsys.readouterr().err.splitlines() if "removed" in line)
    assert "05-recover, 06-compress" in note and "04-width" not in note


def test_stages_that_are_no_longer_in_the_recipe_are_removed(output: Path, recipe: dict) -> None:
    before = stages_in(output)
    (output / "stages" / "notes").mkdir()
    (output / "stages" / ".06-compress.partial").mkdir()
    report = run({**recipe, "stages": recipe["stages"][:5]}, output)
    after = stages_in(output)
    assert set(after) == {*NAMES[:5], "notes"} and all(before[name] == after[name] for name in NAMES[:5])
    assert report.folder == output / "stages/05-recover"
    card = ModelCard.load(report.folder / "README.md")
    assert card.text.strip().startswith("# out") and "06-compress" not in card.text and "05-recover" in card.text
    assert "pruned" in card.data.tags


def test_other_measurements_leave_the_stages_alone(output: Path, recipe: dict) -> None:
    before = stages_in(output)
    report = run({**recipe, "eval": {**recipe["eval"], "samples": 2, "latency": True, "repeats": 1}}, output)
    assert stages_in(output) == before
    tokens = {result.evaluation["text_tokens"] for result in report.measured}
    assert tokens == {2 * 31} and "decode tokens/s" in report.table()
    card = (output / "stages/06-compress/README.md").read_text()
    assert card.count("stage by stage") == 1 and "decode tokens/s" in card


def test_costs_alone(output: Path, recipe: dict) -> None:
    report = run({name: value for name, value in recipe.items() if name != "eval"}, output)
    assert "perplexity" not in report.table() and "parameters" in report.table()
    assert not (output / "report.png").exists()


def test_tasks(output: Path, recipe: dict, task: Path) -> None:
    report = run({**recipe, "eval": {"tasks": [str(task)], "task_settings": {"limit": 4}}}, output)
    scores = {result.name: result.evaluation["scores"] for result in report.measured if result.evaluation}
    assert all(0 <= found[0]["value"] <= 1 and found[0]["samples"] == 4 for found in scores.values())
    assert report.table().count("| going_on |") == len(scores) == 5 and "stderr" in report.table()
    assert "| going_on |" in (output / "stages/06-compress/README.md").read_text()
    assert len(list(output.glob("results/*/going_on-*.json"))) == 5
    assert (output / "report.png").exists()


def test_the_last_model_and_its_base_alone_are_kept(recipe: dict, tmp_path: Path, done: Path) -> None:
    output = tmp_path / "out"
    report = run({**recipe, "keep": "last"}, output)
    assert list(stages_in(output)) == ["04-width", "06-compress"]
    expected = json.loads((done / "report.json").read_text())["stages"]
    perplexities = [stage["evaluation"]["perplexity"] for stage in expected if stage["evaluation"]]
    assert [result.evaluation["perplexity"] for result in report.measured] == pytest.approx(perplexities, rel=1e-6)
    before = stages_in(output)
    run({**recipe, "keep": "last"}, output)
    assert stages_in(output) == before
    # Another compression needs the recovered model, which is made again from what is there.
    run({**changed(recipe, 6, ratio=2.5), "keep": "all"}, output)
    after = stages_in(output)
    assert list(after) == ["04-width", "05-recover", "06-compress"] and after["04-width"] == before["04-width"]


def stopped(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def half_written(folder: Path, *_: Any, **__: Any) -> None:
    (folder / "model.safetensors").write_bytes(b"half")
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_that_is_interrupted_in_every_stage(
    recipe: dict, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other; each time it goes on, and the result is that of an unbroken run."""
    output, finished = tmp_path / "tiny-llama", 0
    for place, how, names in [
        (f"{compare.__name__}.perplexity_of", stopped, []),
        (f"{importance.__name__}.train", stopped, []),
        (f"{pruned_writer.__name__}.write_weights", half_written, NAMES[:1]),
        (f"{recovery.__name__}.write_weights", half_written, NAMES[:4]),
        ("impart_hf.compression.compress.compress_pair", stopped, NAMES[:5]),
        ("impart_hf.recipes.report.RecipeReport.draw", stopped, NAMES),
    ]:
        before = stages_in(output) if output.exists() else {}
        with monkeypatch.context() as patched:
            patched.setattr(place, how)
            with pytest.raises(KeyboardInterrupt):
                run(recipe, output)
        after = stages_in(output)
        assert [name for name in after if not name.startswith(".")] == names
        assert all(after[name] == before[name] for name in NAMES[:finished])
        finished = len(names)
    run(recipe, output)
    assert stages_in(output) == after
    one, other = load_tensors(output / "stages/05-recover"), load_tensors(done / "stages/05-recover")
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert load_tensors(output / "stages/06-compress").keys() == load_tensors(done / "stages/06-compress").keys()


def test_a_stage_that_fails_is_named_and_the_others_stay(recipe: dict, output: Path) -> None:
    before = stages_in(output)
    with pytest.raises(RecipeError, match=naming("06-compress")):
        run(changed(recipe, 6, ratio=1e6), output)
    after = stages_in(output)
    assert list(after) == NAMES[:5] and all(after[name] == before[name] for name in after)
    run(recipe, output)
    again = stages_in(output)
    assert list(again) == NAMES and all(again[name] == before[name] for name in NAMES[:5])


def test_measurements_that_fail_are_named(recipe: dict, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=naming("eval", "batch_size", 0)):
        run({**recipe, "eval": {**recipe["eval"], "batch_size": 0}}, tmp_path / "out")
    assert list((tmp_path / "out/stages").iterdir()) == []


def test_outputs_that_are_not_free(recipe: dict, tmp_path: Path, output: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(OutputError, match=naming(tmp_path / name)):
            run(recipe, tmp_path / name)
    edit_json(output / "state.json", format_version=99)
    with pytest.raises(RecipeError, match=naming(output / "state.json")):
        run(recipe, output)
    (output / "state.json").write_text("{")
    with pytest.raises(RecipeError, match=naming(output / "state.json")):
        run(recipe, output)


def test_what_is_made_from_a_stage_that_is_done_again_is_done_again(recipe: dict, output: Path) -> None:
    """Otherwise a delta could have a base with other heads than the one that was trained."""
    shutil.rmtree(output / "stages/04-width")
    before = stages_in(output)
    run(recipe, output)
    after = stages_in(output)
    assert [name for name in NAMES if before.get(name) != after[name]] == NAMES[3:]


def test_a_stage_that_runs_out_of_memory_is_named(
    recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(f"{importance.__name__}.train", out_of_memory)
    with pytest.raises(RecipeError, match=naming("01-importance", "out of memory")):
        run(recipe, tmp_path / "out")


def test_the_stages_of_another_model_stay(recipe: dict, output: Path, tmp_path: Path) -> None:
    before = stages_in(output)
    shutil.copytree(recipe["model"], tmp_path / "other")
    with pytest.raises(OutputError, match=naming(recipe["model"], tmp_path / "other")):
        run({**recipe, "model": str(tmp_path / "other")}, output)
    assert stages_in(output) == before


def test_another_version_does_the_stages_again(recipe: dict, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "__version__", "99")
    before = stages_in(output)
    run({**recipe, "stages": recipe["stages"][:2]}, output)
    assert stages_in(output) != before


def test_nothing_is_made_for_a_wrong_recipe(recipe: dict, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=naming("05-recover", "steps", 0)):
        run(changed(recipe, 5, steps=0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_runs_in_one_folder(recipe: dict, output: Path) -> None:
    lock = FolderLock(output)
    assert lock.take()
    with pytest.raises(OutputError, match=naming(output)):
        run(recipe, output)
    lock.release()


def test_a_run_that_was_killed_before_its_first_entry(recipe: dict, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/lock").touch()
    assert RunFolder(tmp_path / "out", recipe["model"]).entries == {}


def test_a_model_that_is_never_pruned(recipe: dict, tmp_path: Path) -> None:
    """It gets a card, and its delta rests on the recipe's model, by the name that it is said to have on the Hub."""
    report = run({**recipe, "stages": [recipe["stages"][4]]}, tmp_path / "trained")
    assert report.folder is not None
    card = ModelCard.load(report.folder / "README.md").text.strip()
    assert card.startswith("# trained\n") and "stage by stage" in card
    report = run({**recipe, "stages": recipe["stages"][4:], "base_name": "me/llama"}, tmp_path / "trained")
    assert [result.name for result in report.results] == ["model", "01-recover", "02-compress"]
    config = json.loads((tmp_path / "trained/stages/02-compress/config.json").read_text())
    assert config["base_model_name_or_path"] == "me/llama"
