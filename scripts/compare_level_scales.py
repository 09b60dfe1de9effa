"""How the scale of quantised values is chosen, and what each choice costs: KL of the methods that quantise, rounded.

largest: the outermost level is the largest value, as the published code does. least error: the scale with the least
squared error. unbiased: that, and then scaled so that nothing shrinks on average; what impart-hf does.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import measure
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from impart_hf import compress
from impart_hf.coding import factor_quantisation, gptq
from impart_hf.evaluation.metrics import evaluate, load
from impart_hf.methods import method_class

METHODS = ("impart-qt", "delta-come", "dare-qt")


def largest(values: torch.Tensor, mask: torch.Tensor, width: int) -> torch.Tensor:
    return (values * mask).abs().amax(1).clamp_min(torch.finfo(values.dtype).tiny)


def as_it_is(plane: torch.Tensor, quantised: torch.Tensor, mask: torch.Tensor, hessian: object = None) -> torch.Tensor:
    return torch.ones_like(plane[:, 0])


RULES = {
    "largest": {"best_scale": largest, "unbiased": as_it_is},
    "least error": {"unbiased": as_it_is},
    "unbiased": {},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("finetuned")
    parser.add_argument("--text", type=Path, required=True, help="what to measure on")
    parser.add_argument("--ratios", default="16,32,64", help="comma-separated")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sequence-length", type=int, default=256)
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    reference = load(arguments.finetuned, torch.float32, "cpu")
    tokenizer = AutoTokenizer.from_pretrained(arguments.finetuned)
    blocks = measure.text_sequences(arguments.text, tokenizer, arguments.tokens, arguments.sequence_length)
    rows = []
    for ratio in [float(ratio) for ratio in arguments.ratios.split(",")]:
        for name in METHODS:
            row: dict[str, object] = {"ratio": ratio, "method": name}
            for rule, replaced in RULES.items():
                with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
                    for module in (factor_quantisation, gptq):
                        for function in replaced.keys() & vars(module).keys():
                            patches.enter_context(patch.object(module, function, replaced[function]))
                    out = Path(folder, "delta")
                    compress(arguments.base, arguments.finetuned, out, method_class(name)(compression_ratio=ratio))
                    row[rule] = evaluate(load(str(out), torch.float32, "cpu"), reference, blocks, 8)[1]
            rows.append(row)
    print("KL, nats/token; without calibration, seed 0\n")
    print(measure.table(rows))
    print(measure.machine_line())
    return 0


if __name__ == "__main__":
    sys.exit(main())
