"""Sharing out a byte budget among matrices, each stored by components or by entries, at one price of a bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..modeling.delta_record import HEADER_BYTES, SEGMENT_BYTES
from .entry_codes import EntryCodes, entry_code, of_components, relative_error
from .rate_distortion import Components, Matrix, Table
from .record_sizes import OVERHEAD_BYTES

_GROUP = 1 << 20  # components that are binned at a time, to save memory
_ROUNDS, _LAST_ROUND = 6, 16  # in which it is decided which matrices are stored by entries: at most; then none is


@dataclass(frozen=True)
class Allocation:
    """How bytes are shared out among k matrices, and the errors that are to be expected.

    Attributes:
        bytes: of every matrix's record.
        dropped: float64 (k,), squared norm of the components that are not stored.
        noise: float64 (k,), expected squared error of what is stored.
        by_entries: bool (k,), which matrices are stored by entries.
    """

    bytes: list[int]
    dropped: np.ndarray
    noise: np.ndarray
    by_entries: np.ndarray


def allocate(matrices: list[Matrix], max_bytes: int) -> list[int]:
    """Return the bytes of every matrix's record, in total at most `max_bytes`, with one price of a bit for all."""
    return allocation(matrices, max_bytes).bytes


def allocation(matrices: list[Matrix], max_bytes: int) -> Allocation:
    """Share out at most `max_bytes` with one price of a bit for all matrices.

    Components that are nearly alike are counted instead of examined one by one.
    """
    table, where = _binned(matrices)
    owner = np.repeat(np.arange(len(matrices)), [len(matrix.sigma) for matrix in matrices])
    entries = EntryCodes(matrices)
    by_entries = np.zeros(len(matrices), bool)
    known = entries.energies[np.isfinite(entries.energies)]
    largest = max(float(table.numbers[2].max(initial=0.0)), float(known.max(initial=0.0)))
    headers, price, rounds = 0, None, 0
    while True:
        # Bins of components that no matrix stores count for nothing.
        counts = np.bincount(where[~by_entries[owner]], minlength=len(table.counts))
        fixed = max_bytes - headers - OVERHEAD_BYTES * int((~by_entries).sum())

        def room(price: float, fixed: int = fixed, chosen: np.ndarray = by_entries) -> float:
            return fixed - float(entries.choose(price)[0][chosen].sum())

        price = Table(table.numbers[:, counts > 0], counts[counts > 0]).price_for(room, price, largest)
        pairs, thresholds, bin_bytes, bin_errors = table.choose(price)
        components = np.bincount(owner, bin_bytes[where], len(matrices))
        of_entries, errors = entries.choose(price)
        harm = of_components(np.bincount(owner, bin_errors[where], len(matrices)), entries.energies)
        gains = harm - errors + 8 * price * (components + OVERHEAD_BYTES - of_entries)
        changing = np.flatnonzero((gains > 0) != by_entries)
        if rounds >= _ROUNDS:  # so that this ends
            changing = np.flatnonzero(by_entries) if rounds == _LAST_ROUND else changing[:0]
        # Fewer each time, those that gain most: what they change is the price, at which the others may stay.
        most = -(-len(changing) // 2**rounds) if rounds < _ROUNDS else len(changing)
        changing = changing[np.argsort(-np.abs(gains[changing]), kind="stable")[:most]]
        rounds += 1
        if len(changing):
            by_entries = by_entries.copy()
            by_entries[changing] = ~by_entries[changing]
            continue
        used = np.zeros((len(matrices), len(table.bit_pairs) + 1), bool)
        used[owner, pairs[where]] = True  # the last column is that of dropped components
        segments = np.maximum(1, used[:, :-1].sum(1))
        sizes = np.where(by_entries, of_entries, HEADER_BYTES + SEGMENT_BYTES * segments + components)
        sizes = np.ceil(sizes).astype(int)
        excess = int(sizes.sum()) - max_bytes
        if excess <= 0 or not ((pairs >= 0).any() or by_entries.any()):
            break
        headers += excess  # the number of segments is known only after the price
    energies = np.square(np.concatenate([matrix.sigma for matrix in matrices]))
    noise = np.bincount(owner, energies * table.noise(pairs, thresholds)[where], len(matrices))
    lost = np.bincount(owner, energies * (pairs[where] < 0), len(matrices))
    for number in np.flatnonzero(by_entries):
        code = entry_code(matrices[number], int(sizes[number]))
        noise[number] = relative_error(matrices[number], code) * energies[owner == number].sum()
    return Allocation(sizes.tolist(), np.where(by_entries, 0.0, lost), noise, by_entries)


def _binned(matrices: list[Matrix]) -> tuple[Table, np.ndarray]:
    """Return the components of all matrices in one table of bins, and each component's row in it."""
    tables, places, count, group = [], [], 0, []
    for number, matrix in enumerate(matrices, 1):
        group.append(matrix)
        if number == len(matrices) or sum(len(one.sigma) for one in group) > _GROUP:
            table, where = Components(group).table.binned()
            tables.append(table)
            places.append(where + count)
            count, group = count + len(table.counts), []
    joined = Table(
        np.concatenate([table.numbers for table in tables], 1), np.concatenate([table.counts for table in tables])
    )
    table, again = joined.binned()
    return table, again[np.concatenate(places)]
