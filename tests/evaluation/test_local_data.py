"""Tasks of lm-eval itself, by name, on data sets in a local folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lm_eval.tasks import TaskManager
from support.code_tasks import HUMANEVAL, MBPP, usable_isolation
from support.messages import naming
from support.tiny_models import Pair, make_model, save_model, tiny_config

from impart_hf.evaluation.task_loading import executing_code
from impart_hf.evaluation.tasks import TaskSettings, evaluate_tasks

# The index of lm-eval's tasks takes ten seconds, once in a process.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("lm-eval's own tasks")]

GSM8K = [{"question": f"What is {i} + {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(1, 8)]
PIQA = [{"goal": f"Open jar {i}", "sol1": "turn the lid", "sol2": "eat it", "label": i % 2} for i in range(3)]
ARC = [
    {
        "id": str(i),
        "question": f"Which is {i}?",
        "choices": {"text": ["one", "two", "three"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[i],
    }
    for i in range(3)
]
MMLU = [
    {"question": f"What is {i}?", "subject": "s", "choices": ["w", "x", "y", "z"], "answer": i % 4} for i in range(8)
]


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = tiny_config("llama", max_position_embeddings=2048)
    return str(save_model(make_model(config, dtype=torch.float32), tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets in the formats that `datasets` reads."""
    folder = tmp_path_factory.mktemp("data")
    for split, records in (("train", GSM8K), ("test", GSM8K[:3])):
        write_lines(folder / "openai/gsm8k/main" / f"{split}.jsonl", records)
    for split in ("train", "validation"):
        path = folder / "baber/piqa" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(PIQA).to_parquet(path)
    splits = {split: datasets.Dataset.from_list(ARC) for split in ("train", "validation", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "allenai/ai2_arc/ARC-Challenge"))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_tasks_by_name(model: str, data: Path) -> None:
    """Two of multiple choice and one that generates, in three formats."""
    settings = TaskSettings(num_fewshot=1, data_dir=data, gen_kwargs={"max_gen_toks": 2})
    scores = evaluate_tasks(model, ["piqa", "arc_challenge", "gsm8k"], settings)
    found = [(s.task, s.metric, s.filter, s.samples, s.num_fewshot, s.dataset) for s in scores]
    assert found == [
        ("piqa", "acc", "none", 3, 1, "baber/piqa"),
        ("piqa", "acc_norm", "none", 3, 1, "baber/piqa"),
        ("arc_challenge", "acc", "none", 3, 1, "allenai/ai2_arc"),
        ("arc_challenge", "acc_norm", "none", 3, 1, "allenai/ai2_arc"),
        ("gsm8k", "exact_match", "strict-match", 3, 1, "openai/gsm8k"),
        ("gsm8k", "exact_match", "flexible-extract", 3, 1, "openai/gsm8k"),
    ]
    assert all(score.stderr is not None and 0 <= score.value <= 1 for score in scores)
    # Of two solutions, always one is right; the same of both orders of labels.
    assert scores[0].value in (1 / 3, 2 / 3)


def test_a_group(model: str, tmp_path: Path) -> None:
    """Of 19 tasks: its score is of all their questions together, and comes before theirs."""
    names = [f"mmlu_{subject}" for subject in SUBJECTS]
    for number, subject in enumerate(SUBJECTS):
        folder = tmp_path / "cais/mmlu" / subject
        write_lines(folder / "dev.jsonl", MMLU[:5])
        write_lines(folder / "test.jsonl", MMLU[: 4 + number % 3])
    group, *tasks = evaluate_tasks(model, ["mmlu_stem"], TaskSettings(num_fewshot=0, data_dir=tmp_path))
    assert (group.task, group.metric, group.dataset) == ("mmlu_stem", "acc", "")
    assert sorted(score.task for score in tasks) == names
    assert group.samples == sum(score.samples for score in tasks)
    expected = sum(score.value * score.samples for score in tasks) / group.samples
    assert group.value == pytest.approx(expected) and group.stderr is not None and group.num_fewshot == 0


SUBJECTS = sorted(
    "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science college_mathematics "
    "college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics "
    "high_school_physics high_school_statistics machine_learning".split()
)


def test_a_repository_of_the_hub(model: str, tmp_path: Path) -> None:
    """As it is downloaded: its card says where a configuration's files are."""
    folder = tmp_path / "openai/gsm8k"
    for split in ("train", "test"):
        write_lines(folder / "files" / f"{split}.jsonl", GSM8K[:3])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - {split: train, path: files/train.jsonl}\n  - {split: test, path: files/test.jsonl}\n---\n"
    )
    settings = TaskSettings(num_fewshot=1, data_dir=tmp_path, gen_kwargs={"max_gen_toks": 2}, limit=2)
    assert evaluate_tasks(model, ["gsm8k"], settings)[0].samples == 2


