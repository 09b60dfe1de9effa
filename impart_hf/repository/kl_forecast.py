"""A forecast of a delta's quality without any text, from its errors: what share of the fine-tune's effect it loses.

The share is KL(fine-tune || delta) over KL(fine-tune || base). What counts are means over matrices of what is missing
of the deltas, and of noise. Noise averages out; its harm is in proportion to the norm of the deltas relative to the
weights. docs/methods/kl-forecast.md has the measurements. The constants were fitted to them by

    python scripts/fit_kl_forecast.py --results docs/methods/kl-forecast.jsonl
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FORECAST = "kl_forecast"  # its name in config.json, in the method's entry


@dataclass(frozen=True)
class Constants:
    """What errors count for; see `Losses.share`.

    Attributes:
        tokens: weight of what is missing of embeddings and output projections.
        shrunken: weight of the square of what is missing in all entries alike.
        noise: weight of noise.
    """

    tokens: float
    shrunken: float
    noise: float


CONSTANTS = Constants(tokens=1.3, shrunken=0.54, noise=0.27)
# With a calibration text the share is about this much of what errors alone say: they do not show where they do no harm.
CALIBRATED = 0.5
# Nine of ten measured shares are within this factor of forecasts by constants that were fitted to other bases' pairs.
SPREAD = 5.0
# KL(fine-tune || base) of the pairs behind these constants, nats per token: from the least to the largest.
BASE_KL = 0.18, 3.2


@dataclass(frozen=True)
class TensorErrors:
    """The errors of a tensor's records.

    Attributes:
        relative_norm: Frobenius norm of the delta over that of the fine-tuned tensor.
        dropped: what is missing of the delta: 1 - <decoded, delta> / <delta, delta>.
        relative_error: ||decoded - delta|| / ||delta||.
        direct: whether the delta is stored entry by entry.
        vocabulary: whether it has a row for every token.
        matrices: number of matrices in the tensor.
    """

    relative_norm: float
    dropped: float
    relative_error: float
    direct: bool
    vocabulary: bool
    matrices: int = 1

    @property
    def missing(self) -> float:
        """The missing part of the delta, 0 to 1."""
        return min(1.0, max(0.0, self.dropped))

    @property
    def noise(self) -> float:
        """The squared relative error beyond what is missing, times the relative norm of the delta.

        Noise in singular vectors does more harm than noise of single entries, which counts a third.
        """
        beyond = max(0.0, self.relative_error**2 - self.missing) * min(1.0, self.relative_norm)
        return beyond / 3 if self.direct else beyond


@dataclass(frozen=True)
class Losses:
    """The errors of a repository, as means over matrices.

    Attributes:
        missing, missing_tokens: missing parts of the deltas that are stored as singular components: of layers, and of
            embeddings and output projections.
        shrunken: missing parts of the deltas of layers that are stored entry by entry.
        noise: noise of layers.
    """

    missing: float
    missing_tokens: float
    shrunken: float
    noise: float

    @classmethod
    def of(cls, errors: Iterable[TensorErrors]) -> Losses:
        """Return the means of tensors' errors."""
        errors = list(errors)
        layers, tokens = ([e for e in errors if e.vocabulary == kind] for kind in (False, True))
        return cls(
            _mean(layers, [0.0 if e.direct else e.missing for e in layers]),
            _mean(tokens, [e.missing for e in tokens]),
            _mean(layers, [e.missing if e.direct else 0.0 for e in layers]),
            _mean(layers, [e.noise for e in layers]),
        )

    def share(self, constants: Constants = CONSTANTS) -> float:
        """Return the forecast of KL(fine-tune || delta) / KL(fine-tune || base), 0 to 1.

        Of singular components the smallest are dropped first, which do least harm: hence the third power.
        """
        missing = (self.missing + constants.tokens * self.missing_tokens) ** 3
        return min(1.0, missing + constants.shrunken * self.shrunken**2 + constants.noise * self.noise)


def kl_forecast(errors: Iterable[TensorErrors], calibrated: bool = False) -> list[float] | None:
    """Return the least share that is to be expected, the forecast and the largest, rounded; None if nothing is lost.

    Args:
        calibrated: whether the errors were made on a calibration text.
    """
    share = Losses.of(errors).share() * (CALIBRATED if calibrated else 1.0)
    if not share:
        return None
    return [_rounded(value) for value in (share / SPREAD, share, min(1.0, share * SPREAD))]


def forecast_text(forecast: Sequence[float]) -> str:
    """Say what the forecast of `kl_forecast` means."""
    low, share, high = forecast
    return (
        f"{_percent(share)} of the base's ({_percent(low)} to {_percent(high)}); where the base's is "
        f"{BASE_KL[0]:g} to {BASE_KL[1]:g} nats per token, {low * BASE_KL[0]:.1g} to {high * BASE_KL[1]:.1g}"
    )


def _mean(errors: Sequence[TensorErrors], values: Sequence[float]) -> float:
    count = sum(e.matrices for e in errors)
    return sum(e.matrices * value for e, value in zip(errors, values, strict=True)) / count if count else 0.0


def _rounded(value: float) -> float:
    """Round to two significant digits, so that the last bits of sums do not show."""
    return float(f"{value:.1e}")


def _percent(share: float) -> str:
    digits = max(0, 1 - math.floor(math.log10(100 * share)))
    return f"{100 * share:.{digits}f} %"
