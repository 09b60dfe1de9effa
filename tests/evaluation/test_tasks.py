"""Scores of tasks are those that lm-eval gives for the same model, data and settings."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from support.lm_eval_task import accuracy, write_reciting_task, write_task
from support.messages import naming
from support.pruned_models import pruned_and_dense
from support.tiny_models import Pair, edit_json, save_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from impart_hf.evaluation import models as evaluated_models
from impart_hf.evaluation.task_loading import load_tasks
from impart_hf.evaluation.task_scores import metrics_of, scores_of
from impart_hf.evaluation.tasks import TaskEvaluation, TaskScore, TaskSettings, evaluate_tasks

QUESTIONS = ["A fine-tuned model", "is its base", "and a small", "difference", "The quick", "brown fox"]


def lm_evals_own(model: Path, task: Path, **options: Any) -> dict[str, Any]:
    """What lm-eval itself gives for a model in a folder, in float32."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with mock.patch("lm_eval.evaluator.add_env_info"):  # it lists all installed packages, for two seconds
        return lm_eval.simple_evaluate(
            model=HFLM(pretrained=loaded, tokenizer=tiny_tokenizer(), batch_size=4),
            tasks=[str(task)],
            task_manager=TaskManager(include_defaults=False),
            **options,
        )


def said(model: Path, text: str) -> str:
    """What a model says in eight tokens after a text, until its end-of-sequence token."""
    tokenizer, loaded = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=False).partition("</s>")[0]


@pytest.fixture(scope="module")
def reciting(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of six questions, to two of which the tiny pair's fine-tune gives the right answer."""
    answers = {text: said(tiny_pair.finetuned, text) if i < 2 else "no" for i, text in enumerate(QUESTIONS)}
    return write_reciting_task(tmp_path_factory.mktemp("reciting"), answers)


def by_metric(scores: list[TaskScore]) -> dict[tuple[str, str, str], TaskScore]:
    found = {(score.task, score.metric, score.filter): score for score in scores}
    assert len(found) == len(scores)
    return found


# --- scores


@pytest.mark.parametrize("kind", ["base", "finetuned", "delta"])
def test_multiple_choice(kind: str, task: Path, tiny_pair: Pair, tiny_repository: Path) -> None:
    model = tiny_repository if kind == "delta" else getattr(tiny_pair, kind)
    (score,) = evaluate_tasks(str(model), [str(task)], dtype=torch.float32)
    examples = [json.loads(line) for line in (task.parent / "examples.jsonl").read_text("utf-8").splitlines()]
    # Two choices may be as likely as one another up to rounding.
    expected = accuracy(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), examples)
    assert score.value == pytest.approx(expected, abs=1.5 / len(examples))
    theirs = lm_evals_own(model, task)["results"]["going_on"]
    assert (score.value, score.stderr) == (theirs["acc,none"], theirs["acc_stderr,none"])
    # The standard error of a mean of n zeros and ones.
    assert score.stderr == pytest.approx((score.value * (1 - score.value) / (len(examples) - 1)) ** 0.5)
    assert (score.task, score.metric, score.filter, score.higher_is_better) == ("going_on", "acc", "none", True)
    assert (score.samples, score.num_fewshot, score.dataset) == (24, 0, "")


def test_generation(reciting: Path, tiny_pair: Pair) -> None:
    scores = evaluate_tasks(str(tiny_pair.finetuned), [str(reciting)], dtype=torch.float32)
    found = by_metric(scores)
    assert list(found) == [("reciting", "exact_match", "whole"), ("reciting", "exact_match", "stripped")]
    assert scores[0].value == 2 / 6 and scores[0].version == "2.5"
    theirs = lm_evals_own(tiny_pair.finetuned, reciting)["results"]["reciting"]
    for score in scores:
        expected = theirs[f"exact_match,{score.filter}"], theirs[f"exact_match_stderr,{score.filter}"]
        assert (score.value, score.stderr) == expected


def test_a_pruned_model(task: Path, tmp_path: Path) -> None:
    """Its zero-weight twin, which is dense, has its scores."""
    pruned, dense = pruned_and_dense()
    pruned_scores, dense_scores = (
        evaluate_tasks(str(save_model(model, tmp_path / name)), [str(task)], dtype=torch.float32)
        for name, model in (("pruned", pruned), ("dense", dense))
    )
    assert pruned_scores == dense_scores


def test_deltas_beside_their_base(task: Path, reciting: Path, tiny_repository: Path) -> None:
    """They are read for the base in memory, and say what the fine-tune does."""
    names = [str(task), str(reciting)]
    expected = evaluate_tasks(str(tiny_repository), names, dtype=torch.float32)
    assert evaluate_tasks(str(tiny_repository), names, backend="runtime", dtype=torch.float32) == expected


