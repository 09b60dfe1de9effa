"""Every table is run end to end on a small pair; what is done is not done again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.reproduced import make_small_pair, run

from impart_hf.reproduce.main import main
from impart_hf.reproduce.planning import Conditions, entries_of
from impart_hf.reproduce.runner import Runner, results_in
from impart_hf.reproduce.small import SmallPair
from impart_hf.reproduce.tables import load_table, table_names
from impart_hf.storage.folder_lock import FolderLock

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("reproduce")]
FIRST = ("impart-sparsification", "--rows", "backbone", "--rows", "dare")  # the rows of two models


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_pair(tmp_path_factory.mktemp("small") / "pair")


@pytest.fixture(scope="module")
def everything(pair: Path) -> Path:
    """The output folder of all tables; not to be written to."""
    folder = pair.parent / "out"
    assert main(["all", "--small", "--pair", str(pair), "--output", str(folder), "--limit", "4"]) == 0
    return folder


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text("utf-8").splitlines()]


def test_every_table_is_rendered(everything: Path) -> None:
    assert {path.stem for path in everything.glob("*.md")} == set(table_names())
    for name in table_names():
        text = (everything / f"{name}.md").read_text("utf-8")
        assert text.startswith(f"## {load_table(name).title}\n\n**A trial run on toys.**")
        assert "not run yet" not in text and "failed" not in text


@pytest.mark.parametrize("name", table_names())
def test_the_rows_of_a_table_are_measured(name: str, everything: Path) -> None:
    text = (everything / f"{name}.md").read_text("utf-8")
    _, _, missing = text.partition("Not measured:\n\n")
    for reason in missing.partition("\n\n")[0].splitlines():
        assert "cannot be reached" in reason  # by a model as small as this
        assert any(f"-{ratio}/*`" in reason for ratio in (64, 128))


def test_a_result_says_what_it_depends_on(everything: Path) -> None:
    compressed = [line for line in lines_of(everything) if line["identity"]["make"] == "compress"]
    line = next(line for line in compressed if line["identity"]["method"]["name"] == "dare-qt")
    assert line["identity"]["limit"] == line["samples"] == 4
    assert line["model"]["ratio"] == pytest.approx(line["identity"]["method"]["compression_ratio"], rel=0.3)
    assert 0 <= line["value"] <= 1 and line["machine"]["cores"]
    assert all(len(one["key"]) == 20 for one in lines_of(everything))


def test_a_merge_s_settings_are_those_that_the_search_chose(everything: Path) -> None:
    merged = [line for line in lines_of(everything) if line["identity"]["make"] == "merge"]
    for line in merged:
        identity, chosen = line["identity"], line["model"]["chosen"]
        assert chosen["lambda"] in identity["lambdas"]
        assert line["model"]["candidates"] == len(identity["lambdas"])
    assert {line["identity"]["merge_method"] for line in merged} == {
        "task_arithmetic", "ties", "dare_linear", "dare_ties", "impart_linear", "impart_ties",
    }  # fmt: skip


def test_layers_are_dropped_and_merged(everything: Path) -> None:
    pruned = [line for line in lines_of(everything) if line["identity"]["make"] == "prune"]
    both = next(line["model"] for line in pruned if line["identity"]["merged"])
    assert len(both["dropped_layers"]) == len(both["merged_layers"]) == 1
    assert both["parameters"] < both["parameters_before"]
    assert any(not line["identity"]["drop"] for line in pruned)  # the dense model, which is only trained


def test_models_are_removed_when_they_are_scored(everything: Path) -> None:
    assert list((everything / "models").iterdir()) == []


@pytest.fixture
def done(everything: Path, tmp_path: Path) -> Path:
    """A copy of the results that a test may spoil."""
    shutil.copytree(everything, tmp_path / "out")
    return tmp_path / "out"


def small(capsys: pytest.CaptureFixture[str], pair: Path, folder: Path, *arguments: str) -> tuple[int, str, str]:
    return run(capsys, *arguments, "--small", "--pair", pair, "--output", folder, "--limit", "4")


def test_what_is_done_is_not_done_again(done: Path, pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The further fine-tunes of merges are those of the first folder, so that their models would be others.
    names = [name for name in table_names() if "merging" not in name]
    before = (done / "results.jsonl").read_bytes()
    status, out, err = small(capsys, pair, done, *names)
    assert status == 0 and "on wizardmath" not in err.replace("128 on", "").replace("64 on", "")
    assert (done / "results.jsonl").read_bytes() == before
    assert out.count("**A trial run on toys.**") == len(names)


def test_a_killed_run_goes_on(done: Path, pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (done / "results.jsonl").read_bytes().splitlines(keepends=True)
    (done / "results.jsonl").write_bytes(b"".join(lines[1:]) + lines[0][:50])  # the last line was not finished
    table = done / "impart-sparsification.md"
    before = table.read_text("utf-8")
    table.unlink()
    status, _, err = small(capsys, pair, done, *FIRST)
    assert status == 0 and err == "1 of 1: Backbone on wizardmath-13b\n"
    measured = json.loads(lines[0])
    again = json.loads((done / "results.jsonl").read_text("utf-8").splitlines()[-1])
    assert (again["key"], again["value"]) == (measured["key"], measured["value"])
    assert table.read_text("utf-8") == before  # with all rows, not only those of this run


def test_another_limit_is_another_result(done: Path, pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = ["impart-sparsification", "--rows", "backbone/wizardmath-13b/gsm8k", "--small", "--output", str(done)]
    status, _, err = run(capsys, *row, "--pair", pair, "--limit", "3")
    assert status == 0 and err.startswith("1 of 1")
    assert lines_of(done)[-1]["samples"] == 3


def test_kept_models_are_not_made_again(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = ("impart-sparsification", "--rows", "dare/wizardmath-13b/gsm8k", "--keep")
    assert small(capsys, pair, tmp_path, *row)[0] == 0
    (folder,) = (tmp_path / "models").iterdir()
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    (tmp_path / "results.jsonl").unlink()
    assert small(capsys, pair, tmp_path, *row)[0] == 0
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} != {}


@pytest.fixture
def broken(pair: Path, tmp_path: Path) -> Path:
    """A pair whose fine-tune cannot be read."""
    shutil.copytree(pair, tmp_path / "broken")
    (tmp_path / "broken" / "finetuned" / "model.safetensors").write_bytes(b"nothing")
    return tmp_path / "broken"


def test_a_row_that_fails_does_not_stop_the_others(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ("impart-sparsification", "--rows", "fine-tuned/wizardmath-13b/gsm8k", "--rows", "backbone")
    status, out, err = small(capsys, broken, tmp_path / "out", *rows)
    assert status == 1
    assert "failed: " in err and "- `fine-tuned/wizardmath-13b/gsm8k`: " in out
    assert {line["row"].split("/")[0] for line in lines_of(tmp_path / "out")} == {"backbone"}


def test_no_model_is_made_that_cannot_be_scored(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = shutil.copytree(pair, tmp_path / "without")
    for file in (without / "tasks").glob("*.yaml"):
        file.write_text(file.read_text("utf-8").replace("examples.jsonl", "missing.jsonl"), "utf-8")
    status, out, err = small(capsys, without, tmp_path / "out", "impart-sparsification", "--rows", "dare/*/gsm8k")
    assert status == 1 and "failed: " in err
    assert not (tmp_path / "out" / "models").exists()


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    lock = FolderLock(tmp_path)
    assert lock.take()
    yield tmp_path
    lock.release()


def test_two_runs_in_one_folder_are_refused(locked: Path, pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = small(capsys, pair, locked, *FIRST)
    assert (status, out) == (1, "") and "--output" in err


def test_nothing_to_run_takes_no_lock(locked: Path) -> None:
    Runner(Conditions(locked), results_in(locked)).run([])


def test_a_score_that_a_task_does_not_give_is_named(tmp_path: Path, pair: Path) -> None:
    table = SmallPair(pair, tmp_path / "small").table(load_table("impart-sparsification"))
    conditions = Conditions(tmp_path, limit=2)
    (entry,) = entries_of(table, ["backbone/wizardmath-13b/gsm8k"], conditions)
    wrong = replace(entry, task=replace(entry.task, metric="bleu", filter="none"))
    runner = Runner(conditions, results_in(tmp_path), say=lambda line: None)
    runner.run([wrong, entry])
    assert list(runner.failed) == [wrong.key] and entry.key in runner.results, "the model's other tasks are scored"
    assert "bleu" in runner.failed[wrong.key] and "acc" in runner.failed[wrong.key]


def test_a_model_is_kept_until_all_its_tasks_are_scored(tmp_path: Path, pair: Path) -> None:
    table = SmallPair(pair, tmp_path / "small").table(load_table("impart-sparsification"))
    conditions = Conditions(tmp_path, limit=2)
    (entry,) = entries_of(table, ["dare/wizardmath-13b/gsm8k"], conditions)
    wrong, folder = replace(entry, task=replace(entry.task, metric="bleu")), tmp_path / "models" / entry.making_key
    missing = replace(entry, task=replace(entry.task, lm_eval="no_such_task"))
    (other,) = entries_of(table, ["dare/wizardmath-13b/gsm8k"], replace(conditions, limit=1))
    for entries, left in (([wrong], True), ([entry], False), ([missing, other], True)):
        Runner(conditions, results_in(tmp_path), say=lambda line: None).run(entries)
        assert (folder / "facts.json").exists() == left


def test_another_pair_has_other_fine_tunes(pair: Path, tmp_path: Path) -> None:
    """Though both write to one folder."""
    other = Path(shutil.copytree(pair, tmp_path / "other"))
    (other / "base_heldout.txt").write_text("Another text.", "utf-8")
    first, again, second = (SmallPair(folder, tmp_path / "out").finetunes for folder in (pair, pair, other))
    assert first == again and set(first).isdisjoint(second)
