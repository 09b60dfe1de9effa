"""Compare our repositories with the paper's algorithm, implemented naively in float32 on the same tensors.

The naive version (tests/support/naive_impart.py) counts only kept parameters, takes the fine-tune's norms for free and
stores nothing. It runs at 1.25 times the ratio, to allow for the headers and per-column numbers of a real file.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import measure
import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from impart_hf import ImPartConfig, compress
from impart_hf.evaluation.metrics import evaluate, load
from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.modeling.model_files import HubOptions

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support import naive_impart

ALLOWANCE = 1.25
BATCH_SIZE = 16


def naive_model(base: str, finetuned: str, ratio: float, seed: int, embeddings: bool) -> PreTrainedModel:
    """Return the fine-tune in float32, with its matrices as the naive algorithm reconstructs them."""
    model = load(finetuned, torch.float32, "cpu")
    before, after = Checkpoint(base, HubOptions()), Checkpoint(finetuned, HubOptions())
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in after.names():
            new = after.tensor(name).float()
            if new.dim() == 2 and (embeddings or new.shape[0] != model.config.vocab_size):
                old = before.tensor(name).float()
                parameters[name].copy_(old + naive_impart.impart(new - old, ratio, 0.6, 1.0, generator))
    return model


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("finetuned")
    parser.add_argument("--text", type=Path, required=True, help="text to measure on")
    parser.add_argument("--ratios", default="8,16,32", help="compression ratios, comma-separated")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, comma-separated")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--sequence-length", type=int, default=256)
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    base, finetuned = arguments.base, arguments.finetuned
    reference = load(finetuned, torch.float32, "cpu")
    tokenizer = AutoTokenizer.from_pretrained(finetuned)
    blocks = measure.text_sequences(arguments.text, tokenizer, arguments.tokens, arguments.sequence_length)

    def divergence(model: PreTrainedModel) -> float:
        return evaluate(model, reference, blocks, BATCH_SIZE)[1]

    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    rows = []
    for ratio in [float(ratio) for ratio in arguments.ratios.split(",")]:
        columns: dict[str, list[float]] = {"bytes": [], "allowed": [], "KL": [], "naive KL": [], "naive KL, linear": []}
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "delta")
                report = compress(base, finetuned, out, ImPartConfig(compression_ratio=ratio, seed=seed))
                columns["KL"].append(divergence(load(str(out), torch.float32, "cpu")))
            columns["bytes"].append(report.repository_bytes)
            columns["allowed"].append(report.checkpoint_bytes / ratio)
            for name, embeddings in (("naive KL", True), ("naive KL, linear", False)):
                columns[name].append(divergence(naive_model(base, finetuned, ratio * ALLOWANCE, seed, embeddings)))
        rows.append({"ratio": ratio, **{name: statistics.fmean(values) for name, values in columns.items()}})
    print(
        f"Means over {len(seeds)} seeds. 'naive KL, linear' leaves embeddings as the fine-tune has them, uncounted.\n"
    )
    print(measure.table(rows))
    print(measure.machine_line())
    return 0 if all(row["KL"] <= row["naive KL"] and row["bytes"] <= row["allowed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
