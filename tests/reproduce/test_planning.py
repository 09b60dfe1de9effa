"""What rows need, and by what their results are recognised."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.messages import naming

from impart_hf.evaluation.alpaca import AlpacaSettings
from impart_hf.evaluation.judge import JudgeSettings
from impart_hf.evaluation.task_scores import TaskScore
from impart_hf.reproduce.makes import Merged
from impart_hf.reproduce.planning import Conditions, Entry, entries_of
from impart_hf.reproduce.scoring import chosen
from impart_hf.reproduce.tables import Task, load_table


def entry(table: str, row: str, conditions: Conditions) -> Entry:
    (found,) = entries_of(load_table(table), [row], conditions)
    return found


@pytest.fixture
def conditions(tmp_path: Path) -> Conditions:
    return Conditions(tmp_path / "out")


def test_rows_of_several_tables_with_one_content_have_one_key(conditions: Conditions) -> None:
    keys = {
        entry("impart-sparsification", "impart/wizardmath-13b/gsm8k", conditions).key,
        entry("impart-ablations", "impart/wizardmath-13b/gsm8k", conditions).key,
        entry("impart-hyperparameters", "impart-c1-beta0.6/wizardmath-13b/gsm8k", conditions).key,
        entry("impart-ratios", "impart-32/wizardmath-13b/gsm8k", conditions).key,
    }
    assert len(keys) == 1


@pytest.mark.parametrize("change", [{"limit": 5}, {"backend": "vllm"}, {"replaced": {"wizardmath-13b": "other/model"}}])
def test_a_key_depends_on_the_conditions_of_a_score(conditions: Conditions, change: dict) -> None:
    row = "dare/wizardmath-13b/gsm8k"
    before = entry("impart-sparsification", row, conditions)
    assert entry("impart-sparsification", row, replace(conditions, **change)).key != before.key
    assert entry("impart-sparsification", row, replace(conditions, batch_size=2)).key == before.key


def test_a_key_depends_on_the_tasks_data(conditions: Conditions, tmp_path: Path) -> None:
    """A trial on a few questions is not the result of all of them."""
    folder, keys = tmp_path / "data", []
    (folder / "openai").mkdir(parents=True)
    for content in (None, "one", "three"):
        if content is not None:
            (folder / "openai" / "test.jsonl").write_text(content)
            conditions = replace(conditions, data_dir=folder)
        keys.append(entry("impart-sparsification", "dare/wizardmath-13b/gsm8k", conditions).key)
    assert len(set(keys)) == 3


def test_another_version_makes_and_scores_its_own_models(
    conditions: Conditions, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ("impart-sparsification", "dare/wizardmath-13b/gsm8k", conditions)
    before = entry(*row)
    keys = {before.key, before.making_key}
    monkeypatch.setattr("impart_hf.reproduce.planning.package_version", lambda package: "another")
    keys.add(entry(*row).key)
    assert entry(*row).making_key == before.making_key
    monkeypatch.setattr("impart_hf.reproduce.planning.__version__", "another")
    keys |= {entry(*row).key, entry(*row).making_key}
    assert len(keys) == 5


@pytest.mark.parametrize("own", [True, False])
def test_a_group_has_a_score_of_its_own_or_none(own: bool) -> None:
    task = Task("math", "MATH", "maths", "acc", "none")
    inside = [TaskScore(f"maths_{n}", "acc", "none", 0.25, None, True, 4, 0, "1") for n in range(2)]
    if own:
        assert chosen([replace(inside[0], task="maths", value=0.5), *inside], task).value == 0.5
        assert chosen(inside[:1], task).value == 0.25, "a YAML file is no name of a task"
    else:
        with pytest.raises(ValueError, match=naming("'maths'", "several")):
            chosen(inside, task)


def test_a_key_depends_on_a_text_s_content(conditions: Conditions, tmp_path: Path) -> None:
    text = tmp_path / "texts" / "train" / "piqa.txt"
    text.parent.mkdir(parents=True)
    keys = []
    for content in ("one", "two", "one"):
        text.write_text(content)
        with_texts = replace(conditions, texts=tmp_path / "texts")
        keys.append(entry("gradpruner", "gradpruner-full/llama3.1-8b/piqa", with_texts).key)
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize(
    ("table", "row", "named"),
    [
        ("impart-sparsification", "dare/llama2-chat-13b/alpacaeval", ("--judge", "--instructions")),
        ("impart-sparsification", "dare/wizardcoder-13b/humaneval", "--allow-code"),
        ("impart-merging", "fine-tuned/llamacoder-13b/humaneval", ("--model", "llamacoder-13b")),
        ("impart-merging", "ta/merged-13b/gsm8k", ("llamacoder-13b", "--texts", "validation/gsm8k.jsonl")),
        ("gradpruner", "gradpruner-full/llama3.1-8b/piqa", ("--texts", "train/piqa.jsonl")),
        ("gradpruner", "gradpruner-full/llama3.1-8b/billsum", "lm-eval"),
    ],
)
def test_a_row_says_what_it_needs(table: str, row: str, named: object, conditions: Conditions, tmp_path: Path) -> None:
    assert re.search(naming(named), entry(table, row, conditions).needs)


def test_only_deltas_run_beside_their_base(conditions: Conditions) -> None:
    beside = replace(conditions, backend="runtime")
    assert "--backend" in entry("impart-sparsification", "backbone/wizardmath-13b/gsm8k", beside).needs
    assert entry("impart-sparsification", "dare/wizardmath-13b/gsm8k", beside).needs == ""


def test_what_is_given_is_no_longer_needed(conditions: Conditions, tmp_path: Path) -> None:
    for name in ("gsm8k.jsonl", "humaneval.txt", "ifeval.parquet"):
        path = tmp_path / "texts" / "validation" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = replace(
        conditions, texts=tmp_path / "texts", allow_code="isolated", replaced={"llamacoder-13b": "mine/llamacoder"}
    )
    merged = entry("impart-merging", "ties-impart/merged-13b/humaneval", found)
    assert merged.needs == ""
    assert isinstance(merged.making, Merged)
    assert merged.making.models["llamacoder-13b"] == "mine/llamacoder"
    assert set(merged.making.validation) == {"gsm8k", "humaneval", "ifeval"}  # one model for all of them


def test_all_rows_of_a_merge_have_one_model(conditions: Conditions) -> None:
    entries = entries_of(load_table("impart-merging"), ["ta"], conditions)
    assert len({e.making_key for e in entries}) == 1 and len({e.key for e in entries}) == 3


def test_a_judge_is_asked_in_chats_and_belongs_to_the_result(conditions: Conditions, tmp_path: Path) -> None:
    instructions = tmp_path / "instructions.json"
    instructions.write_text("[]")
    row = "fine-tuned/llama2-chat-13b/alpacaeval"
    keys = set()
    for judge in ("one", "other"):
        alpaca = AlpacaSettings(instructions, JudgeSettings("http://localhost", judge))
        judged = entry("impart-sparsification", row, replace(conditions, alpaca=alpaca))
        assert judged.needs == ""
        settings = judged.conditions.settings_for(judged.task)
        assert settings.alpaca == alpaca and settings.apply_chat_template
        keys.add(judged.key)
        other = entry("impart-sparsification", "dare/wizardmath-13b/gsm8k", judged.conditions)
        settings = other.conditions.settings_for(other.task)
        assert settings.alpaca is None and not settings.apply_chat_template
        keys.add(other.key)
    assert len(keys) == 3  # who judges has no effect on other tasks


def test_conditions_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=naming("--model", "wizard")):
        Conditions(tmp_path, replaced={"wizard": "x"})
    with pytest.raises(FileNotFoundError, match=naming("--texts", "nowhere")):
        Conditions(tmp_path, texts=Path("nowhere"))