def test_the_folder_in_which_one_is(model: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    settings = TaskSettings(data_dir=Path("."), gen_kwargs={"max_gen_toks": 2})
    score = evaluate_tasks(model, ["gsm8k"], settings)[0]
    assert (score.samples, score.dataset) == (3, "openai/gsm8k")


def test_examples_from_the_validation_split(model: str, tmp_path: Path) -> None:
    """Of a task without training split, lm-eval reads it even if no example is asked for."""
    for split in ("validation", "test"):
        write_lines(tmp_path / "some/body" / f"{split}.jsonl", PIQA)
    (tmp_path / "goals.yaml").write_text(
        """task: goals
dataset_path: some/body
validation_split: validation
test_split: test
output_type: multiple_choice
doc_to_text: "{{goal}}"
doc_to_choice: "{{[sol1, sol2]}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
    )
    settings = TaskSettings(data_dir=tmp_path)
    assert evaluate_tasks(model, [str(tmp_path / "goals.yaml")], settings)[0].samples == len(PIQA)


def test_what_is_missing_is_named(model: str, data: Path, tmp_path: Path) -> None:
    for task, place in (("gsm8k", "openai/gsm8k/main"), ("piqa", "baber/piqa")):
        with pytest.raises(ValueError, match=naming(f"'{task}'", f"'{tmp_path / place}'")):
            evaluate_tasks(model, [task], TaskSettings(data_dir=tmp_path))
    write_lines(tmp_path / "openai/gsm8k/main/train.jsonl", GSM8K)
    with pytest.raises(ValueError, match=naming("'gsm8k'", tmp_path / "openai/gsm8k/main", "'test'", "train")):
        evaluate_tasks(model, ["gsm8k"], TaskSettings(data_dir=tmp_path))


def test_files_that_a_task_names_are_read(model: str, data: Path, task: Path, tiny_pair: Pair) -> None:
    """They are none of the folder's."""
    assert evaluate_tasks(str(tiny_pair.base), [str(task)], TaskSettings(data_dir=data))[0].samples == 24


def test_unknown_names_and_code(model: str, data: Path) -> None:
    with pytest.raises(ValueError, match=naming("'gsm8'", "gsm8k")):
        evaluate_tasks(model, ["gsm8"], TaskSettings(data_dir=data))
    for name in ("humaneval", "mbpp"):  # which execute something when they are loaded
        with pytest.raises(ValueError, match=naming(f"'{name}'", "--allow-code")) as raised:
            evaluate_tasks(model, [name], TaskSettings(data_dir=data))
        assert not re.search("cannot be loaded", str(raised.value))


def test_code_in_groups_that_a_group_lists(model: str, tmp_path: Path) -> None:
    """As mmlu_continuation lists its own, in place of their names."""
    (tmp_path / "a.yaml").write_text("task: a\nunsafe_code: true\n", "utf-8")
    (tmp_path / "outer.yaml").write_text("group: outer\ntask:\n- group: inner\n  task: [a, {task: a}]\n", "utf-8")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert set(executing_code(manager, "outer")) == {"a"}


def test_tasks_that_execute_code(model: str, tmp_path: Path) -> None:
    """All of lm-eval's, on a model whose programs are wrong, and on one problem that is solved in its prompt."""
    solved = {**HUMANEVAL[0], "prompt": "def one():\n    return 1\n\n\n#", "entry_point": "one"}
    solved["test"] = "def check(candidate):\n    assert candidate() == 1\n"
    for name in ("openai/openai_humaneval", "evalplus/humanevalplus"):
        write_lines(tmp_path / name / "test.jsonl", [solved, HUMANEVAL[1]])
    for name in ("google-research-datasets/mbpp/full", "evalplus/mbppplus"):
        write_lines(tmp_path / name / "test.jsonl", MBPP[:2])
    settings = TaskSettings(data_dir=tmp_path, allow_code=usable_isolation(), gen_kwargs={"max_gen_toks": 1})
    names = ["humaneval", "humaneval_plus", "humaneval_instruct", "humaneval_64"]
    others = ["mbpp", "mbpp_plus", "mbpp_instruct", "mbpp_plus_instruct"]
    scores = evaluate_tasks(model, [*names, *others], settings)
    found = {(score.task, score.metric): score.value for score in scores}
    assert {key: found[key] for key in found if key[0] in names} == {
        **{(name, "pass@1"): 0.5 for name in names[:3]},
        **{("humaneval_64", f"pass@{k}"): 0.5 for k in (2, 8, 16, 32, 64)},
    }
    assert {key: found[key] for key in found if key[0] in others} == {(name, "pass_at_1"): 0.0 for name in others}
    assert all(score.higher_is_better and score.samples == 2 for score in scores)
