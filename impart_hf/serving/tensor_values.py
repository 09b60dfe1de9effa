"""What values the tensors of a delta or of its base have, told from checksums, so that equal ones need no loading."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..modeling.checkpoints import Checkpoint
from ..modeling.delta_repository import DeltaRepository
from ..modeling.exact_record import HEADER_BYTES, stated_checksum


@dataclass(frozen=True)
class TensorValues:
    """What tells the values of a tensor from others; two that are equal stand for the same values, bit for bit.

    The reverse does not hold: values may be the same although these differ, as those of a record and its replacement.

    Attributes:
        base: checksum of the whole tensor of the base that it rests on.
        dtype, shape: its own.
        entries: the CRC-32 of each of its entries in the delta file; none if it equals the base's.
        exact: checksum of the values that an exact record stands for; None if it has none.
    """

    base: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    entries: tuple[int, ...] = ()
    exact: int | None = None


Values: TypeAlias = Mapping[str, TensorValues]


def delta_values(repository: DeltaRepository) -> Values:
    """Return what tells the values of each fine-tuned tensor, by name; nothing is decoded, and only headers are read.

    What a delta on another delta leaves unchanged is told as that one's.

    Raises:
        DeltaFormatError: if an exact record has no header.
    """
    values: Values = {}
    for link in reversed(repository.chain):
        values = _link_values(link, values)
    return values


def _link_values(repository: DeltaRepository, below: Values) -> Values:
    """Return the values of one delta, whose base's are those below if it is a delta, too."""
    crcs, values = repository.file.checksums(), {}
    for name in repository.names():
        parts = repository.parts[name]
        exact = None
        if parts.exact:
            exact = stated_checksum(repository.file.start(parts.exact, HEADER_BYTES), name)
        # An entry's CRC is of its name, too, so that it tells what kind of entry it is.
        entries = [entry for entry in (parts.records, parts.exact, parts.replacement, parts.added_rows) if entry]
        own = TensorValues(
            repository.base_checksums[name],
            repository.dtype(name),
            repository.shape(name),
            tuple(crcs[entry] for entry in entries),
            exact,
        )
        lower = below.get(repository.base.stored_name(name))
        values[name] = lower if lower is not None and _is_unchanged(own, lower) else own
    return values


def _is_unchanged(own: TensorValues, lower: TensorValues) -> bool:
    """Return whether a tensor is one of the delta below as it is, and that is the one that it was made against."""
    whole = lower.exact if lower.entries else lower.base
    return not own.entries and own.base == whole and (own.dtype, own.shape) == (lower.dtype, lower.shape)


def base_values(base: Checkpoint, checksums: Mapping[str, int]) -> Values:
    """Return what tells the values of a base's own tensors, of those whose checksums are known.

    Args:
        checksums: by the tensors' names in the base.
    """
    return {
        name: TensorValues(checksums[name], base.dtype(name), base.shape(name))
        for name in base.names()
        if name in checksums
    }
