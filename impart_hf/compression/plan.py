"""Deciding, before any work, what becomes of every tensor and how many bytes each may take."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from ..methods import MethodConfig, method_for
from ..modeling.configuration_delta_compressed import FORMAT_VERSION
from .scan import TensorPlan

# Bytes of a safetensors header for one entry, beside its name: dtype, shape and two offsets of ten digits.
_ENTRY_BYTES = 96
# What the model card counts for, whatever its length: it states the sizes that it would be part of.
CARD_BYTES = 1536
# A matrix may be compressed beyond the ratio asked for, to make up for what cannot be, by up to this factor.
_MOST_EXTRA = 1.5


@dataclass
class CompressionPlan:
    """The plan of a whole repository.

    Attributes:
        tensors: by name, sorted.
        checkpoint_bytes: size on disk of the fine-tuned checkpoint's weight files.
        allowed_bytes: what the repository may take at the requested ratio.
        fixed_bytes: what it takes whatever the method does: kept tensors, added rows, headers, config and card.
        max_shard_size: a delta file larger than this, in bytes, is split.
    """

    tensors: list[TensorPlan]
    checkpoint_bytes: int
    allowed_bytes: int
    fixed_bytes: int
    max_shard_size: int

    @property
    def encoded(self) -> list[TensorPlan]:
        return [t for t in self.tensors if t.kind == "encoded"]

    def check_size(self) -> None:
        """See that the repository will take no more than it may.

        Raises:
            ValueError: if what is fixed leaves too little for the matrices.
        """
        if self.fixed_bytes + sum(t.max_bytes for t in self.encoded) > self.allowed_bytes:
            dense = sum(t.dense_bytes for t in self.encoded)
            raise ValueError(
                f"a repository of {self.allowed_bytes} bytes cannot be made: {self.fixed_bytes} are fixed (norms, "
                f"added vocabulary rows, headers, config.json and model card), and the matrices need the rest; "
                f"{_certain(_met_ratio(self.checkpoint_bytes, self.fixed_bytes, dense), self.checkpoint_bytes)}"
            )

    def shortfall(self, repository_bytes: int, record_bytes: int, ratio: float) -> str:
        """Why and by how much the requested ratio is missed; empty if it is not.

        Args:
            repository_bytes: what the repository takes.
            record_bytes: what of that the records take.
            ratio: the one that was asked for.
        """
        if repository_bytes <= self.allowed_bytes:
            return ""
        added = sum(t.added_bytes for t in self.tensors)
        return (
            f"ratio {ratio:g} allows {self.allowed_bytes} bytes, but {repository_bytes - record_bytes} are fixed "
            f"(added vocabulary rows {added}, norms, headers, config.json and model card the rest); the matrices are "
            f"compressed up to {_MOST_EXTRA:g} times further to make up for it, and "
            f"{repository_bytes - self.allowed_bytes} bytes remain over"
        )

    def fingerprint(self, method: MethodConfig, inputs: Any = None) -> str:
        """Hash of everything that the result depends on; a resumed run must have the same.

        Args:
            method: its settings are.
            inputs: and whatever else there is that JSON can hold.
        """
        parts: list[Any] = [FORMAT_VERSION, method.to_dict(), inputs, self.checkpoint_bytes]
        parts += [
            [t.name, t.kind, t.shape, str(t.dtype), t.max_bytes, t.base_checksum, t.checksum] for t in self.tensors
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def make_plan(
    tensors: list[TensorPlan], method: MethodConfig, checkpoint_bytes: int, config_bytes: int, max_shard_size: int
) -> CompressionPlan:
    """Give every encoded tensor its budget, in proportion to its size.

    Args:
        tensors: from `scan`.
        checkpoint_bytes: size on disk of the fine-tuned checkpoint's weight files.
        config_bytes: of config.json.
        max_shard_size: a delta file larger than this, in bytes, will be split.

    Raises:
        ValueError: if the ratio leaves a matrix too little for the smallest record, naming a ratio that does not; or
            if the method's settings do not fit the matrices.
    """
    tensors = [dataclasses.replace(t) for t in tensors]
    method.check_shapes([(t.shape[-2], t.shape[-1]) for t in tensors if t.kind == "encoded"])
    allowed = int(checkpoint_bytes / method.compression_ratio)
    for t in tensors:
        if t.kind == "encoded" and _most_ratio(t, method) <= 1:
            t.kind = "kept"
    while True:
        encoded = [t for t in tensors if t.kind == "encoded"]
        dense = sum(t.dense_bytes for t in encoded)
        nominal = dense / method.compression_ratio
        fixed = config_bytes + CARD_BYTES + _fixed_bytes(tensors)
        fixed += _split_bytes(tensors, max(allowed, fixed + nominal / _MOST_EXTRA), max_shard_size)
        share = max(allowed - fixed, nominal / _MOST_EXTRA) / dense if dense else 0.0
        for t in encoded:
            t.max_bytes = int(t.dense_bytes * share)
        # Where little was changed there may be room for all of it as it is, which no method betters.
        unreachable = [t for t in encoded if t.max_bytes < _least_bytes(t, method)] if share < 1 else encoded
        if not unreachable:
            break
        # A few small matrices (a router, a projection to few heads) are kept; if they are more than that, the ratio
        # itself is out of reach.
        if share < 1 and sum(t.dense_bytes for t in unreachable) > 0.1 * allowed:
            worst = min(unreachable, key=lambda t: _most_ratio(t, method))
            reachable = min(_most_ratio(t, method) for t in encoded)
            raise ValueError(
                f"compression_ratio={method.compression_ratio:g} cannot be reached: {worst.name} "
                f"({'x'.join(map(str, worst.shape))}) would get {worst.max_bytes} bytes, and the smallest record of "
                f"'{method.name}' takes {_least_bytes(worst, method)}; "
                f"{_certain(min(reachable, _met_ratio(checkpoint_bytes, fixed, dense)), checkpoint_bytes)}"
            )
        for t in unreachable:
            t.kind, t.max_bytes = "kept", 0
    return CompressionPlan(tensors, checkpoint_bytes, allowed, fixed, max_shard_size)


def _met_ratio(checkpoint_bytes: int, fixed: int, dense: int) -> float:
    """The ratio at which matrices of so many bytes, compressed `_MOST_EXTRA` times further, make up for the rest."""
    return (checkpoint_bytes - dense / _MOST_EXTRA) / fixed


def _certain(ratio: float, checkpoint_bytes: int) -> str:
    """What to ask for instead, rounded so that it can be had."""
    ratio = math.floor(100 * ratio - 0.5) / 100
    return f"a ratio of {ratio:.2f}, which is {math.ceil(checkpoint_bytes / ratio)} bytes, is certain to be met"


def _most_ratio(tensor: TensorPlan, method: MethodConfig) -> float:
    """The ratio up to which a tensor's budget holds its smallest record in any case."""
    return tensor.dense_bytes / _least_bytes(tensor, method) / _MOST_EXTRA


