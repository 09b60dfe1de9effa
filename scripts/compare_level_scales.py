"""Compare rules for the scale of quantised values, by KL of the quantising methods without calibration.

largest: the outermost level is the largest value, as in the published code. least error: the scale with the least
squared error. unbiased: the same, then rescaled so that values do not shrink on average; impart-hf's rule.
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
from impart_hf.coding import factor_quantisation, level_scales
from impart_hf.coding.level_scales import LevelFit
from impart_hf.evaluation.metrics import evaluate, load
from impart_hf.methods import method_class

METHODS = ("impart-qt", "delta-come", "dare-qt")


def largest(values: torch.Tensor, mask: torch.Tensor | None, widths: object, start: object = None) -> LevelFit:
    sizes = (values if mask is None else values * mask).abs()
    return LevelFit(sizes.amax(1).clamp_min(torch.finfo(values.dtype).tiny), torch.ones_like(values[:, 0]))


def unchanged(plane: torch.Tensor, quantised: torch.Tensor, mask: object, hessian: object = None) -> torch.Tensor:
    return torch.ones_like(plane[:, 0])


# The functions that each rule replaces, by module and name; methods import them from there when they encode
_UNCHANGED = [(factor_quantisation, "bias_correction", unchanged)]
RULES = {
    "largest": [(level_scales, "fit_levels", largest), (factor_quantisation, "fit_levels", largest), *_UNCHANGED],
    "least error": _UNCHANGED,
    "unbiased": [],
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("finetuned")
    parser.add_argument("--text", type=Path, required=True, help="text to measure on")
    parser.add_argument("--ratios", default="16,32,64", help="compression ratios, comma-separated")
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
                    for module, function, other in replaced:
                        patches.enter_context(patch.object(module, function, other))
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
