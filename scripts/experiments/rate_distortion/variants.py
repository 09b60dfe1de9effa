"""The variants that the study compares, named METHOD[/PART][+STEP…].

METHOD may be impart-rd with a PART replaced. Steps are `calibration` (GPTQ), and one of `scales` (distils the column
scales of a direct record or the singular values of a factored one), `codes` (distils the stored values as well) and
`long` (as `codes`, with `LONGER` times as many steps).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from pairs import Pair

from impart_hf import compress
from impart_hf.coding import factor_quantisation
from impart_hf.coding.rate_distortion import NOISE, ErrorWeights
from impart_hf.distillation import DistillSettings
from impart_hf.methods import Encoded, ImPartRdConfig, MethodConfig, Spectrum, impart_rd, method_class, method_names
from impart_hf.methods.base import EncodingTask
from impart_hf.repository.report import CompressionReport

OURS = "impart-rd"
PEERS = ("impart-qt", "delta-come", "dare-qt", "bitdelta", "impart", "lowrank")
CALIBRATION, SCALES, CODES, LONG = STEPS = ("calibration", "scales", "codes", "long")
LONGER = 5
RATIOS, SEEDS = (16.0, 32.0, 64.0, 128.0, 200.0), (0, 1, 2)
_LONG_RATIOS = RATIOS[2:]  # where most improvement is possible


class _Changed(ImPartRdConfig):
    """impart-rd with a piece of its module replaced. The name stays, so that headers and cards keep their length."""

    def change(self) -> AbstractContextManager:
        raise NotImplementedError

    def allocate(self, spectra: list[Spectrum], max_bytes: int) -> list[int]:
        with self.change():
            return super().allocate(spectra, max_bytes)

    def _encode(self, task: EncodingTask) -> Encoded:
        with self.change():
            return super()._encode(task)


class _EvenLevels(_Changed):
    """Evenly spaced levels only, no levels for normally distributed numbers."""

    def change(self) -> AbstractContextManager:
        return patch.object(impart_rd, "level_widths", lambda bits: [bits])


class _ExactU(_Changed):
    """U is quantised from its exact values, without compensating for the error of the quantised V."""

    def change(self) -> AbstractContextManager:
        return patch.object(factor_quantisation, "quantised", partial(_from_exact_u, factor_quantisation.quantised))


def _from_exact_u(quantised: Callable, *rest: Any, delta: torch.Tensor, **named: Any) -> Any:
    return quantised(*rest, **named)


class _OneHarm(_Changed):
    """Noise has the same weight in U, in V and in both."""

    def change(self) -> AbstractContextManager:
        return patch.multiple(impart_rd, _V_NOISE=1.0, _BOTH_NOISE=1.0, _TOKEN_V_NOISE=1.0, _TOKEN_BOTH_NOISE=1.0)


class _SameInputs(_Changed):
    """The inputs are assumed to be equally strong along all singular vectors."""

    def change(self) -> AbstractContextManager:
        return patch.object(impart_rd, "_error_weights", partial(_flat, impart_rd._error_weights))


def _flat(error_weights: Callable, spectrum: Spectrum, drop_weight: float) -> ErrorWeights:
    weights = error_weights(spectrum, drop_weight)
    if spectrum.vocabulary:
        return weights
    return ErrorWeights(drop_weight, 1.0, weights.v, impart_rd._BOTH_NOISE)


class _NoGuess(_Changed):
    """Values are rounded to the nearest level, without the inputs estimated from the delta."""

    def change(self) -> AbstractContextManager:
        return patch.object(impart_rd, "input_moments", lambda task: task.hessian)


class _TokensAlike(_Changed):
    """Errors of embeddings have the same weight as those of other matrices."""

    def change(self) -> AbstractContextManager:
        return patch.object(impart_rd, "_error_weights", partial(_as_layer, impart_rd._error_weights))


def _as_layer(error_weights: Callable, spectrum: Spectrum, drop_weight: float) -> ErrorWeights:
    return error_weights(replace(spectrum, vocabulary=False), drop_weight)


class _LeastError(_Changed):
    """Sigma is fitted by least squares, which shrinks the delta, instead of being unbiased."""

    def change(self) -> AbstractContextManager:
        return patch.object(factor_quantisation, "quantised", partial(_shrunk, factor_quantisation.quantised))


def _shrunk(
    quantised: Callable, u: torch.Tensor, sigma: torch.Tensor, v: torch.Tensor, *rest: Any, **named: Any
) -> Any:
    levels_u, weights, levels_v, notes = quantised(u, sigma, v, *rest, **named)
    for exact, levels in ((u, levels_u), (v, levels_v)):
        cosines = torch.nn.functional.cosine_similarity(exact, levels, dim=0)
        weights = weights * cosines.square().double().cpu().numpy()
    return levels_u, weights, levels_v, notes


class _TwoBits(_Changed):
    """At least two bits per value, so no signs."""

    def change(self) -> AbstractContextManager:
        return patch.dict(NOISE, {bits: noise for bits, noise in NOISE.items() if bits > 1}, clear=True)


class _OwnBudgets(ImPartRdConfig):
    """Every matrix has bytes in proportion to its size, as with the other methods."""

    shares_budget = False


# The replacements for parts of impart-rd
PARTS: Mapping[str, Callable[..., MethodConfig]] = {
    "one-harm": _OneHarm,
    "same-inputs": _SameInputs,
    "no-guess": _NoGuess,
    "tokens-alike": _TokensAlike,
    "even-levels": _EvenLevels,
    "two-bits": _TwoBits,
    "exact-u": _ExactU,
    "least-error": _LeastError,
    "own-budgets": _OwnBudgets,
    "lowrank-embeddings": partial(ImPartRdConfig, embeddings="lowrank"),
    "drop-weight-1": partial(ImPartRdConfig, drop_weight=1.0),
}


@dataclass(frozen=True)
class Effort:
    """The effort that every run of a study spends.

    Attributes:
        steps: distillation steps.
        samples, length: sequences of text for calibration and distillation, and tokens per sequence.
    """

    steps: int
    samples: int
    length: int


@dataclass(frozen=True)
class Variant:
    """A row of the tables.

    Attributes:
        part: the part of impart-rd that is replaced, or "".
        steps: the steps applied to it, in the order of `STEPS`.
    """

    method: str
    part: str = ""
    steps: tuple[str, ...] = ()

    @classmethod
    def named(cls, name: str) -> Variant:
        """Parse a variant's name; raises ValueError if it is not valid."""
        head, *steps = name.split("+")
        method, slash, part = head.partition("/")
        if method not in method_names():
            raise ValueError(f"{name}: there is no method {method}; choose one of {', '.join(method_names())}")
        if slash and (method != OURS or part not in PARTS):
            raise ValueError(f"{name}: only a part of {OURS} may follow /: {', '.join(PARTS)}")
        if steps not in [[], *([step] for step in STEPS), *([CALIBRATION, step] for step in STEPS[1:])]:
            raise ValueError(f"{name}: {CALIBRATION} may follow +, and then {SCALES}, {CODES} or {LONG}")
        if CALIBRATION in steps and not method_class(method).quantises:
            raise ValueError(f"{name}: {method} does not quantise, so it has no use for calibration text")
        return cls(method, part, tuple(steps))

    @property
    def name(self) -> str:
        return "+".join([f"{self.method}/{self.part}" if self.part else self.method, *self.steps])

    @property
    def effort(self) -> str:
        """The last step, or ""."""
        return self.steps[-1] if self.steps else ""

    @property
    def distilled(self) -> bool:
        return self.effort in STEPS[1:]

    @property
    def random(self) -> bool:
        """Whether the seed matters, for masks or for the order of the distillation text."""
        return self.distilled or method_class(self.method).drops_entries

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of a whole study: one if the seed does not matter, or if all seeds would take days."""
        costly = self.distilled and self.name not in _REPEATED
        return SEEDS if self.random and not costly else SEEDS[:1]

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratios of a whole study."""
        return _LONG_RATIOS if self.effort == LONG else RATIOS

    def compress(
        self, pair: Pair, folder: Path, ratio: float, seed: int, effort: Effort, device: str
    ) -> CompressionReport:
        """Compress a pair into a folder.

        Raises:
            ValueError: if the method cannot reach the ratio.
        """
        make = PARTS[self.part] if self.part else method_class(self.method)
        training: dict[str, Any] = {"calibration": None}
        if CALIBRATION in self.steps:
            training["calibration"] = pair.train
        if self.distilled:
            training["distill"] = pair.train
            trains, times = (CODES, LONGER) if self.effort == LONG else (self.effort, 1)
            training["distill_settings"] = DistillSettings(steps=times * effort.steps, trains=trains, seed=seed)
        return compress(
            str(pair.base), str(pair.finetuned), folder, make(compression_ratio=ratio, seed=seed), device=device,
            calibration_samples=effort.samples, calibration_length=effort.length, **training,
        )  # fmt: skip


def _with(methods: tuple[str, ...], *steps: str) -> list[str]:
    return ["+".join((method, *steps)) for method in methods]


_ALL = (OURS, *PEERS)
_REPEATED = _with((OURS, PEERS[0]), CODES)  # distilled variants that are run with all seeds
_QUANTISING = tuple(method for method in _ALL if method_class(method).quantises)
# Ordered so that a study that is stopped early has the most informative results
DEFAULT = (
    *_with(_ALL),
    *_with(_QUANTISING, CALIBRATION),
    *_with(tuple(f"{OURS}/{part}" for part in PARTS)),
    *_with(_ALL, CODES),
    *_with((OURS, "impart-qt", "bitdelta"), LONG),
    *_with((OURS, *PEERS[:4]), SCALES),
    *_with((OURS, PEERS[0]), CALIBRATION, CODES),
)
