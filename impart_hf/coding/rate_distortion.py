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

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import astuple, dataclass

import numpy as np

from .record_sizes import COMPONENT_BYTES, kept_ratios, thresholds_of

# By bits, D / (1 - D) for the relative squared error D of normally distributed values stored as signs, as Lloyd-Max
# levels of 2 to 4 bits, or as 256 evenly spaced levels.
NOISE = {1: 0.5708, 2: 0.1331, 3: 0.0358, 4: 0.0096, 8: 5e-5}
_NEWTON_STEPS = 4
LEAST_KEPT = 1e-3  # the smallest q
_TINY = 1e-200
_PRICES = 1e-60, 1.0  # range of a bit's price, in units of the largest error; at the upper end nothing is stored
_EXACT, _ABOUT = 1e-4, 0.03  # relative errors of a price: of the returned one, and of an estimate from wide bins
_STEP, _WIDE_STEP = 0.01, 0.3  # width of a bin, as a logarithm of squared singular values; that of a wide one
_MOST_BINS = 100_000  # if there would be more, bins are wider
FEW = 200  # components whose price is found without wide bins
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # mixes numbers into a hash
_CHUNK = 4096  # components processed together, so that their numbers stay in the processor's cache

Room = Callable[[float], float]


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
        entry_energy: its squared Frobenius norm times the weight of noise in single entries; infinite if entries must
            not be stored themselves.
    """

    sigma: np.ndarray
    rows: int
    columns: int
    error_weights: ErrorWeights
    entry_energy: float = math.inf


@dataclass(frozen=True)
class Choice:
    """How components are stored.

    Attributes:
        bits: int64 (r, 2), bits of a value of u and of v; 0 for a dropped component.
        thresholds: uint16 (r,), thresholds of the masks.
        bytes: float64 (r,), expected sizes in bytes.
        errors: float64 (r,), expected weighted squared errors.
    """

    bits: np.ndarray
    thresholds: np.ndarray
    bytes: np.ndarray
    errors: np.ndarray

    @property
    def count(self) -> int:
        """Number of components that are stored."""
        return int((self.bits[:, 0] > 0).sum())


class Table:
    """Sizes and weighted energies of components; a row of the table may stand for several that are nearly alike."""

    def __init__(self, numbers: np.ndarray, counts: np.ndarray | None = None):
        """Use a table.

        Args:
            numbers: float64 (6, r): rows and columns of each component's matrix, its squared singular value times its
                weights in the order of `ErrorWeights`.
            counts: float64 (r,), how many components each stands for; 1 if None.
        """
        self.numbers = numbers
        self.counts = np.ones(numbers.shape[1]) if counts is None else counts
        # All pairs of bits for u and for v, (pairs, 2), and 1 + eps of each, (2, pairs, 1).
        self.bit_pairs = np.array(list(itertools.product(NOISE, NOISE)))
        self._noise = np.array([[1 + NOISE[bits] for bits in pair] for pair in self.bit_pairs.tolist()]).T[:, :, None]

    def choose(self, price: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return each component's pair in `bit_pairs`, -1 if it is dropped; its threshold; its bytes; its error."""
        starts = range(0, max(1, self.numbers.shape[1]), _CHUNK)
        parts = [self._chosen(self.numbers[:, start : start + _CHUNK], price) for start in starts]
        pairs, thresholds, sizes, errors = (np.concatenate(part) for part in zip(*parts, strict=True))
        return pairs, thresholds, sizes, errors

    def _chosen(self, numbers: np.ndarray, price: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        rows, columns, dropped, u, v, both = numbers
        noise_u, noise_v = self._noise
        # With z = 1 / q, the error is square * z^2 + linear * z plus a constant. All have shape (pairs, r); `bits` is
        # the size at q = 1.
        square, linear = both * noise_u * noise_v, (u - both) * noise_u + (v - both) * noise_v
        bits = self.bit_pairs[:, :1] * rows + self.bit_pairs[:, 1:] * columns
        bit_price = price * bits
        z = _best_inverse(square, linear, bit_price)
        costs = square * z**2 + linear * z + bit_price / z
        best = costs.argmin(0)
        least, kept, whole = (np.take_along_axis(values, best[None], 0)[0] for values in (costs, 1 / z, bits))
        costs = least + both - u - v + 8 * price * COMPONENT_BYTES
        stored = costs < dropped
        thresholds = thresholds_of(np.where(stored, kept, 1.0))
        sizes = np.where(stored, whole * kept_ratios(thresholds) / 8 + COMPONENT_BYTES, 0.0)
        return np.where(stored, best, -1), thresholds, sizes, np.where(stored, costs - 8 * price * sizes, dropped)

    def noise(self, pairs: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
        """Return the expected squared error of components that are stored as `choose` says, relative to their energy.

        It is 0 for dropped components, of which nothing is stored.
        """
        kept = kept_ratios(thresholds)
        return np.where(pairs < 0, 0.0, self._noise[:, pairs, 0].prod(0) / kept**2 - 1)

    def binned(self) -> tuple[Table, np.ndarray]:
        """Return a table in which components that are nearly alike share a row, and each component's row in it."""
        found, where, step = *self._grouped(_STEP), _STEP
        while found.numbers.shape[1] > _MOST_BINS:
            step *= 2
            found, again = found._grouped(step)
            where = again[where]
        return found, where

    def _grouped(self, step: float) -> tuple[Table, np.ndarray]:
        """Bin components whose largest energies differ by about a factor of 1 + `step`."""
        rows, columns, dropped, *noise = self.numbers
        size = np.log(np.maximum(dropped, _TINY))
        # The choice depends less on the energies of noise, relative to this one.
        shares = [np.log(np.maximum(part, _TINY)) - size for part in noise]
        key = np.zeros(len(size), np.int64)
        for part in (rows, columns, size / step, *(share / (2 * step) for share in shares)):
            key = key * _MULTIPLIER + np.round(part).astype(np.int64)  # a hash: it may overflow
        _, first, where = np.unique(key, return_index=True, return_inverse=True)
        counts = np.bincount(where, self.counts)
        means = [np.bincount(where, self.counts * part) / counts for part in (dropped, *noise)]
        return Table(np.stack([rows[first], columns[first], *means]), counts), where

    def price_for(self, room: Room, near: float | None = None, largest: float = 0.0) -> float:
        """Return nearly the lowest price of a bit at which the chosen components take at most what there is room for.

        Args:
            room: the bytes that they may take at a price of a bit; no less at a higher price.
            near: a price not far from it, if one is known.
            largest: the largest error of what else has this price, in units of the components' errors.
        """
        least, most = np.log((float(self.numbers[2].max(initial=largest)) or 1.0) * np.array(_PRICES))
        if self.numbers.shape[1] <= FEW:
            return float(np.exp(self._bisected(room, least, most)))
        if near is None:  # wide bins give an estimate in a fraction of the time
            about = self._grouped(_WIDE_STEP)[0]._bisected(room, least, most)
        else:
            about = float(np.clip(np.log(near), least, most))
        low, high, width = about, about, _ABOUT
        while low > least and self._fits(room, low):
            low, high, width = max(least, low - width), low, 4 * width
        while high < most and not self._fits(room, high):
            low, high, width = high, min(most, high + width), 4 * width
        # A component that is dropped at the lower price is dropped at all higher ones.
        return float(np.exp(self._stored(low)._bisected(room, low, high)))

    def _bisected(self, room: Room, low: float, high: float) -> float:
        """Return the logarithm of nearly the lowest price between two others at which the components fit."""
        while high - low > _EXACT:
            middle = (low + high) / 2
            low, high = (low, middle) if self._fits(room, middle) else (middle, high)
        return high

    def _stored(self, log_price: float) -> Table:
        """Return the rows that are stored at a price."""
        stored = self.choose(np.exp(log_price))[0] >= 0
        return Table(self.numbers[:, stored], self.counts[stored])

    def _fits(self, room: Room, log_price: float) -> bool:
        price = float(np.exp(log_price))
        return float(self.choose(price)[2] @ self.counts) <= room(price)


class Components:
    """The components of several matrices, concatenated."""

    def __init__(self, matrices: list[Matrix]):
        counts = [len(matrix.sigma) for matrix in matrices]
        energy = np.square(np.concatenate([matrix.sigma for matrix in matrices]))
        parts = zip(*((m.rows, m.columns, *astuple(m.error_weights)) for m in matrices), strict=True)
        rows, columns, *weights = (
            np.concatenate([np.full(count, part, float) for count, part in zip(counts, values, strict=True)])
            for values in parts
        )
        self.table = Table(np.stack([rows, columns, *(energy * weight for weight in weights)]))

    def choose(self, price: float) -> Choice:
        """Return each component's choice of least cost.

        Args:
            price: price of a bit, in units of weighted squared error.
        """
        pairs, *others = self.table.choose(price)
        return Choice(self.table.bit_pairs[pairs] * (pairs >= 0)[:, None], *others)

    def price_for(self, max_bytes: float) -> float:
        """Return nearly the lowest price of a bit at which the chosen components take at most `max_bytes`."""
        return self.table.price_for(lambda _: max_bytes)


def _best_inverse(square: np.ndarray, linear: np.ndarray, bit_price: np.ndarray) -> np.ndarray:
    """Return the z = 1 / q, at least 1, that minimises square z^2 + linear z + bit_price / z."""
    # The derivative is zero where 2 square z^3 + linear z^2 - bit_price is. Without one of its first two terms, that
    # zero is higher. Newton's method descends from there, because the function is convex.
    z = np.ones(square.shape)
    above = 2 * square + linear < bit_price
    square, linear, bit_price = square[above], linear[above], bit_price[above]
    best = np.minimum(np.cbrt(bit_price / (2 * square + _TINY)), np.sqrt(bit_price / (linear + _TINY)))
    best = np.clip(best, 1.0, 1 / LEAST_KEPT)
    for _ in range(_NEWTON_STEPS):
        slope = (6 * square * best + 2 * linear) * best + _TINY
        best -= ((2 * square * best + linear) * best**2 - bit_price) / slope
        np.clip(best, 1.0, 1 / LEAST_KEPT, best)
    z[above] = best
    return z
