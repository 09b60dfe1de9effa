"""Records of a prompt and an answer, for training and judging models on answers alone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

GSM8K = "openai/gsm8k"
_PROMPTS = re.compile(r"(?m)^(?=Question:|Instruction:)")
_ANSWERS = re.compile(r"\n(?:Answer|Response):")


@dataclass(frozen=True)
class Record:
    """A prompt and what should follow it; `prompt + answer` is the whole text."""

    prompt: str
    answer: str


def read_records(source: str | Path) -> list[Record]:
    """Read records of questions and answers.

    Args:
        source: a .jsonl file of objects with "question" and "answer", as GSM8K is published, or with "prompt" and
            "answer", which a space joins; any other file as text with "Question:" and "Answer:", or "Instruction:" and
            "Response:", at the beginning of lines; or `openai/gsm8k@train` and `openai/gsm8k@test`, which are read from
            the Hub.

    Raises:
        ValueError: if there are no records, or a line of a .jsonl file is not such an object.
    """
    text = str(source)
    if text.startswith(f"{GSM8K}@"):
        from datasets import load_dataset

        rows: Any = load_dataset(GSM8K, "main", split=text.partition("@")[2])
        records = [_of_fields(row) for row in rows]
    elif Path(source).suffix == ".jsonl":
        lines = Path(source).read_text("utf-8").split("\n")  # and not at the other line breaks that JSON may hold
        records = [_of_line(line, f"{source}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    else:
        pieces = [piece.strip() for piece in _PROMPTS.split(Path(source).read_text("utf-8"))]
        found = [(piece, match) for piece in pieces if (match := _ANSWERS.search(piece))]
        records = [Record(piece[: match.end()], piece[match.end() :]) for piece, match in found]
    if not records:
        raise ValueError(f"{source} has no records: give a .jsonl file or text with Question: and Answer: lines")
    return records


def _of_line(line: str, place: str) -> Record:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("answer"), str):
        raise ValueError(f'{place} is not an object with the text "answer"')
    if isinstance(row.get("prompt"), str):
        return Record(row["prompt"], f" {row['answer']}")
    if not isinstance(row.get("question"), str):
        raise ValueError(f'{place} is not an object with the text "question" or "prompt"')
    return _of_fields(row)


def _of_fields(row: dict[str, str]) -> Record:
    return Record(f"Question: {row['question']}\nAnswer:", f" {row['answer']}")


@dataclass(frozen=True)
class Tokens:
    """A record's tokens.

    Attributes:
        ids: int64 (length,): prompt with the begin-of-text token in front, answer, end-of-text token.
        prompt: how many of them are the prompt's.
    """

    ids: torch.Tensor
    prompt: int

    @property
    def targets(self) -> torch.Tensor:
        """int64 (length,): the tokens of the answer, and -100 in place of the prompt's."""
        return torch.where(torch.arange(len(self.ids)) < self.prompt, -100, self.ids)


def tokens_of(record: Record, tokenizer: Any) -> Tokens:
    """Return a record's tokens. Prompt and answer are tokenised apart, as they are when an answer is generated."""
    prompt = _prompt_ids(record.prompt, tokenizer)
    answer = tokenizer(record.answer, add_special_tokens=False).input_ids
    return Tokens(torch.tensor([*prompt, *answer, tokenizer.eos_token_id]), len(prompt))


def _prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*first, *tokenizer(prompt, add_special_tokens=False).input_ids]


@torch.inference_mode()
def generated(model: Any, tokenizer: Any, prompts: Sequence[str], *, new_tokens: int, batch_size: int = 8) -> list[str]:
    """Return what a model says after each prompt, greedily, up to its end-of-text token or `new_tokens` tokens."""
    answers = []
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for start in range(0, len(prompts), batch_size):
        ids = [torch.tensor(_prompt_ids(prompt, tokenizer)) for prompt in prompts[start : start + batch_size]]
        batch = pad_sequence(ids, batch_first=True, padding_value=padding, padding_side="left").to(model.device)
        mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True, padding_side="left")
        tokens = model.generate(
            batch, attention_mask=mask.to(model.device), max_new_tokens=new_tokens, do_sample=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=padding,
        )  # fmt: skip
        new = tokens[:, batch.shape[1] :]
        answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def padded(records: list[Tokens], padding: int) -> dict[str, torch.Tensor]:
    """Return a batch of records, padded on the right: input_ids, attention_mask and labels, int64 (records, length)."""
    ids = [record.ids for record in records]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        "labels": pad_sequence([record.targets for record in records], batch_first=True, padding_value=-100),
    }
