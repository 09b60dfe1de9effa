"""Scores in a model's card, as the `model-index` that the Hub shows."""

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, metadata_load, metadata_save
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..common.files import atomic_write
from ..common.names import public_name
from .task_scores import TaskScore

_CARD = "README.md"
_TASK = "text-generation"
_SOURCE = "https://github.com/EleutherAI/lm-evaluation-harness"


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """Return the metadata of the card in a model's folder; none if it has no card.

    Raises:
        ValueError: if it is no folder, or its card's metadata cannot be read or are of several models.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"'{folder}' is no local folder, and only the card of one can be updated: download it first")
    path = Path(folder, _CARD)
    if not path.is_file():
        return {}
    try:
        ModelCard.load(path)  # which raises an error for a model-index that the Hub would not read
        metadata = metadata_load(path) or {}
    except Exception as error:  # huggingface_hub has no error of its own for this
        raise ValueError(f"the metadata of '{path}' cannot be read, correct them first: {error}") from error
    if len(index := metadata.get("model-index") or []) > 1:
        raise ValueError(
            f"the model-index of '{path}' has {len(index)} models, and scores are of one: remove the others"
        )
    return metadata


def update_card(folder: str | Path, scores: Sequence[TaskScore]) -> None:
    """Put scores into a folder's card; earlier scores of ours for the same task, metric and filter go, all else stays.

    Args:
        folder: a model's local folder.
        scores: its scores.

    Raises:
        ValueError: as for `read_metadata`.
    """
    metadata, path, name = read_metadata(folder), Path(folder, _CARD), public_name(str(folder))
    model = (metadata.get("model-index") or [{"name": name, "results": []}])[0]
    new = list(map(_result, scores))
    renewed = {(result.dataset_name, result.metric_type, result.metric_name) for result in new}
    # As they stand: the Hub's client would write results of one data set under one name, with one source.
    kept = [left for result in model["results"] if (left := _without(result, renewed))]
    added = eval_results_to_model_index(name, new)[0]["results"]
    with atomic_write(path) as temporary:
        temporary.write_bytes(path.read_bytes() if path.is_file() else f"\n# {name}\n".encode())
        metadata_save(temporary, {**metadata, "model-index": [{**model, "results": [*kept, *added]}]})


def _without(result: dict[str, Any], renewed: set[tuple[str, str, str | None]]) -> dict[str, Any] | None:
    """Return a result of a model-index without those metrics of ours that are renewed; None if no metric is left."""
    dataset = result["dataset"]
    if (result.get("source") or {}).get("url") != _SOURCE or dataset.get("config") != dataset["name"]:
        return result  # somebody else's
    left = [m for m in result["metrics"] if (dataset["name"], m["type"], m.get("name")) not in renewed]
    return {**result, "metrics": left} if left else None


def _result(score: TaskScore) -> EvalResult:
    """Return a score as the Hub has it."""
    shots = {} if score.num_fewshot is None else {"num_few_shot": score.num_fewshot}
    error = {} if score.stderr is None else {"stderr": score.stderr}
    return EvalResult(
        task_type=_TASK,
        dataset_type=score.dataset or score.task,
        dataset_name=score.task,
        # The Hub's client gives results of one data set and configuration the name of the first of them.
        dataset_config=score.task,
        dataset_args={**shots, "samples": score.samples, "task_version": score.version},
        metric_type=score.metric,
        metric_name=score.metric if score.filter == "none" else f"{score.metric} ({score.filter})",
        metric_value=score.value,
        metric_args=error or None,
        source_name=f"lm-eval {version('lm_eval')}",
        source_url=_SOURCE,
    )
