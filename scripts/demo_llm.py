"""Demonstrate the main workflow on a real language model: Gemma 3 270M, fine-tuned to answer in JSON.

    pip install -c constraints.txt '.[plot,real-pair]'
    python scripts/demo_llm.py FOLDER

Orders in plain sentences are answered by their fields, so that base, fine-tune and delta can be told apart by reading
what they say. All weights but the embeddings are trained: a delta is for fine-tunes that are not small by themselves,
as LoRA adapters are, and embeddings that stay as they are save time and memory.

FOLDER receives base/, finetuned/, delta/ and delta.png; the same command uses what is there, and goes on with a
training or a compression that was stopped. Gemma is provided under and subject to the Gemma Terms of Use,
ai.google.dev/gemma/terms, which bind whoever uses, changes or passes on the base, the fine-tune or the delta.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by OpenMP when torch is loaded

import torch
from answer_quality import Reference, answer_quality, examples_of
from demo_steps import heading, print_table, step
from json_answers import order_records, score
from question_answers import Record, generated, tokens_of
from real_pair import TrainingSettings, make_base, train
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

_NEW_TOKENS = 48  # a right answer has at most 36
_BATCH = 8  # records at a time, in training and in answering
_SHOWN, _WIDTH = 3, 100  # answers that are printed, and their longest line


def compare(models: dict[str, Path], records: Sequence[Record]) -> None:
    """Print how far each model's answers are from the fine-tune's, how many are right, and a few of them.

    Two models at a time are in memory, in float32, which processors without bfloat16 compute faster.

    Args:
        models: folders; the fine-tune's is named "fine-tune".
        records: what the models are asked.
    """
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(models["fine-tune"])
    prompts = [record.prompt for record in records]
    finetuned = AutoModelForCausalLM.from_pretrained(models["fine-tune"], dtype=torch.float32)
    reference = Reference.of(finetuned, examples_of(records, tokenizer))
    rows = [("model", "KL(fine-tune || model), nats/token", "valid JSON", "all fields right")]
    answers = {}
    for name, folder in models.items():
        model = finetuned
        if name != "fine-tune":
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        divergence = answer_quality(model, reference)["kl"]
        answers[name] = generated(model, tokenizer, prompts, new_tokens=_NEW_TOKENS, batch_size=_BATCH)
        found = score(answers[name], records)
        rows.append((name, f"{divergence:.5f}", *(f"{n} of {len(records)}" for n in (found.valid, found.right))))
    print_table(rows)
    heading(f"Answers to {min(_SHOWN, len(records))} of them, generated greedily")
    column = max(map(len, models)) + 2
    for number, prompt in enumerate(prompts[:_SHOWN]):
        print(f"\n{prompt}")
        for name, texts in answers.items():
            line = textwrap.shorten(texts[number], _WIDTH, placeholder=" …") or "(nothing)"
            print(f"  {name.ljust(column)}{line}")


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo_llm.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for all that is made")
    parser.add_argument("--base", type=Path, help="folder of another causal language model (default: Gemma 3 270M)")
    parser.add_argument("--steps", type=int, default=40, help="of training, 8 records each (default: 40)")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--ratio", default="100", help="compression ratio (default: 100)")
    parser.add_argument("--questions", type=int, default=24, help="number of held-out records (default: 24)")
    arguments = parser.parse_args(argv)
    if arguments.questions < 1:
        parser.error("--questions: at least 1")
    try:
        arguments.training = TrainingSettings("full", arguments.steps, _BATCH, arguments.learning_rate, save_steps=20)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parsed(argv)
    folder = arguments.folder
    base, finetuned, delta, picture = (folder / name for name in ("base", "finetuned", "delta", "delta.png"))
    if arguments.base:
        base = arguments.base
    else:
        heading("The base: Gemma 3 270M, from the package's 4 bits to bfloat16")
        make_base(base)
    tokenizer = AutoTokenizer.from_pretrained(base)

    heading(f"A fine-tune of it: {arguments.steps} steps on orders and their fields in JSON")
    records = order_records(_BATCH * arguments.steps, seed=0)
    print(f"{records[0].prompt}{records[0].answer}", flush=True)
    try:
        train(base, [tokens_of(record, tokenizer) for record in records], finetuned, arguments.training)
    except ValueError as error:
        print(f"demo_llm.py: error: {error}", file=sys.stderr)
        return 1

    if not delta.exists():
        step("Compress", ["compress", str(base), str(finetuned), str(delta), "--ratio", arguments.ratio])
    step("Inspect", ["inspect", str(delta), "--plot", str(picture)])
    step("Verify", ["verify", str(delta), "--quiet"])

    heading(f"Load it like any other model, and ask about {arguments.questions} orders with other names and goods")
    heldout = order_records(arguments.questions, seed=1, held_out=True)
    compare({"base": base, "fine-tune": finetuned, "delta repository": delta}, heldout)
    print(f"\nThe repository is {delta}, its chart is {picture}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
