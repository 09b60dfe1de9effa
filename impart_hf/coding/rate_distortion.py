"""Choosing bits and keep ratio of every singular component so that every byte reduces the error equally.

A component sigma u v^T whose vectors are stored without bias, with relative noise nu_u and nu_v, has the expected
squared error sigma^2 (nu_u + nu_v + nu_u nu_v). Its three terms harm a model differently. Noise in u responds to inputs
along v, which are strong, because a fine-tune's deltas are made to respond to them. Noise in v changes the output along
u, but few inputs lie along the noise. Noise in both does little harm. A dropped component is missing in the same
direction everywhere, while noise averages out. `ErrorWeights` holds the weight of each term.

With b bits for a value and values kept with probability q, 1 + nu = (1 + eps_b) / q at b q bits for each entry. Given a
price of a bit, every component has a choice of bits for u, bits for v and q with the least cost, which is error plus
price. The price is the same for all matrices of a model: the lowest at which their records fit the byte budget.
"""

import itertools
from dataclasses import astuple, dataclass

import numpy as np

from ..modeling.delta_record import HEADER_BYTES, SEGMENT_BYTES
from .record_sizes import COMPONENT_BYTES, OVERHEAD_BYTES, kept_ratios, thresholds_of

# By bits, D / (1 - D) for the relative squared error D of normally distributed values stored as signs, as Lloyd-Max
# levels of 2 to 4 bits, or as 256 evenly spaced levels.
NOISE = {1: 0.5708, 2: 0.1331, 3: 0.0358, 4: 0.0096, 8: 5e-5}
_NEWTON_STEPS = 4
_LEAST_KEPT = 1e-3  # the smallest q
_TINY = 1e-200
_PRICES = 1e-60, 1.0  # range of a bit's price, in units of the largest error; at the upper end nothing is stored
_EXACT, _ABOUT = 1e-7, 0.03  # relative errors of a price: of the returned one, and of an estimate from a sample
CHUNK = 4096  # components processed together, so that their numbers stay in the processor's cache


@dataclass(frozen=True)
class ErrorWeights:
    """Weights of the squared errors of a matrix's components: one number for all, or float64 (r,).

    Attributes:
        dropped: weight of a component that is not stored.
        u, v, both: weights of noise in u, in v, and in both; twice `both` is well below u + v, so that less noise
            never costs more.
    """

    dropped: float | np.ndarray
    u: float | np.ndarray
    v: float | np.ndarray
    both: float | np.ndarray


@dataclass(frozen=True)
class Matrix:
    """A matrix (m, n) whose components are to be stored.

    Attributes:
        sigma: float64 (r,), its leading singular values, at least as many as the budget could store.
        rows, columns: m and n.
    """

    sigma: np.ndarray
    rows: int
    columns: int
    error_weights: ErrorWeights


@dataclass(frozen=True)
class Choice:
    """How components are stored.

    Attributes:
        bits: int64 (r, 2), bits of a value of u and of v; 0 for a dropped component.
        thresholds: uint16 (r,), thresholds of the masks.
        bytes: float64 (r,), expected sizes in bytes.
    """

    bits: np.ndarray
    thresholds: np.ndarray
    bytes: np.ndarray

    @property
    def count(self) -> int:
        """Number of components that are stored."""
        return int((self.bits[:, 0] > 0).sum())


