"""Loading a delta repository, and what its model says."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.open import open_repository

IDS = torch.arange(5, 45).view(2, 20)


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def decode_all(folder: Path, base: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors that the repository stands for, decoded without transformers."""
    opened = open_repository(str(folder), HubOptions(), base)
    return {name: opened.tensor(name) for name in opened.names()}


@contextlib.contextmanager
def captured_log() -> Iterator[list[str]]:
    """The messages that transformers, PEFT, accelerate and impart_hf log, those said once only included."""
    for method in ("warning_once", "info_once"):
        getattr(logging.Logger, method).cache_clear()
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "accelerate", "impart_hf")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield lines
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
