"""Tasks by vLLM: the scores of a delta repository are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.lm_eval_task import write_reciting_task
from support.vllm_engines import EngineProcess

from impart_hf.evaluation.tasks import TaskScore, TaskSettings, evaluate_tasks

pytestmark = pytest.mark.vllm


def scores_by_vllm(holder: Any, model: str, tasks: list[str], results: Path) -> list[TaskScore]:
    """In the engine's process."""
    model_args = {"max_model_len": 128, "disable_log_stats": True}
    settings = TaskSettings(batch_size="auto")
    return evaluate_tasks(
        model, tasks, settings, backend="vllm", dtype=torch.float32, model_args=model_args, results=results
    )


def test_scores_of_a_delta(task: Path, family: Path, tmp_path: Path) -> None:
    """Of choices, and of what is generated: half of the right answers are what transformers says."""
    answers = {text: "no" for text in ("A fine-tuned model", "is its base", "and a small", "difference")}
    said = write_reciting_task(tmp_path, answers)
    model, results = str(family / "one"), tmp_path / "results"
    with EngineProcess() as engine:
        found = engine.run(scores_by_vllm, model, [str(task), str(said)], results)
        again = engine.run(scores_by_vllm, model, [str(task), str(said)], results)
    expected = evaluate_tasks(model, [str(task), str(said)], dtype=torch.float32)
    assert found == again and len(list(results.rglob("*.json"))) == 2
    assert found[1:] == expected[1:]
    # Two choices may be as likely as one another up to rounding.
    assert found[0].value == pytest.approx(expected[0].value, abs=1.5 / 24) and found[0].samples == 24


def interrupted_by_vllm(holder: Any, model: str, task: str, results: Path) -> list[int]:
    """In the engine's process: how many requests are generated until the run is interrupted, and by the next run."""
    from lm_eval.models.vllm_causallms import VLLM

    generate, counts = VLLM._model_generate, [0]

    def counting(lm: Any, requests: Any = None, **options: Any) -> Any:
        if len(counts) == 1 and counts[0] == 2:
            raise KeyboardInterrupt
        counts[-1] += len(requests)
        return generate(lm, requests=requests, **options)

    VLLM._model_generate = counting
    settings, model_args = TaskSettings(batch_size=1), {"max_model_len": 128, "disable_log_stats": True}
    for _ in range(2):
        try:
            evaluate_tasks(
                model, [task], settings, backend="vllm", dtype=torch.float32, model_args=model_args, results=results
            )
        except KeyboardInterrupt:
            counts.append(0)
    return counts


def test_an_interrupted_task_continues(family: Path, tmp_path: Path) -> None:
    said = write_reciting_task(tmp_path, {text: "no" for text in ("one", "two", "three", "four")})
    with EngineProcess() as engine:
        assert engine.run(interrupted_by_vllm, str(family / "one"), str(said), tmp_path / "results") == [2, 2]