def test_deltas_of_two_dtypes(repository: Path, tmp_path: Path) -> None:
    """Each has its own, as it has alone."""
    other = Path(shutil.copytree(repository, tmp_path / "other"))
    edit_json(other / "config.json", dtype="float16")
    loader = evaluated_models.ModelLoader("runtime")
    for source, dtype in ((repository, torch.bfloat16), (other, torch.float16)):
        parameters = loader.model(str(source), dtype).parameters()
        assert {parameter.dtype for parameter in parameters} == {dtype}


def test_a_loaded_model(task: Path, reciting: Path, tiny_pair: Pair) -> None:
    names = [str(task), str(reciting)]
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.finetuned, dtype=torch.float32)
    assert evaluate_tasks(model, names) == evaluate_tasks(str(tiny_pair.finetuned), names, dtype=torch.float32)


# --- settings


@pytest.mark.parametrize(
    "settings, options",
    [
        (TaskSettings(limit=5), {"limit": 5}),
        (TaskSettings(limit=0.3), {"limit": 0.3}),
        (TaskSettings(num_fewshot=2, batch_size="auto"), {"num_fewshot": 2}),
        (TaskSettings(num_fewshot=1, seed=3), {"num_fewshot": 1, "fewshot_random_seed": 3}),
        (TaskSettings(bootstrap_iters=0), {"bootstrap_iters": 0}),
        (
            TaskSettings(apply_chat_template=True, num_fewshot=1, system_instruction="Be brief."),
            {"apply_chat_template": True, "num_fewshot": 1, "system_instruction": "Be brief."},
        ),
        (
            TaskSettings(apply_chat_template=True, num_fewshot=1, fewshot_as_multiturn=False),
            {"apply_chat_template": True, "num_fewshot": 1, "fewshot_as_multiturn": False},
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_settings_are_lm_evals(settings: TaskSettings, options: dict, task: Path, tiny_pair: Pair) -> None:
    (score,) = evaluate_tasks(str(tiny_pair.finetuned), [str(task)], settings, dtype=torch.float32)
    theirs = lm_evals_own(tiny_pair.finetuned, task, **options)
    assert score.samples == theirs["n-samples"]["going_on"]["effective"]
    assert score.num_fewshot == theirs["n-shot"]["going_on"]
    expected = theirs["results"]["going_on"]
    assert score.value == expected["acc,none"]
    assert (score.stderr or "N/A") == expected["acc_stderr,none"]


def test_arguments_of_generation(reciting: Path, tiny_pair: Pair) -> None:
    """One token is no answer of eight."""
    settings = TaskSettings(gen_kwargs={"max_gen_toks": 1})
    scores = evaluate_tasks(str(tiny_pair.finetuned), [str(reciting)], settings, dtype=torch.float32)
    assert [score.value for score in scores] == [0, 0]


def test_settings_without_effect(task: Path, reciting: Path, tiny_pair: Pair, tmp_path: Path) -> None:
    without = tmp_path / "without_examples.yaml"
    without.write_text(task.read_text("utf-8").replace("task: going_on", "task: without\nnum_fewshot: 0"), "utf-8")
    for path, given, names in (
        (task, {"gen_kwargs": {"max_gen_toks": 2}}, "gen_kwargs"),
        (without, {"num_fewshot": 2}, "num_fewshot"),
        (reciting, {"gen_kwargs": {"temperature": 0.7}}, ("temperature", "'reciting'", "do_sample=true")),
    ):
        with pytest.raises(ValueError, match=naming(names)):
            evaluate_tasks(str(tiny_pair.base), [str(path)], TaskSettings(**given))


def test_a_temperature_means_sampling(reciting: Path, tmp_path: Path) -> None:
    """Said so that kept answers, which are for greedy ones, are not taken for further samples."""
    sampled = tmp_path / "sampled.yaml"
    sampled.write_text(reciting.read_text("utf-8").replace("do_sample: false", "temperature: 0.8"), "utf-8")
    (found,) = load_tasks([str(sampled)], TaskSettings())
    (loaded,) = found.tasks.values()
    assert loaded.get_config("generation_kwargs")["do_sample"] is True


def test_metrics_of_scores_are_lm_evals() -> None:
    metrics = {"sample_len": 9, "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 1, "f1_stderr,none": "N/A"}
    better = {"acc": True, "f1": None}
    scores = scores_of({**metrics, "alias": "a, b"}, task="t", higher_is_better=better, num_fewshot=0, version=1.0)
    assert metrics_of(scores) == metrics
    assert [(score.metric, score.stderr, score.higher_is_better) for score in scores] == [
        ("acc", 0.1, True),
        ("f1", None, None),
    ]


# --- bad input


@pytest.mark.parametrize(
    "settings, names",
    [
        ({"limit": 0}, ("limit", 0)),
        ({"limit": 1.5}, ("limit", 1.5)),
        ({"limit": -0.1}, ("limit", -0.1)),
        ({"num_fewshot": -1}, ("num_fewshot", -1)),
        ({"batch_size": 0}, ("batch_size", 0)),
        ({"batch_size": "all"}, ("batch_size", "'all'")),
        ({"bootstrap_iters": -1}, ("bootstrap_iters", -1)),
    ],
)
def test_numbers_out_of_range(settings: dict[str, Any], names: tuple) -> None:
    with pytest.raises(ValueError, match=naming(*names)):
        TaskSettings(**settings)
    with pytest.raises(ValueError, match=naming(*names)):
        replace(TaskSettings(), **settings)


@pytest.mark.parametrize(
    "options, names",
    [
        ({"tasks": []}, "task"),
        ({"tasks": ["/gone/task.yaml"]}, ("task", "'/gone/task.yaml'")),
        ({"backend": "abacus"}, ("backend", "'abacus'")),
        ({"backend": "runtime"}, ("delta repository", "runtime")),
        ({"settings": TaskSettings(data_dir="/gone")}, ("data_dir", "'/gone'")),
        ({"results": Path(__file__)}, (Path(__file__), "folder")),
        ({"device": "abacus"}, ("device", "'abacus'")),
        ({"model_args": {"dtype": "float16"}}, ("model_args", "'dtype'")),
    ],
)
def test_bad_input(
    options: dict[str, Any], names: Any, task: Path, tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluated_models, "load", lambda *args, **kwargs: pytest.fail("weights were read"))
    options = {"tasks": [str(task)], **options}
    with pytest.raises((ValueError, OSError), match=naming(names)):
        evaluate_tasks(str(tiny_pair.base), **options)


def test_an_argument_that_a_model_does_not_take(task: Path, tiny_pair: Pair) -> None:
    with pytest.raises(ValueError, match=naming("model_args", tiny_pair.base, "abacus")):
        evaluate_tasks(str(tiny_pair.base), [str(task)], model_args={"abacus": 1})


def test_more_processes_than_questions(task: Path, tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.base)
    monkeypatch.setattr("impart_hf.common.processes.count", lambda: 6)
    with pytest.raises(ValueError, match=naming("'going_on'", 5, 6)):
        TaskEvaluation([str(task)], TaskSettings(limit=5)).score(model, tiny_tokenizer())


def test_one_number_is_of_one_task(task: Path, reciting: Path) -> None:
    assert TaskEvaluation([str(task)]).first_metric() == ("acc", True)
    with pytest.raises(ValueError, match=naming(task, "group")):
        TaskEvaluation([str(task), str(reciting)]).first_metric()


def test_deltas_of_two_bases_are_not_beside_one(
    task: Path, tiny_repository: Path, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = evaluated_models.ModelLoader("runtime")
    with pytest.raises(ValueError, match=naming(tiny_repository, family / "one", family / "base")):
        loader.check([str(tiny_repository), str(family / "one")])


def test_a_model_without_a_chat_template(task: Path, pair: Pair) -> None:
    (pair.base / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=naming(pair.base, "chat template", "--apply-chat-template")):
        evaluate_tasks(str(pair.base), [str(task)], TaskSettings(apply_chat_template=True))


def test_the_file_of_a_group(tiny_pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "group.yaml").write_text("group: several\ntask: [one, two]\n", "utf-8")
    with pytest.raises(ValueError, match=naming(tmp_path / "group.yaml", "group")):
        evaluate_tasks(str(tiny_pair.base), [str(tmp_path / "group.yaml")])


def test_two_tasks_of_one_name(task: Path, tiny_pair: Pair, tmp_path: Path) -> None:
    """One would have the other's score. The same one twice is one."""
    same, other = tmp_path / "same.yaml", tmp_path / "other.yaml"
    same.write_text(task.read_text("utf-8"), "utf-8")
    other.write_text(task.read_text("utf-8").replace("answer\n", "1\n"), "utf-8")
    assert len(TaskEvaluation([str(task), str(same)]).requested) == 2
    with pytest.raises(ValueError, match=naming(task, other, "'going_on'")):
        evaluate_tasks(str(tiny_pair.base), [str(task), str(other)])


def test_results_are_not_kept_of_loaded_models(task: Path, tiny_pair: Pair, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.base)
    with pytest.raises(ValueError, match=naming("results", "Hub id")):
        evaluate_tasks(model, [str(task)], results=tmp_path)


def test_code_is_not_executed_without_leave(tiny_pair: Pair, tmp_path: Path) -> None:
    """Of a task of one's own; those of lm-eval are known before they are loaded: test_local_data.py."""
    path = write_task(tmp_path)
    path.write_text(path.read_text("utf-8") + "unsafe_code: true\n", "utf-8")
    with pytest.raises(ValueError, match=naming("'going_on'", "--allow-code")):
        evaluate_tasks(str(tiny_pair.base), [str(path)])