def _least_bytes(tensor: TensorPlan, method: MethodConfig) -> int:
    rows, columns = tensor.shape[-2:]
    return tensor.matrices * method_for(method, tensor.vocabulary).least_bytes(rows, columns)


def _fixed_bytes(tensors: list[TensorPlan]) -> int:
    total = 8 * (len(tensors) + 1) + 3 * _ENTRY_BYTES  # checksum tables, file metadata
    for t in tensors:
        total += _entries(t) * (_name_bytes(t) + _ENTRY_BYTES + 4)  # and a CRC each
        total += t.added_bytes + (t.dense_bytes if t.kind == "kept" else 0)
    return total


def _split_bytes(tensors: list[TensorPlan], total: float, max_shard_size: int) -> int:
    """What splitting costs: the index, and header and checksum table of each further file."""
    if total <= max_shard_size:
        return 0
    # Two files that follow each other are together larger than one may be.
    files = min(1 + sum(map(_entries, tensors)), 2 * math.ceil(total / max_shard_size))
    return (files + 1) * 2 * _ENTRY_BYTES + sum(_entries(t) * (_name_bytes(t) + _ENTRY_BYTES) for t in tensors)


def _entries(tensor: TensorPlan) -> int:
    return (tensor.kind != "equal") + (tensor.added_rows > 0)


def _name_bytes(tensor: TensorPlan) -> int:
    return len(json.dumps(tensor.name))  # JSON spells out what is not ASCII