class Components:
    """The components of several matrices, concatenated."""

    def __init__(self, matrices: list[Matrix]):
        counts = [len(matrix.sigma) for matrix in matrices]
        self.ends = np.cumsum(counts)[:-1]
        energy = np.square(np.concatenate([matrix.sigma for matrix in matrices]))
        parts = zip(*((m.rows, m.columns, *astuple(m.error_weights)) for m in matrices), strict=True)
        rows, columns, dropped, u, v, both = (
            np.concatenate([np.full(count, part, float) for count, part in zip(counts, values, strict=True)])
            for values in parts
        )
        # All pairs of bits for u and for v, (pairs, 2), and 1 + eps of each, (2, pairs, 1).
        self._bit_pairs = np.array(list(itertools.product(NOISE, NOISE)))
        self._noise = (1 + np.vectorize(NOISE.get)(self._bit_pairs)).T[:, :, None]
        self._worst = float((dropped * energy).max(initial=0.0)) or 1.0
        self._table = np.stack([rows, columns, energy * dropped, energy * u, energy * v, energy * both])

    def choose(self, price: float) -> Choice:
        """Return each component's choice of least cost.

        Args:
            price: price of a bit, in units of weighted squared error.
        """
        return Choice(*self._all_chosen(self._table, price))

    def _all_chosen(self, table: np.ndarray, price: float) -> list[np.ndarray]:
        """Return bits, thresholds and bytes of the components in a table, computed in chunks."""
        starts = range(0, max(1, table.shape[1]), CHUNK)
        parts = [self._chosen(table[:, start : start + CHUNK], price) for start in starts]
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    def _chosen(self, table: np.ndarray, price: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, columns, dropped, u, v, both = table
        noise_u, noise_v = self._noise
        # With z = 1 / q, the error is square * z^2 + linear * z plus a constant. All have shape (pairs, r); `bits` is
        # the size at q = 1.
        square, linear = both * noise_u * noise_v, (u - both) * noise_u + (v - both) * noise_v
        bits = self._bit_pairs[:, :1] * rows + self._bit_pairs[:, 1:] * columns
        bit_price = price * bits
        z = _best_inverse(square, linear, bit_price)
        costs = square * z**2 + linear * z + bit_price / z
        best = costs.argmin(0)
        least, kept, whole = (np.take_along_axis(values, best[None], 0)[0] for values in (costs, 1 / z, bits))
        stored = least + both - u - v + 8 * price * COMPONENT_BYTES < dropped
        thresholds = thresholds_of(np.where(stored, kept, 1.0))
        sizes = whole * kept_ratios(thresholds) / 8 + COMPONENT_BYTES
        return self._bit_pairs[best] * stored[:, None], thresholds, np.where(stored, sizes, 0.0)

    def price_for(self, max_bytes: float) -> float:
        """Return nearly the lowest price of a bit at which the chosen components take at most `max_bytes`."""
        least, most = low, high = np.log(self._worst * np.array(_PRICES))
        stride = self._table.shape[1] // CHUNK
        if stride > 1:  # a sample of the components gives an estimate in a fraction of the time
            sample = self._table[:, ::stride]
            share = sample.shape[1] / self._table.shape[1]
            low, high = self._bisected(sample, share * max_bytes, low, high, _ABOUT)
            while low > least and self._fits(self._table, max_bytes, low := max(least, low - _ABOUT)):
                pass
            while high < most and not self._fits(self._table, max_bytes, high := min(most, high + _ABOUT)):
                pass
        return float(np.exp(self._bisected(self._table, max_bytes, low, high, _EXACT)[1]))

    def _bisected(
        self, table: np.ndarray, max_bytes: float, low: float, high: float, width: float
    ) -> tuple[float, float]:
        """Bisect to two logarithms of prices, at most `width` apart: at the lower one the components do not fit."""
        while high - low > width:
            middle = (low + high) / 2
            low, high = (low, middle) if self._fits(table, max_bytes, middle) else (middle, high)
        return low, high

    def _fits(self, table: np.ndarray, max_bytes: float, log_price: float) -> bool:
        return self._all_chosen(table, np.exp(log_price))[2].sum() <= max_bytes


def _best_inverse(square: np.ndarray, linear: np.ndarray, bit_price: np.ndarray) -> np.ndarray:
    """Return the z = 1 / q, at least 1, that minimises square z^2 + linear z + bit_price / z."""
    # The derivative is zero where 2 square z^3 + linear z^2 - bit_price is. Without one of its first two terms, that
    # zero is higher. Newton's method descends from there, because the function is convex.
    z = np.minimum(np.cbrt(bit_price / (2 * square + _TINY)), np.sqrt(bit_price / (linear + _TINY)))
    z = np.clip(z, 1.0, 1 / _LEAST_KEPT)
    for _ in range(_NEWTON_STEPS):
        slope = 6 * square * z**2 + 2 * linear * z + _TINY
        z = np.clip(z - (2 * square * z**3 + linear * z**2 - bit_price) / slope, 1.0, 1 / _LEAST_KEPT)
    return z


def allocate(matrices: list[Matrix], max_bytes: int) -> list[int]:
    """Return the bytes of every matrix's record, in total at most `max_bytes`, with one price of a bit for all."""
    components = Components(matrices)
    headers = OVERHEAD_BYTES * len(matrices)
    while True:
        choice = components.choose(components.price_for(max_bytes - headers))
        segments = [
            max(1, len({tuple(pair) for pair in bits.tolist()} - {(0, 0)}))
            for bits in np.split(choice.bits, components.ends)
        ]
        sizes = [
            HEADER_BYTES + SEGMENT_BYTES * count + int(np.ceil(part.sum()))
            for count, part in zip(segments, np.split(choice.bytes, components.ends), strict=True)
        ]
        excess = sum(sizes) - max_bytes
        if excess <= 0 or not choice.bits.any():
            return sizes
        headers += excess  # the number of segments is known only after the price
