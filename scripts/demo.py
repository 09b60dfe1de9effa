"""Demonstrate the main workflow: train a tiny base and fine-tune, then compress, inspect, verify, load and compare.

    python scripts/demo.py FOLDER

FOLDER receives the pair (trained on first use, under two minutes on two cores), the delta repository, and a chart of
it.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from demo_steps import heading, print_table, step
from question_answers import generated
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from impart_hf.calibration.text import calibration_tokens
from impart_hf.evaluation.metrics import evaluate

RATIO = "16"
PROMPT = "The statement"
SEQUENCES, LENGTH = 64, 128  # as in the tables of docs/results-toys.md


def compare(models: dict[str, PreTrainedModel], sequences: torch.Tensor) -> None:
    """Print every model's perplexity on held-out text and its divergence from the fine-tune."""
    rows = [("model", "perplexity", "KL(fine-tune || model), nats/token")]
    for name, model in models.items():
        perplexity, divergence = evaluate(model, models["fine-tune"], sequences, batch_size=8)
        rows.append((name, f"{perplexity:.1f}", f"{divergence:.4f}"))
    print_table(rows)


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    logging.disable_progress_bar()
    pair, delta, picture = folder / "pair", folder / "delta", folder / "delta.png"
    heading("A tiny base and a fine-tune of it, trained on text that comes with Python")
    subprocess.run([sys.executable, Path(__file__).with_name("train_pair.py"), pair, "--preset", "demo"], check=True)
    base, finetuned = str(pair / "base"), str(pair / "finetuned")

    step("Compress", ["compress", base, finetuned, str(delta), "--ratio", RATIO, "--quiet"])
    step("Inspect", ["inspect", str(delta), "--plot", str(picture)])
    step("Verify", ["verify", str(delta), "--quiet"])

    heading("Load it like any other model, and compare it with the fine-tune on text that neither was trained on")
    tokenizer = AutoTokenizer.from_pretrained(delta)
    models = {
        "base": AutoModelForCausalLM.from_pretrained(base),
        "fine-tune": AutoModelForCausalLM.from_pretrained(finetuned),
        f"delta repository {RATIO}x": AutoModelForCausalLM.from_pretrained(delta),
    }
    heldout = str(pair / "finetune_heldout.txt")
    compare(models, calibration_tokens(heldout, tokenizer, samples=SEQUENCES, length=LENGTH))

    heading(f"Generate, greedily, from {json.dumps(PROMPT)}")
    for name, model in models.items():
        (text,) = generated(model, tokenizer, [PROMPT], new_tokens=24)
        print(f"{name:<24}{json.dumps(PROMPT + text)}")
    print(f"\nThe repository is {delta}, its chart is {picture}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
