"""Scores in a model's card, as the Hub reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from support.messages import naming

from impart_hf.evaluation.model_index import read_metadata, update_card
from impart_hf.evaluation.tasks import TaskScore

STRICT = TaskScore("gsm8k", "exact_match", "strict-match", 0.25, 0.01, True, 1319, 5, "3.0", "openai/gsm8k")
FLEXIBLE = replace(STRICT, filter="flexible-extract", value=0.375)
GROUP = TaskScore("mmlu", "acc", "none", 0.5, None, True, 14042, None, "2", "")


def results_in(folder: Path) -> dict[tuple[str, str], EvalResult]:
    """What the Hub's client reads from a card, by task and metric."""
    card = ModelCard.load(folder / "README.md")
    name, results = model_index_to_eval_results(metadata_load(folder / "README.md")["model-index"])
    assert name == card.data.model_name
    found = {(result.dataset_name, str(result.metric_name)): result for result in results}
    assert len(found) == len(results)
    return found


def test_scores_are_what_the_hub_reads(repository: Path) -> None:
    before = ModelCard.load(repository / "README.md")
    update_card(repository, [STRICT, FLEXIBLE, GROUP])
    found = results_in(repository)
    assert list(found) == [
        ("gsm8k", "exact_match (strict-match)"),
        ("gsm8k", "exact_match (flexible-extract)"),
        ("mmlu", "acc"),
    ]
    strict, _, group = found.values()
    assert (strict.task_type, strict.dataset_type, strict.metric_type) == (
        "text-generation",
        "openai/gsm8k",
        "exact_match",
    )
    assert (strict.metric_value, strict.metric_args) == (0.25, {"stderr": 0.01})
    assert strict.dataset_args == {"num_few_shot": 5, "samples": 1319, "task_version": "3.0"}
    assert str(strict.source_name).startswith("lm-eval ")
    assert (group.dataset_type, group.metric_args) == ("mmlu", None)
    assert group.dataset_args == {"samples": 14042, "task_version": "2"}
    after = ModelCard.load(repository / "README.md")
    assert after.text == before.text
    kept = before.data.to_dict()
    assert kept.items() <= after.data.to_dict().items() and kept["tags"]


def test_a_score_is_replaced_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        """---
license: mit
model-index:
- name: Its own name
  results:
  - task: {type: text-generation}
    dataset: {name: Somebody's, type: some/body}
    metrics:
    - {type: acc, value: 0.125, name: acc}
---
# Text
""",
        "utf-8",
    )
    update_card(tmp_path, [STRICT, FLEXIBLE])
    update_card(tmp_path, [replace(STRICT, value=0.75, num_fewshot=0)])
    values = {key: result.metric_value for key, result in results_in(tmp_path).items()}
    assert values == {
        ("Somebody's", "acc"): 0.125,
        ("gsm8k", "exact_match (flexible-extract)"): 0.375,
        ("gsm8k", "exact_match (strict-match)"): 0.75,
    }
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.model_name, data.license) == ("Its own name", "mit")


OTHERS = """\
---
model-index:
- name: coder
  results:
  - task: {type: text-generation}
    dataset: {name: MultiPL-HumanEval (Python), type: nuprl/MultiPL-E}
    metrics: [{type: pass@1, value: 0.336, name: pass@1, verified: false}]
    source: {name: one, url: https://one.example}
  - task: {type: text-generation}
    dataset: {name: MultiPL-HumanEval (C++), type: nuprl/MultiPL-E}
    metrics: [{type: pass@1, value: 0.3155, name: pass@1, verified: false}]
    source: {name: two, url: https://two.example}
  - task: {type: text-generation}
    dataset: {name: gsm8k, type: openai/gsm8k}
    metrics: [{type: exact_match, value: 0.9, name: exact_match (strict-match)}]
---
# Coder
"""


def test_results_of_others_stay_as_they_are(tmp_path: Path) -> None:
    """Also those of one data set, which the Hub's client would give one name, and those of the same score."""
    path = tmp_path / "README.md"
    path.write_text(OTHERS, "utf-8")
    before = metadata_load(path)["model-index"][0]
    for score in (STRICT, replace(STRICT, value=0.75)):
        update_card(tmp_path, [score])
    after = metadata_load(path)["model-index"][0]
    assert after["results"][:-1] == before["results"]
    assert [metric["value"] for metric in after["results"][-1]["metrics"]] == [0.75]
    assert path.read_text("utf-8").endswith("---\n# Coder\n")


def test_what_a_score_was_measured_on_stays_with_it(tmp_path: Path) -> None:
    by_judge = replace(GROUP, task="alpaca_eval", metric="win_rate", filter="one", samples=805)
    update_card(tmp_path, [by_judge])
    update_card(tmp_path, [replace(by_judge, filter="other", samples=10)])
    samples = {name: result.dataset_args["samples"] for (_, name), result in results_in(tmp_path).items()}
    assert samples == {"win_rate (one)": 805, "win_rate (other)": 10}


def test_tasks_of_one_data_set_keep_their_names(tmp_path: Path) -> None:
    tasks = [replace(STRICT, task=name, dataset="allenai/ai2_arc") for name in ("arc_easy", "arc_challenge")]
    update_card(tmp_path, tasks)
    update_card(tmp_path, [replace(tasks[1], value=0.5)])
    values = {task: result.metric_value for (task, _), result in results_in(tmp_path).items()}
    assert values == {"arc_easy": 0.25, "arc_challenge": 0.5}


def test_a_model_without_a_card_gets_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    update_card(folder, [GROUP])
    assert [result.metric_value for result in results_in(folder).values()] == [0.5]
    assert ModelCard.load(folder / "README.md").data.model_name == "model"
    assert [path.name for path in folder.iterdir()] == ["README.md"]


RESULTS = "results: [{task: {type: a}, dataset: {name: a, type: a}, metrics: [{type: acc, value: 1}]}]"
SEVERAL = f"model-index:\n- name: a\n  {RESULTS}\n- name: b\n  {RESULTS}"


@pytest.mark.parametrize(
    "metadata", ["model-index: 3", "model-index:\n- name: a\n  results:\n  - task: {}", SEVERAL, ": ["]
)
def test_a_card_that_cannot_be_read_is_left_as_it_is(metadata: str, tmp_path: Path) -> None:
    path, text = tmp_path / "README.md", f"---\n{metadata}\n---\n"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=naming(path)):
        update_card(tmp_path, [GROUP])
    assert path.read_text("utf-8") == text


def test_only_a_local_folder_has_a_card_to_update() -> None:
    with pytest.raises(ValueError, match=naming("'user/model'", "folder")):
        read_metadata("user/model")
