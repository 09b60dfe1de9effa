"""Bits and keep ratio of every singular component, chosen so that all bytes do the same good.

A component sigma u v^T whose vectors are stored by an unbiased code with relative noise nu has the expected squared
error sigma^2 ((1 + nu)^2 - 1). With b bits for a value and values kept with probability q, 1 + nu = (1 + eps_b) / q at
b q bits for each of its m + n entries. For a price of a bit, every component has a choice of b and q that costs least,
error and price together; the price is one for all matrices of a model, and the highest at which the budget is used up.
"""

from dataclasses import dataclass

import numpy as np

from ..modeling.delta_record import HEADER_BYTES, SEGMENT_BYTES
from .records import COMPONENT_BYTES, OVERHEAD_BYTES, kept_ratios, thresholds_of

# Relative squared error D of the code, as D / (1 - D), for normally distributed numbers: signs; Lloyd-Max levels of 2
# to 4 bits; 256 evenly spaced levels.
NOISE = {1: 0.5708, 2: 0.1331, 3: 0.0358, 4: 0.0096, 8: 5e-5}
_BISECTIONS = 60
_PRICES = 1e-16, 4.0  # of a bit for each of m + n entries, in units of the largest squared singular value


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


def choose(sigma: np.ndarray, length: np.ndarray | int, price: float, drop_weight: float) -> Choice:
    """The choice for each component that costs least.

    Args:
        sigma: float64 (r,), singular values.
        length: m + n of the component's matrix; one for all, or (r,).
        price: of a bit, in units of squared error.
        drop_weight: what the error of a dropped component counts for, in that of noise of the same size.
    """
    energy = np.square(sigma)
    least, bits, ratios = drop_weight * energy, np.zeros(len(sigma), np.int64), np.ones(len(sigma))
    for width, noise in NOISE.items():
        # Where the derivative of error and price by q vanishes
        kept = np.cbrt(2 * energy * (1 + noise) ** 2 / (price * width * length)).clip(1e-3, 1.0)
        cost = energy * (((1 + noise) / kept) ** 2 - 1) + price * (width * kept * length + 8 * COMPONENT_BYTES)
        better = cost < least
        least, bits, ratios = (
            np.where(better, new, old) for new, old in ((cost, least), (width, bits), (kept, ratios))
        )
    thresholds = thresholds_of(ratios)
    sizes = np.where(bits > 0, bits * kept_ratios(thresholds) * length / 8 + COMPONENT_BYTES, 0.0)
    return Choice(bits, thresholds, sizes)


def price_for(sigma: np.ndarray, length: np.ndarray | int, max_bytes: float, drop_weight: float) -> float:
    """The lowest price, nearly, at which the chosen components take no more than so many bytes; arguments as above."""
    unit = float(np.square(sigma).max(initial=0.0)) or 1.0
    low, high = np.log(unit * _PRICES[0]), np.log(unit * _PRICES[1])
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fits = choose(sigma, length, np.exp(middle), drop_weight).bytes.sum() <= max_bytes
        low, high = (low, middle) if fits else (middle, high)
    return float(np.exp(high))


def allocate(spectra: list[np.ndarray], shapes: list[tuple[int, int]], max_bytes: int, drop_weight: float) -> list[int]:
    """The bytes of every matrix's record, together at most `max_bytes`, at which a byte does the same good in each.

    Args:
        spectra: float64, the leading singular values of each matrix: at least as many as can be worth their bytes.
        shapes: (m, n) of each.
    """
    counts = [len(spectrum) for spectrum in spectra]
    sigma = np.concatenate(spectra)
    length = np.repeat([rows + columns for rows, columns in shapes], counts)
    ends = np.cumsum(counts)[:-1]
    headers = OVERHEAD_BYTES * len(spectra)
    while True:
        price = price_for(sigma, length, max_bytes - headers, drop_weight)
        choice = choose(sigma, length, price, drop_weight)
        segments = [max(1, len(set(bits.tolist()) - {0})) for bits in np.split(choice.bits, ends)]
        sizes = [
            HEADER_BYTES + SEGMENT_BYTES * count + int(np.ceil(part.sum()))
            for count, part in zip(segments, np.split(choice.bytes, ends), strict=True)
        ]
        excess = sum(sizes) - max_bytes
        if excess <= 0 or not choice.bits.any():
            return sizes
        headers += excess  # how many segments there are follows from the price
