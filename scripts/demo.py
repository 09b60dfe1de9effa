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
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from impart_hf.calibration.text import calibration_tokens
from impart_hf.cli.main import main as impart_hf
from impart_hf.evaluation.metrics import evaluate

RATIO = "16"
PROMPT = "The statement"
SEQUENCES, LENGTH = 64, 128  # as in the tables of docs/results-toys.md


def step(title: str, command: list[str]) -> None:
    """Run one impart-hf command, and print it as a user would type it."""
    print(f"\n== {title}\n$ impart-hf {' '.join(command)}", flush=True)
    if impart_hf(command) != 0:
        sys.exit(1)


def compare(models: dict[str, PreTrainedModel], sequences: torch.Tensor) -> None:
    """Print every model's perplexity on held-out text and its divergence from the fine-tune."""
    print(f"{'model':<24}{'perplexity':>12}{'KL(fine-tune || model), nats/token':>38}")
    for name, model in models.items():
        perplexity, divergence = evaluate(model, models["fine-tune"], sequences, batch_size=8)
        print(f"{name:<24}{perplexity:>12.1f}{divergence:>38.4f}")


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    logging.disable_progress_bar()
    pair, delta, picture = folder / "pair", folder / "delta", folder / "delta.png"
    print("== A tiny base and a fine-tune of it, trained on text that comes with Python", flush=True)
    subprocess.run([sys.executable, Path(__file__).with_name("train_pair.py"), pair, "--preset", "demo"], check=True)
    base, finetuned = str(pair / "base"), str(pair / "finetuned")

    step("Compress", ["compress", base, finetuned, str(delta), "--ratio", RATIO, "--quiet"])
    step("Inspect", ["inspect", str(delta), "--plot", str(picture)])
    step("Verify", ["verify", str(delta), "--quiet"])

    print("\n== Load it like any other model, and compare it with the fine-tune on text that neither was trained on")
    tokenizer = AutoTokenizer.from_pretrained(delta)
    models = {
        "base": AutoModelForCausalLM.from_pretrained(base),
        "fine-tune": AutoModelForCausalLM.from_pretrained(finetuned),
        f"delta repository {RATIO}x": AutoModelForCausalLM.from_pretrained(delta),
    }
    heldout = str(pair / "finetune_heldout.txt")
    compare(models, calibration_tokens(heldout, tokenizer, samples=SEQUENCES, length=LENGTH))

    print(f"\n== Generate, greedily, from {json.dumps(PROMPT)}")
    prompt = tokenizer(PROMPT, return_tensors="pt")
    for name, model in models.items():
        tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        print(f"{name:<24}{json.dumps(tokenizer.decode(tokens[0], skip_special_tokens=True))}")
    print(f"\nThe repository is {delta}, its chart is {picture}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
