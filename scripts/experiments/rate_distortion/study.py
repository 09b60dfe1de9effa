"""Run the study of impart-rd: KL against bytes, for every method and for impart-rd with each of its parts replaced.

    python scripts/experiments/rate_distortion/study.py --pair NAME=BASE,FINETUNED,TRAIN_TEXT,HELDOUT_TEXT[,OTHER_TEXT]

The study measures the given pairs (--pair, once for each) and two that it trains itself, `light` and `wide` (pairs.py).
Every finished run is written to WORK/results.jsonl, and the same command resumes after the last one. --only,
--variants, --ratios and --seeds select runs. At the end, a document with tables and a chart are written to the folder
--docs (report.py); with --report this is done at once, from the results file alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the other scripts

import measure
import pair_training
import torch
from measure import comma_separated
from pairs import TRAINED, Pair, trained
from report import write_report
from results_log import Log, read_lines
from transformers import AutoTokenizer
from transformers.utils import logging
from variants import DEFAULT, SEEDS, Effort, Variant

from impart_hf.evaluation.metrics import evaluate, load

_BATCH = 8  # sequences evaluated at a time


@dataclasses.dataclass(frozen=True)
class Run:
    pair: Pair
    variant: Variant
    ratio: float
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        return {"pair": self.pair.name, "method": self.variant.name, "asked": self.ratio, "seed": self.seed}


def runs(
    pairs: Sequence[Pair],
    variants: Sequence[Variant],
    ratios: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[Run]:
    """Yield all runs; those of the first seed come before any of the others.

    Args:
        ratios, seeds: None for those that each variant has in a whole study. A variant without random choices is run
            with the first seed only.
    """
    for seed, variant in itertools.product(SEEDS if seeds is None else seeds, variants):
        if seed in (variant.seeds if seeds is None else seeds if variant.random else seeds[:1]):
            own = variant.ratios if ratios is None else ratios
            yield from (Run(pair, variant, ratio, seed) for ratio, pair in itertools.product(own, pairs))


class Judge:
    """Compares models with a pair's fine-tune, on text of the task and of the base's kind."""

    def __init__(self, pair: Pair, tokens: int, length: int, device: str):
        self._device = device
        self.reference = load(str(pair.finetuned), torch.float32, device)
        tokenizer = AutoTokenizer.from_pretrained(pair.finetuned)
        texts = {"": pair.heldout, "other_": pair.other}
        self._blocks = {
            kind: measure.text_sequences(text, tokenizer, tokens, length) for kind, text in texts.items() if text
        }

    def measured(self, source: Path) -> dict[str, float]:
        model = load(str(source), torch.float32, self._device)
        numbers = {}
        for kind, blocks in self._blocks.items():
            perplexity, divergence = evaluate(model, self.reference, blocks, _BATCH)
            numbers |= {f"{kind}perplexity": perplexity, f"{kind}kl": divergence}
        return numbers


class Study:
    """Runs the study one run at a time; the fine-tunes that results are compared with stay loaded."""

    def __init__(self, results: Log, effort: Effort, tokens: int, device: str):
        self._results, self._effort, self._device = results, effort, device
        self.judge = lru_cache(maxsize=None)(lambda pair: Judge(pair, tokens, effort.length, device))

    def introduce(self, pair: Pair) -> None:
        """Record a pair's description, or check that the pair is the recorded one.

        Raises:
            ValueError: if another pair of this name is recorded.
        """
        digest, known = pair.digest(), self._results.about(pair.name)
        if known is not None:
            if known["digest"] != digest:
                raise ValueError(f"the results are of another pair '{pair.name}': choose another name for this one")
            return
        judge = self.judge(pair)
        base = load(str(pair.base), torch.float32, self._device)
        weights = [dict(model.named_parameters()) for model in (base, judge.reference)]
        about = {
            "digest": digest,
            "parameters": judge.reference.num_parameters(),
            "hidden": judge.reference.config.hidden_size,
            "layers": judge.reference.config.num_hidden_layers,
            "relative_delta": pair_training.delta_size(*weights),
            "base": judge.measured(pair.base),
            "finetuned": judge.measured(pair.finetuned),
        }
        self._results.append({"pair": pair.name, "about": about})

    def do(self, run: Run) -> str:
        """Compress, measure and record the result; return a message about it."""
        line = {**run.key, "machine": measure.machine(self._device)}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "delta")
            try:
                report = run.variant.compress(run.pair, folder, run.ratio, run.seed, self._effort, self._device)
            except ValueError as error:  # the method cannot reach this ratio
                self._results.append({**line, "failed": str(error)})
                return str(error)
            line |= {"bytes": report.repository_bytes, "ratio": report.ratio, "shortfall": report.shortfall}
            line |= {"checkpoint_bytes": report.checkpoint_bytes, "seconds": report.seconds}
            line |= self.judge(run.pair).measured(folder)
        self._results.append(line)
        return f"KL {line['kl']:.5f}, {line['seconds']:.0f} s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="study.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pair", action="append", default=[], dest="pairs", metavar="NAME=PATHS",
        help="BASE,FINETUNED,TRAIN_TEXT,HELDOUT_TEXT[,OTHER_TEXT]; may be repeated",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("rate-distortion"), help="folder for pairs and results")
    parser.add_argument("--docs", type=Path, help="folder for the document and the chart (default: --work)")
    parser.add_argument(
        "--only", type=comma_separated(str), metavar="PAIRS", help="run only the pairs with these names"
    )
    parser.add_argument("--variants", type=comma_separated(str), default=list(DEFAULT), help="see variants.py")
    parser.add_argument("--ratios", type=comma_separated(float), help="default: those of a whole study")
    parser.add_argument("--seeds", type=comma_separated(int), help="default: those of a whole study")
    parser.add_argument("--steps", type=int, default=60, help="distillation steps (default: 60)")
    parser.add_argument("--tokens", type=int, default=8192, help="largest number of tokens of each text to measure on")
    parser.add_argument("--samples", type=int, default=256, help="sequences for calibration and distillation")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence (default: 128)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--report", action="store_true", help="run nothing, only write the report")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    logging.disable_progress_bar()
    path = arguments.work / "results.jsonl"
    try:
        if not arguments.report:
            _run(arguments, path)
        docs = arguments.docs or arguments.work
        write_report(read_lines(path), docs)
    except (ValueError, OSError) as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        return 1
    print(f"Results: {path}; report and chart: {docs}", file=sys.stderr)
    return 0


def _run(arguments: argparse.Namespace, path: Path) -> None:
    work, variants = arguments.work, [Variant.named(name) for name in arguments.variants]
    given = {pair.name: pair for pair in map(Pair.given, arguments.pairs)}
    names = [*given, *TRAINED]
    if strange := sorted({*(arguments.only or names)} - {*names}):
        raise ValueError(
            f"there is no pair '{strange[0]}': give it with --pair {strange[0]}=…, or choose one of {names}"
        )
    work.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(arguments, name) for name in ("steps", "tokens", "samples", "length")}
    results = Log(path, settings, "--work")
    selected = [name for name in names if name in (arguments.only or names)]
    # These are trained first, because a given pair may use their text
    own = {name: trained(name, work) for name in TRAINED if name in selected}
    pairs = [given.get(name) or own[name] for name in selected]
    effort = Effort(arguments.steps, arguments.samples, arguments.length)
    study = Study(results, effort, arguments.tokens, arguments.device)
    for pair in pairs:
        study.introduce(pair)
    todo = [run for run in runs(pairs, variants, arguments.ratios, arguments.seeds) if not results.has(run.key)]
    for number, run in enumerate(todo, 1):
        print(f"{number} of {len(todo)}: {' '.join(map(str, run.key.values()))}: ", file=sys.stderr, end="", flush=True)
        print(study.do(run), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
