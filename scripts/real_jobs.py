"""What the study of real pairs does, and in which order."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from impart_hf.methods import method_class

FIRST = (32.0, 128.0)  # the ratios that are run first, and the only ones of distilled runs
SERVED = "impart-rd"  # the method whose delta vLLM starts with


@dataclass(frozen=True)
class Pair:
    """A base and a fine-tune in local folders."""

    name: str
    base: Path
    finetuned: Path

    def digest(self, *texts: Path) -> str:
        """Return a hash of all weights and of texts, which identifies the pair."""
        digest = hashlib.sha256()
        files = [path for folder in (self.base, self.finetuned) for path in sorted(folder.glob("*.safetensors"))]
        for path in (*files, *texts):
            with path.open("rb") as file:
                while part := file.read(1 << 24):
                    digest.update(part)
        return digest.hexdigest()


@dataclass(frozen=True)
class Run:
    """A compression and its measurement. `method` is METHOD, METHOD+calibration or METHOD+distill."""

    pair: Pair
    method: str
    ratio: float
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        return {"pair": self.pair.name, "method": self.method, "asked": self.ratio, "seed": self.seed}

    @property
    def made_by(self) -> str:
        return self.method


@dataclass(frozen=True)
class Generation:
    """Answers that a model generates: "base", "finetuned", or a delta as METHOD@RATIO."""

    pair: Pair
    model: str
    count: int

    @property
    def key(self) -> dict[str, Any]:
        return {"pair": self.pair.name, "generated": self.model, "count": self.count}

    @property
    def run(self) -> Run | None:
        """The delta to be made first."""
        method, found, ratio = self.model.partition("@")
        return Run(self.pair, method, float(ratio), 0) if found else None

    @property
    def made_by(self) -> str:
        return self.run.method if self.run else ""


@dataclass(frozen=True)
class Benchmark:
    """One of the other benchmarks, on this pair: "load" or "serving"."""

    pair: Pair
    name: str

    @property
    def key(self) -> dict[str, Any]:
        return {"pair": self.pair.name, "benchmark": self.name}

    @property
    def made_by(self) -> str:
        return SERVED


Job = Run | Generation | Benchmark


def jobs(pairs: Sequence[Pair], arguments: argparse.Namespace) -> list[Job]:
    """Return everything that is to be done, the most wanted first."""
    found: list[tuple[tuple[Any, ...], Job]] = []
    for seed, method, ratio, pair in _runs(pairs, arguments):
        _, *steps = method.split("+")
        effort = 2 if "distill" in steps else len(steps)
        if effort == 2 and ratio not in FIRST:
            continue
        places = [pairs.index(pair), arguments.ratios.index(ratio), arguments.methods.index(method)]
        rank = (arguments.seeds.index(seed), effort, places[0] > 0, ratio not in FIRST, *places)
        found.append((rank, Run(pair, method, ratio, seed)))
    after_the_first = (0, 0, False, True, len(pairs))
    found += [(after_the_first, Benchmark(pairs[0], name)) for name in arguments.benchmarks]
    ordered = [job for _, job in sorted(found, key=lambda pair: pair[0])]
    if arguments.generate:
        models = ("base", "finetuned", *arguments.generated)
        ordered += [Generation(pair, model, arguments.generate) for pair in pairs for model in models]
    return ordered


def _runs(pairs: Sequence[Pair], arguments: argparse.Namespace) -> Iterator[tuple[int, str, float, Pair]]:
    """Yield seed, method, ratio and pair; distilled runs take too long for more than one seed."""
    for method in arguments.methods:
        name, *steps = method.split("+")
        several = method_class(name).drops_entries and "distill" not in steps
        for seed in arguments.seeds if several else arguments.seeds[:1]:
            yield from ((seed, method, ratio, pair) for ratio in arguments.ratios for pair in pairs)
