"""Demonstrate the main workflow: train a tiny base and fine-tune, then compress, inspect, verify, load and compare.

    python scripts/demo.py FOLDER

FOLDER receives the pair (trained on first use, about two minutes on two cores), delta repositories, and a chart of the
first.
"""

import subprocess
import sys
from pathlib import Path

import torch
from demo_steps import heading, print_table, step
from exact_answers import TASKS, ExactRecord, answers_of, read_tasks, score_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from impart_hf.calibration.text import calibration_tokens
from impart_hf.evaluation.metrics import evaluate

RATIO, HIGHER = "16", "64"
SEQUENCES, LENGTH = 64, 128  # as in the tables of docs/results-toys.md


def compare(models: dict[str, Path], text: Path, records: list[ExactRecord]) -> None:
    """Print how far each model is from the fine-tune, how many records it answers rightly, and one answer of each kind.

    Args:
        models: folders; the fine-tune's is named "fine-tune".
        text: held-out text, for perplexity and divergence.
        records: held-out records.
    """
    tokenizer = AutoTokenizer.from_pretrained(models["fine-tune"])
    sequences = calibration_tokens(text, tokenizer, samples=SEQUENCES, length=LENGTH)
    finetuned = AutoModelForCausalLM.from_pretrained(models["fine-tune"], dtype=torch.float32)
    rows = [("model", "perplexity", "KL(fine-tune || model), nats/token", "right answers", "share ± error")]
    answers = {}
    for name, folder in models.items():
        model = finetuned
        if name != "fine-tune":
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        perplexity, divergence = evaluate(model, finetuned, sequences, batch_size=8)
        answers[name] = answers_of(model, tokenizer, records)
        score = score_of(answers[name], records)
        share = f"{score.share:.1%} ± {score.error:.1%}"
        rows.append((name, f"{perplexity:.1f}", f"{divergence:.4f}", str(score), share))
    print_table(rows)
    heading("Answers to a question of each kind, generated greedily")
    first = {record.kind: number for number, record in reversed(list(enumerate(records)))}
    questions = [records[number].prompt for number in first.values()]
    shown = [("question", *answers)]
    shown += [(q, *(found[n] for found in answers.values())) for q, n in zip(questions, first.values(), strict=True)]
    print_table(shown)


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    logging.disable_progress_bar()
    pair, delta, higher, picture = (folder / name for name in ("pair", "delta", f"delta{HIGHER}", "delta.png"))
    heading("A tiny base and a fine-tune of it, trained on text that comes with Python and on questions and answers")
    subprocess.run([sys.executable, Path(__file__).with_name("train_pair.py"), pair, "--preset", "demo"], check=True)
    base, finetuned, tasks = pair / "base", pair / "finetuned", pair / TASKS
    if not tasks.is_dir():
        print(f"demo.py: error: {pair} has no {TASKS}, so an older version made it: remove it", file=sys.stderr)
        return 1

    step("Compress", ["compress", str(base), str(finetuned), str(delta), "--ratio", RATIO, "--quiet"])
    step("Inspect", ["inspect", str(delta), "--plot", str(picture)])
    step("Verify", ["verify", str(delta), "--quiet"])
    step("Compress more", ["compress", str(base), str(finetuned), str(higher), "--ratio", HIGHER, "--quiet"])

    heading("Load them like any other model, and compare them with the fine-tune on what neither was trained on")
    models = {"base": base, "fine-tune": finetuned, f"delta {RATIO}x": delta, f"delta {HIGHER}x": higher}
    compare(models, pair / "finetune_heldout.txt", read_tasks(tasks))
    print(f"\nThe repositories are {delta} and {higher}; the chart of the first is {picture}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
