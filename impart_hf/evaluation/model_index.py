"""Scores in a model's card, as the `model-index` that the Hub shows."""

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, metadata_load

from ..common.files import atomic_write
from ..common.names import public_name
from .task_scores import TaskScore

_CARD = "README.md"
_TASK = "text-generation"


def read_card(folder: str | Path) -> ModelCard:
    """Return the card of a model's folder, a new one if it has none.

    Raises:
        ValueError: if it is no folder, or its card's metadata cannot be read or are of several models.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"'{folder}' is no local folder, and only the card of one can be updated: download it first")
    path = Path(folder, _CARD)
    if not path.is_file():
        return ModelCard("---\n{}\n---\n\n" + f"# {public_name(str(folder))}\n")
    try:
        card, index = ModelCard.load(path), (metadata_load(path) or {}).get("model-index")
    except Exception as error:  # huggingface_hub has no error of its own for this
        raise ValueError(f"the metadata of '{path}' cannot be read, correct them first: {error}") from error
    if index and len(index) > 1:  # the Hub's client would give all of their results to the last one
        raise ValueError(
            f"the model-index of '{path}' has {len(index)} models, and scores are of one: remove the others"
        )
    return card


def update_card(folder: str | Path, scores: Sequence[TaskScore]) -> None:
    """Put scores into a folder's card; a score of the same task, metric and filter is replaced, all else stays.

    Args:
        folder: a model's local folder.
        scores: its scores.

    Raises:
        ValueError: as for `read_card`.
    """
    card = read_card(folder)
    data: Any = card.data  # ModelCardData, which huggingface_hub declares as its base class
    new = {_key(result): result for result in map(_result, scores)}
    kept = [result for result in data.eval_results or [] if _key(result) not in new]
    data.eval_results = [*kept, *new.values()]
    data.model_name = data.model_name or public_name(str(folder))
    with atomic_write(Path(folder, _CARD)) as temporary:
        temporary.write_text(str(card), "utf-8")


def _key(result: EvalResult) -> tuple[str, str, str | None]:
    return result.dataset_name, result.metric_type, result.metric_name


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
        source_url="https://github.com/EleutherAI/lm-evaluation-harness",
    )
