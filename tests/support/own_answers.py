"""Tasks with exact answers whose right answers are a model's own, so that models can be told apart by their scores."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from support.load_script import load_script
from support.tiny_models import tiny_tokenizer


def write_own_answers(model: Path, folder: Path, count: int = 10) -> Path:
    """Write a folder as `exact_answers.write_tasks` does: every answer is what the model says, greedily."""
    script = load_script("exact_answers")
    asked = script.exact_records(count, 0, held_out=True)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    said = script.answers_of(loaded, tiny_tokenizer(), asked)
    records = [
        script.ExactRecord(record.prompt, f" {answer}", record.kind) for record, answer in zip(asked, said, strict=True)
    ]
    script.write_tasks(folder, records, records)
    return folder
