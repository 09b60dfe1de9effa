"""Fit the forecast of KL(fine-tune || delta) that `compress` gives without a text, and say how far off it is.

    python scripts/fit_kl_forecast.py --work WORK --results FILE.jsonl --pair NAME=BASE,FINETUNED,TEXT ...
    python scripts/fit_kl_forecast.py --results FILE.jsonl

The first form compresses each pair by every method and ratio, measures the KL, and adds a line per run to FILE.jsonl:
what `compress` knows of the errors, and the KL. Runs that FILE.jsonl has are skipped. Both forms then fit the constants
of `impart_hf/repository/kl_forecast.py` to all lines, each pair weighted alike. They print the constants, and how far
off forecasts are for the pairs of each base, by constants that were fitted to the pairs of the others. Pairs whose
names are alike before the first "-" have one base.

TEXT is measured on in sequences of `--length` tokens; of a .jsonl file with questions and answers, the answers are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
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
from impart_hf.compression.compatibility import vocabulary_size
from impart_hf.evaluation.metrics import evaluate, load
from impart_hf.methods import method_class
from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.modeling.delta_decode import decode_record
from impart_hf.modeling.delta_file import RECORD_SUFFIX, DeltaFile
from impart_hf.modeling.delta_record import DIRECT, parse_stack
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.kl_forecast import CONSTANTS, Constants, Losses, TensorErrors

_BATCH = 8
_BASE = "base"  # stands for a method where the base itself was measured


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


def errors_of(pair: Pair, repository: Path) -> Iterator[TensorErrors]:
    """Yield the errors of every encoded tensor of a repository, as `compress` measures them."""
    base, finetuned = (Checkpoint(source, HubOptions()) for source in (pair.base, pair.finetuned))
    tokens = vocabulary_size(finetuned)
    file = DeltaFile(sorted(repository.glob("*.safetensors")))
    for name in (entry.removesuffix(RECORD_SUFFIX) for entry in file.names() if entry.endswith(RECORD_SUFFIX)):
        after = finetuned.tensor(name).float()
        delta = after - base.tensor(name).float()
        records = parse_stack(file.read_records(name), name)
        decoded = torch.stack([decode_record(record, name) for record in records]).reshape(delta.shape)
        norm, error = delta.norm(), decoded - delta
        yield TensorErrors(
            relative_norm=float(norm / after.norm()),
            dropped=float(-(error * delta).sum() / norm**2),
            relative_error=float(error.norm() / norm),
            direct=records[0].layout == DIRECT,
            vocabulary=len(after) == tokens,
            matrices=len(records),
        )


def measured(pair: Pair, judge: Judge, method: str, ratio: float, work: Path) -> dict[str, Any] | None:
    """Compress a pair, unless that was done, and measure it; None if the method cannot reach the ratio."""
    repository = work / f"{pair.name}-{method}-{ratio:g}"
    if not (repository / "config.json").exists():
        try:
            compress(
                pair.base, pair.finetuned, repository, method_class(method)(compression_ratio=ratio), calibration=None
            )
        except ValueError as error:
            print(f"{pair.name}, {method} at {ratio:g}: {error}", file=sys.stderr)
            return None
    run = {"pair": pair.name, "method": method, "asked": ratio, "kl": judge.kl(str(repository))}
    return run | asdict(Losses.of(errors_of(pair, repository)))


@dataclass(frozen=True)
class Run:
    """A line of the results: a pair's errors, and the measured share of the base's KL."""

    pair: str
    name: str
    losses: Losses
    share: float

    def off(self, constants: Constants) -> float:
        """Return the logarithm of the forecast share over the measured one."""
        return math.log(self.losses.share(constants) / self.share)


def runs_of(lines: Sequence[dict[str, Any]]) -> list[Run]:
    base = {line["pair"]: line["kl"] for line in lines if line["method"] == _BASE}
    fields = [field.name for field in dataclasses.fields(Losses)]
    return [
        Run(
            line["pair"],
            f"{line['method']} at {line['asked']:g}",
            Losses(*(line[field] for field in fields)),
            line["kl"] / base[line["pair"]],
        )
        for line in lines
        if line["method"] != _BASE
    ]


def fitted(runs: Sequence[Run]) -> Constants:
    """Return the constants with the least mean square of logarithms, by a search along the axes."""
    counts = Counter(run.pair for run in runs)

    def loss(logs: list[float]) -> float:
        constants = Constants(*map(math.exp, logs))
        return sum(run.off(constants) ** 2 / counts[run.pair] for run in runs) / len(counts)

    logs, step = [math.log(value) for value in astuple(CONSTANTS)], 0.5
    least = loss(logs)
    while step > 1e-3:
        tried = [[*logs[:i], logs[i] + sign * step, *logs[i + 1 :]] for i in range(len(logs)) for sign in (1, -1)]
        best = min(tried, key=loss)
        if (found := loss(best)) < least:
            logs, least = best, found
        else:
            step /= 2
    return Constants(*(float(f"{math.exp(value):.2g}") for value in logs))


def report(lines: Sequence[dict[str, Any]]) -> None:
    """Print the constants, and how far off forecasts of pairs are that the constants were not fitted to."""
    runs = runs_of(lines)
    print(f"{len(runs)} runs; fitted to all: {fitted(runs)}\n")
    rows, everything = [], []
    for base in dict.fromkeys(_base(run.pair) for run in runs):
        constants = fitted([run for run in runs if _base(run.pair) != base])
        own = [run for run in runs if _base(run.pair) == base]
        factors = sorted(math.exp(abs(run.off(constants))) for run in own)
        worst = max(own, key=lambda run: abs(run.off(constants)))
        mean = math.exp(statistics.fmean(run.off(constants) for run in own))
        rows.append(
            {
                "left out": base, "runs": len(own), "forecast / measured, mean": mean,
                "off by, median": statistics.median(factors), "off by, most": factors[-1],
                "where": f"{worst.pair} {worst.name}",
            }
        )  # fmt: skip
        everything += factors
    print(measure.table(rows))
    everything.sort()
    parts = ", ".join(
        f"{share:.0%} {everything[math.ceil(share * len(everything)) - 1]:.2f}" for share in (0.5, 0.8, 0.9, 1.0)
    )
    print(f"\nOff by at most this factor, of all runs: {parts}")


def _base(pair: str) -> str:
    return pair.partition("-")[0]


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
    lines = (
        [json.loads(line) for line in arguments.results.read_text().splitlines()] if arguments.results.exists() else []
    )
    done = {(line["pair"], line["method"], line.get("asked")) for line in lines}
    for pair in arguments.pair:
        wanted = [(m, r) for r in arguments.ratios for m in arguments.methods if (pair.name, m, r) not in done]
        base = (pair.name, _BASE, None) not in done
        if not wanted and not base:
            continue
        judge = Judge(pair, arguments.records, arguments.tokens, arguments.length)
        if base:
            put(arguments.results, {"pair": pair.name, "method": _BASE, "asked": None, "kl": judge.kl(pair.base)})
        for method, ratio in wanted:
            if line := measured(pair, judge, method, ratio, arguments.work):
                put(arguments.results, line)
    report([json.loads(line) for line in arguments.results.read_text("utf-8").splitlines()])
    return 0


def put(path: Path, line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
