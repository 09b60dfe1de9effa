"""A task of lm-eval, and its metric written out."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from support.tiny_models import tiny_tokenizer

TEXT = Path(str(textwrap.__file__)).read_text("utf-8")


def write_task(folder: Path) -> Path:
    """A task of lm-eval: choose how a line of text goes on."""
    lines = [line for line in TEXT.splitlines() if len(line) > 50][:24]
    examples = [
        {"question": line[:25], "choices": [other[25:50] for other in (line, lines[i - 1], lines[i - 2])], "answer": 0}
        for i, line in enumerate(lines)
    ]
    (folder / "examples.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples), "utf-8")
    (folder / "going_on.yaml").write_text(
        f"""task: going_on
dataset_path: json
dataset_kwargs:
  data_files: {folder / "examples.jsonl"}
  cache_dir: {folder / "cache"}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
        "utf-8",
    )
    return folder / "going_on.yaml"


def write_reciting_task(folder: Path, answers: Mapping[str, str]) -> Path:
    """A task of lm-eval: say at most eight tokens after a text; the answer is taken whole, and without its ends.

    Args:
        folder: where its files are written.
        answers: the right answer to each text.
    """
    examples = [{"question": question, "answer": answer} for question, answer in answers.items()]
    (folder / "recited.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples), "utf-8")
    (folder / "reciting.yaml").write_text(
        f"""task: reciting
dataset_path: json
dataset_kwargs:
  data_files: {folder / "recited.jsonl"}
  cache_dir: {folder / "cache"}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: []
  max_gen_toks: 8
  do_sample: false
filter_list:
  - name: whole
    filter: [{{function: take_first}}]
  - name: stripped
    filter: [{{function: remove_whitespace}}, {{function: take_first}}]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.5
""",
        "utf-8",
    )
    return folder / "reciting.yaml"


@torch.no_grad()
def accuracy(model: Any, examples: Sequence[dict]) -> float:
    """Of the task, written out."""
    tokenizer, right = tiny_tokenizer(), 0
    for example in examples:
        scores = []
        for choice in example["choices"]:
            question, whole = (tokenizer(t).input_ids for t in (example["question"], example["question"] + choice))
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(logits[i - 1, whole[i]].item() for i in range(len(question), len(whole))))
        right += scores.index(max(scores)) == example["answer"]
    return right / len(examples)
