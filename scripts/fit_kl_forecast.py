"""Fit the forecast of KL(fine-tune || delta) that `compress` gives without a text, and say how far off it is.

    python scripts/fit_kl_forecast.py --work WORK --results FILE.jsonl --pair NAME=BASE,FINETUNED,TEXT ...
    python scripts/fit_kl_forecast.py --results FILE.jsonl

The first form compresses each pair by every method and ratio, measures the KL, and adds a line per run to FILE.jsonl:
what `compress` knows of the errors, and the KL. Runs that FILE.jsonl has are skipped. Both forms then fit the constants
of `impart_hf/compression/kl_forecast.py` to all lines, and print them with the errors of forecasts for each pair by
constants that were fitted to the other pairs.

TEXT is measured on sequences of `--length` tokens; of a .jsonl file with questions and answers, the answers are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by OpenMP when torch is loaded

import measure
import torch
from question_answers import read_records, tokens_of
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from impart_hf import compress
from impart_hf.common.token_losses import kl_divergence
from impart_hf.evaluation.metrics import evaluate, load
from impart_hf.methods import method_class
from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.modeling.delta_decode import decode_record
from impart_hf.modeling.delta_record import parse_stack
from impart_hf.modeling.delta_repository import RECORD_SUFFIX, DeltaFile
from impart_hf.modeling.model_files import HubOptions

_BATCH = 8


@dataclass(frozen=True)
class Pair:
    """A base, a fine-tune and a text, or answers, to measure on."""

    name: str
    base: str
    finetuned: str
    text: Path

    @classmethod
    def given(cls, text: str) -> Pair:
        """Parse NAME=BASE,FINETUNED,TEXT."""
        name, _, rest = text.partition("=")
        base, finetuned, source = rest.split(",")
        return cls(name, base, finetuned, Path(source))


class Judge:
    """Measures the KL of models from a pair's fine-tune."""

    def __init__(self, pair: Pair, records: int, tokens: int, length: int):
        tokenizer = AutoTokenizer.from_pretrained(pair.finetuned)
        self._reference = load(pair.finetuned, torch.float32, "cpu")
        self._answers = self._blocks = None
        if pair.text.suffix == ".jsonl":
            self._answers = [tokens_of(record, tokenizer) for record in read_records(pair.text)[:records]]
        else:
            self._blocks = measure.text_sequences(pair.text, tokenizer, tokens, length)

    @torch.inference_mode()
    def kl(self, source: str) -> float:
        """Return KL(fine-tune || the model in `source`), nats per token."""
        model = load(source, torch.float32, "cpu")
        if self._answers is None:
            return evaluate(model, self._reference, self._blocks, _BATCH)[1]
        total = count = 0.0
        for one in self._answers:
            answers = len(one.ids) - one.prompt
            wanted, found = (_logits(m, one.ids, answers) for m in (self._reference, model))
            total += kl_divergence(wanted, found).item()
            count += answers
        return total / count


def _logits(model: PreTrainedModel, ids: torch.Tensor, answers: int) -> torch.Tensor:
    """Return the logits by which the last `answers` tokens are predicted."""
    return model(input_ids=ids[None], logits_to_keep=answers + 1).logits[0, :-1].float()


def kind_of(name: str, vocabulary: bool) -> str:
    if vocabulary:
        return "vocabulary"
    return "attention" if "attn" in name or "attention" in name else "mlp"


def errors_of(pair: Pair, repository: Path) -> Iterator[dict[str, Any]]:
    """Yield what is known of the error of each matrix of a repository."""
    base, finetuned = (Checkpoint(source, HubOptions()) for source in (pair.base, pair.finetuned))
    file = DeltaFile(sorted(repository.glob("*.safetensors")))
    names = [entry.removesuffix(RECORD_SUFFIX) for entry in file.names() if entry.endswith(RECORD_SUFFIX)]
    for name in names:
        after = finetuned.tensor(name).float()
        delta = after - base.tensor(name).float()
        records = parse_stack(file.read_records(name), name)
        decoded = torch.stack([decode_record(record, name) for record in records]).reshape(delta.shape)
        energy, whole = (float(part.double().square().sum()) for part in (delta, after))
        error = float((decoded - delta).double().square().sum())
        inner = float((decoded.double() * delta.double()).sum())
        size = float(decoded.double().square().sum())
        yield {
            "name": name, "shape": list(delta.shape), "relative_delta": energy / whole, "error": error / energy,
            "inner": inner / energy, "size": size / energy,
        }  # fmt: skip


def measured(pair: Pair, judge: Judge, method: str, ratio: float, work: Path) -> dict[str, Any] | None:
    """Compress a pair, unless that was done, and measure it; None if the method cannot reach the ratio."""
    repository = work / f"{pair.name}-{method}-{ratio:g}"
    if not (repository / "config.json").exists():
        try:
            compress(pair.base, pair.finetuned, repository, method_class(method)(compression_ratio=ratio))
        except ValueError as error:
            print(f"{pair.name}, {method} at {ratio:g}: {error}", file=sys.stderr)
            return None
    errors = list(errors_of(pair, repository))
    (work / f"{repository.name}.errors.json").write_text(json.dumps(errors))
    return {"pair": pair.name, "method": method, "asked": ratio, "kl": judge.kl(str(repository))}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fit_kl_forecast.py", description=__doc__.splitlines()[0])
    parser.add_argument("--pair", type=Pair.given, action="append", default=[], metavar="NAME=BASE,FINETUNED,TEXT")
    parser.add_argument("--work", type=Path, help="folder for the repositories, which a stopped run goes on with")
    parser.add_argument("--results", type=Path, required=True, help="the lines of all runs")
    parser.add_argument("--methods", type=measure.comma_separated(str))
    parser.add_argument("--ratios", type=measure.comma_separated(float))
    parser.add_argument("--records", type=int, default=8, help="answers to measure on (default: 8)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a text to measure on (default: 8192)")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence of a text (default: 128)")
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    lines = [json.loads(line) for line in arguments.results.read_text().splitlines()] if arguments.results.exists() else []
    done = {(line["pair"], line["method"], line.get("asked")) for line in lines}
    for pair in arguments.pair:
        wanted = [(m, r) for r in arguments.ratios for m in arguments.methods if (pair.name, m, r) not in done]
        base = (pair.name, "base", None) not in done
        if not wanted and not base:
            continue
        judge = Judge(pair, arguments.records, arguments.tokens, arguments.length)
        if base:
            put(arguments.results, {"pair": pair.name, "method": "base", "asked": None, "kl": judge.kl(pair.base)})
        for method, ratio in wanted:
            if line := measured(pair, judge, method, ratio, arguments.work):
                put(arguments.results, line)
    return 0


def put(path: Path, line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
