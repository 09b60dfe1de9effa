"""Bits and keep ratio of every singular component, chosen so that all bytes do the same good.

A component sigma u v^T whose vectors are stored by unbiased codes has the expected squared error sigma^2 (f / q^2 - 1):
q is the probability with which values are kept, and f, which is 1 for exact vectors, the factor by which rounding
inflates the square of u v^T. It is measured on the vectors themselves: signs are a good code of normally distributed
numbers (f = 2.5), and a bad one of an embedding's, of whose rows a fine-tune changed only a few. b bits cost b q for
each of the m + n entries. For a price of a bit, every component has a choice of b and q that costs least, error and
price together; the price is one for all matrices of a model, and the highest at which the budget is used up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..modeling.delta_record import HEADER_BYTES, SEGMENT_BYTES
from .records import COMPONENT_BYTES, OVERHEAD_BYTES, kept_ratios, thresholds_of

BITS = (1, 2, 3, 4, 8)  # of a value
_BISECTIONS = 60
_PRICES = 1e-16, 4.0  # of a bit for each of m + n entries, in units of the largest squared singular value


@dataclass(frozen=True)
class Spectrum:
    """Singular components, of one matrix or of several.

    Attributes:
        sigma: float64 (r,), singular values.
        inflation: float64 (len(BITS), r): by how much unbiased codes of so many bits inflate a component's square.
    """

    sigma: np.ndarray
    inflation: np.ndarray

    @classmethod
    def joined(cls, parts: "Sequence[Spectrum]") -> "Spectrum":
        """Those of several matrices, one after the other."""
        return cls(np.concatenate([p.sigma for p in parts]), np.concatenate([p.inflation for p in parts], 1))


NO_COMPONENTS = Spectrum(np.empty(0), np.empty((len(BITS), 0)))


@dataclass(frozen=True)
class Choice:
    """How components are stored.

    Attributes:
        bits: of a value, (r,); 0 for a component that is dropped.
        thresholds: uint16 (r,), of the masks.
        bytes: float64 (r,), expected.
    """

    bits: np.ndarray
    thresholds: np.ndarray
    bytes: np.ndarray


def choose(spectrum: Spectrum, length: np.ndarray | int, price: float, drop_weight: float) -> Choice:
    """The choice for each component that costs least.

    Args:
        spectrum: of r components.
        length: m + n of the component's matrix; one for all, or (r,).
        price: of a bit, in units of squared error.
        drop_weight: what the error of a dropped component counts for, in that of noise of the same size.
    """
    energy, count = np.square(spectrum.sigma), len(spectrum.sigma)
    least, bits, ratios = drop_weight * energy, np.zeros(count, np.int64), np.ones(count)
    for width, inflation in zip(BITS, spectrum.inflation, strict=True):
        # Where the derivative of error and price by q vanishes
        kept = np.cbrt(2 * energy * inflation / (price * width * length)).clip(1e-3, 1.0)
        cost = energy * (inflation / kept**2 - 1) + price * (width * kept * length + 8 * COMPONENT_BYTES)
        better = cost < least
        least, bits, ratios = (
            np.where(better, new, old) for new, old in ((cost, least), (width, bits), (kept, ratios))
        )
    thresholds = thresholds_of(ratios)
    sizes = np.where(bits > 0, bits * kept_ratios(thresholds) * length / 8 + COMPONENT_BYTES, 0.0)
    return Choice(bits, thresholds, sizes)


def price_for(spectrum: Spectrum, length: np.ndarray | int, max_bytes: float, drop_weight: float) -> float:
    """The lowest price, nearly, at which the chosen components take no more than so many bytes; arguments as above."""
    unit = float(np.square(spectrum.sigma).max(initial=0.0)) or 1.0
    low, high = np.log(unit * _PRICES[0]), np.log(unit * _PRICES[1])
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fits = choose(spectrum, length, np.exp(middle), drop_weight).bytes.sum() <= max_bytes
        low, high = (low, middle) if fits else (middle, high)
    return float(np.exp(high))


def allocate(spectra: list[Spectrum], shapes: list[tuple[int, int]], max_bytes: int, drop_weight: float) -> list[int]:
    """The bytes of every matrix's record, together at most `max_bytes`, at which a byte does the same good in each.

    Args:
        spectra: the leading components of each matrix: at least as many as can be worth their bytes.
        shapes: (m, n) of each.
    """
    counts = [len(spectrum.sigma) for spectrum in spectra]
    everything = Spectrum.joined(spectra)
    length = np.repeat([rows + columns for rows, columns in shapes], counts)
    ends = np.cumsum(counts)[:-1]
    headers = OVERHEAD_BYTES * len(spectra)
    while True:
        price = price_for(everything, length, max_bytes - headers, drop_weight)
        choice = choose(everything, length, price, drop_weight)
        segments = [max(1, len(set(bits.tolist()) - {0})) for bits in np.split(choice.bits, ends)]
        sizes = [
            HEADER_BYTES + SEGMENT_BYTES * count + int(np.ceil(part.sum()))
            for count, part in zip(segments, np.split(choice.bytes, ends), strict=True)
        ]
        excess = sum(sizes) - max_bytes
        if excess <= 0 or not choice.bits.any():
            return sizes
        headers += excess  # how many segments there are follows from the price
