"""Storing a matrix's entries themselves, most of them dropped at random: what it costs, and what error it leaves.

Where there are few bytes, most components would have to be dropped. What they do is then missing everywhere in the
model, whereas entries that are dropped at random and made up for by the others, as in DARE, only leave noise, which
averages out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .rate_distortion import LEAST_KEPT, NOISE, Matrix
from .record_sizes import OVERHEAD_BYTES

# Levels of 1 bit are no choice: rounding to signs does not average out (docs/methods/impart-rd.md).
_BITS = np.array([2, 3, 4])[:, None]
_NOISE = np.array([NOISE[bits] for bits in _BITS[:, 0].tolist()])[:, None]
# Weight of the error of rounding, relative to noise of the same size: it is the same for equal entries, so that part of
# it does not average out.
_ROUNDING = 13.0
# What components leave out adds up instead of averaging out, so that it counts with its square: this times the square
# over the entry energy, in units of noise in entries.
_ADDED_UP = 0.04
_TINY = 1e-200
_FIXED_BYTES = OVERHEAD_BYTES + 2  # one threshold for the whole matrix


@dataclass(frozen=True)
class EntryCode:
    """How a matrix's entries are stored.

    Attributes:
        bits: bits of a value.
        values: the most that can be stored.
        error: expected weighted squared error.
    """

    bits: int
    values: int
    error: float


def entry_code(matrix: Matrix, max_bytes: int) -> EntryCode:
    """Return the code with the least error that takes at most so many bytes; its error may be infinite."""
    entries = matrix.rows * matrix.columns
    values = np.minimum(entries, (max_bytes - _FIXED_BYTES) * 8 // _BITS)
    enough = values >= LEAST_KEPT * entries
    kept = np.where(enough, values / entries, 1.0)
    errors = np.where(enough, matrix.entry_energy * _relative_errors(kept), np.inf)[:, 0]
    best = int(errors.argmin())
    return EntryCode(int(_BITS[best, 0]), int(values[best, 0]), float(errors[best]))


def relative_error(matrix: Matrix, code: EntryCode) -> float:
    """Return a code's expected squared error, without weights, relative to the squared norm of the matrix."""
    return (1 + NOISE[code.bits]) * matrix.rows * matrix.columns / code.values - 1


class EntryCodes:
    """The codes of several matrices at one price of a bit."""

    def __init__(self, matrices: Sequence[Matrix]):
        self._entries = np.array([matrix.rows * matrix.columns for matrix in matrices], float)
        self.energies = np.array([matrix.entry_energy for matrix in matrices], float)

    def choose(self, price: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes and the error of the code with the least cost, which is error plus price: (k,) each."""
        energies = np.where(np.isfinite(self.energies), self.energies, 0.0)
        kept = np.sqrt(energies * (1 + _NOISE) / (price * _BITS * self._entries))
        kept = np.clip(kept, LEAST_KEPT, 1.0)
        sizes = _BITS * kept * self._entries / 8 + _FIXED_BYTES
        errors = np.where(np.isfinite(self.energies), energies * _relative_errors(kept), np.inf)
        best = (errors + 8 * price * sizes).argmin(0)[None]
        return np.take_along_axis(sizes, best, 0)[0], np.take_along_axis(errors, best, 0)[0]


def of_components(errors: np.ndarray | float, entry_energies: np.ndarray | float) -> np.ndarray | float:
    """Return what errors that components leave in matrices count for, to be compared with those of entries."""
    return _ADDED_UP * errors**2 / np.maximum(entry_energies, _TINY)


def _relative_errors(kept: np.ndarray) -> np.ndarray:
    """Return the errors for each number of bits, relative to the entry energy, if these shares of entries are kept."""
    return (1 + _NOISE) / kept - 1 + _ROUNDING * _NOISE
