"""The plan of a compression: the kind and the byte budget of every tensor, decided before any work."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from ..methods import ExactConfig, MethodConfig, method_for
from ..modeling.configuration_delta_compressed import FORMAT_VERSION
from .scan import TensorPlan

# Bytes of one entry in a safetensors header besides its name: dtype, shape and two offsets of ten digits.
_ENTRY_BYTES = 96
# To compensate for the fixed bytes, a matrix may be compressed beyond the requested ratio by up to this factor.
_MOST_COMPENSATION = 1.5


class UnreachableRatioError(ValueError):
    """A compression ratio, or size, that a repository of this pair cannot have."""


@dataclass
class CompressionPlan:
    """The plan of a whole repository.

    Attributes:
        tensors: sorted by name.
        checkpoint_bytes: size on disk of the fine-tuned checkpoint's weight files.
        allowed_bytes: the most that the repository may take at the requested ratio.
        fixed_bytes: the part that does not depend on the method: kept tensors, added rows, headers, config and card.
        card_bytes: the part of them that is the model card's.
        max_shard_size: a delta file larger than this, in bytes, is split.
    """

    tensors: list[TensorPlan]
    checkpoint_bytes: int
    allowed_bytes: int
    fixed_bytes: int
    card_bytes: int
    max_shard_size: int

    @property
    def exact(self) -> list[TensorPlan]:
        return [t for t in self.tensors if t.kind == "exact"]

    @property
    def encoded(self) -> list[TensorPlan]:
        return [t for t in self.tensors if t.kind == "encoded"]

    def check_size(self) -> None:
        """Check that the repository will fit its allowed bytes.

        Raises:
            UnreachableRatioError: if the fixed bytes leave too little for the matrices.
        """
        if self.fixed_bytes + sum(t.max_bytes for t in self.encoded) > self.allowed_bytes:
            dense = sum(t.dense_bytes for t in self.encoded)
            raise UnreachableRatioError(
                f"a repository of {self.allowed_bytes} bytes cannot be made: {self.fixed_bytes} are fixed (norms, "
                f"added vocabulary rows, headers, config.json and model card), and the matrices need the rest; "
                f"{_reachable(_met_ratio(self.checkpoint_bytes, self.fixed_bytes, dense), self.checkpoint_bytes)}"
            )

    def shortfall(self, repository_bytes: int, record_bytes: int, ratio: float) -> str:
        """Return why and by how much the requested ratio is missed; empty if it is met.

        Args:
            repository_bytes: size of the repository.
            record_bytes: size of the records in it.
            ratio: the requested ratio.
        """
        if repository_bytes <= self.allowed_bytes:
            return ""
        added = sum(t.added_bytes for t in self.tensors)
        return (
            f"ratio {ratio:g} allows {self.allowed_bytes} bytes, but {repository_bytes - record_bytes} are fixed "
            f"(added vocabulary rows {added}, norms, headers, config.json and model card the rest); the matrices are "
            f"compressed up to {_MOST_COMPENSATION:g} times further to compensate, and the repository is still "
            f"{repository_bytes - self.allowed_bytes} bytes too large"
        )

    def fingerprint(self, method: MethodConfig | ExactConfig, inputs: Any = None) -> str:
        """Return a hash of everything that the result depends on; a run resumes only if it is the same.

        Args:
            method: the method, of which the name and all settings are hashed.
            inputs: all other inputs, in types that JSON can hold.
        """
        parts: list[Any] = [FORMAT_VERSION, method.to_dict(), inputs, self.checkpoint_bytes]
        parts += [
            [t.name, t.kind, t.shape, str(t.dtype), t.max_bytes, t.base_checksum, t.checksum] for t in self.tensors
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def exact_plan(
    tensors: list[TensorPlan], checkpoint_bytes: int, config_bytes: int, card_bytes: int, max_shard_size: int
) -> CompressionPlan:
    """Return the plan of a repository whose changed tensors are all stored exactly; arguments as for `make_plan`.

    Nobody knows its size before: the allowed bytes are those of a fine-tune that changed every number much.
    """
    fixed = config_bytes + card_bytes + _fixed_bytes(tensors)
    allowed = sum(t.dense_bytes for t in tensors if t.kind == "exact") // 2
    return CompressionPlan(tensors, checkpoint_bytes, allowed, fixed, card_bytes, max_shard_size)


def make_plan(
    tensors: list[TensorPlan],
    method: MethodConfig,
    checkpoint_bytes: int,
    config_bytes: int,
    card_bytes: int,
    max_shard_size: int,
) -> CompressionPlan:
    """Give every encoded tensor a byte budget in proportion to its size.

    Args:
        tensors: from `scan`.
        checkpoint_bytes: size on disk of the fine-tuned checkpoint's weight files.
        config_bytes: size of config.json.
        card_bytes: what the model card counts as.
        max_shard_size: a delta file larger than this, in bytes, will be split.

    Raises:
        UnreachableRatioError: if the ratio leaves a matrix too few bytes for the smallest record, naming a ratio that
            can be met.
        ValueError: if the method's settings do not fit the matrices.
    """
    tensors = [dataclasses.replace(t) for t in tensors]
    method.check_shapes([(t.shape[-2], t.shape[-1]) for t in tensors if t.kind == "encoded"])
    allowed = int(checkpoint_bytes / method.compression_ratio)
    for t in tensors:
        if t.kind == "encoded" and _certain_ratio(t, method) <= 1:
            t.kind = "kept"
    while True:
        encoded = [t for t in tensors if t.kind == "encoded"]
        dense = sum(t.dense_bytes for t in encoded)
        nominal = dense / method.compression_ratio
        fixed = config_bytes + card_bytes + _fixed_bytes(tensors)
        fixed += _split_bytes(tensors, max(allowed, fixed + nominal / _MOST_COMPENSATION), max_shard_size)
        share = max(allowed - fixed, nominal / _MOST_COMPENSATION) / dense if dense else 0.0
        for t in encoded:
            t.max_bytes = int(t.dense_bytes * share)
        # If few tensors changed, all of them may fit the budget whole, which no method can improve on.
        unreachable = [t for t in encoded if t.max_bytes < _least_bytes(t, method)] if share < 1 else encoded
        if not unreachable:
            break
        # A few small matrices (a router, a projection to few heads) are stored whole. If they take more than a
        # tenth of the allowed bytes, the ratio cannot be reached.
        if share < 1 and sum(t.dense_bytes for t in unreachable) > 0.1 * allowed:
            worst = min(unreachable, key=lambda t: _certain_ratio(t, method))
            reachable = min(_certain_ratio(t, method) for t in encoded)
            raise UnreachableRatioError(
                f"a compression ratio of {method.compression_ratio:g} cannot be reached: {worst.name} "
                f"({'x'.join(map(str, worst.shape))}) would get {worst.max_bytes} bytes, and the smallest record of "
                f"'{method.name}' takes {_least_bytes(worst, method)} bytes; "
                f"{_reachable(min(reachable, _met_ratio(checkpoint_bytes, fixed, dense)), checkpoint_bytes)}"
            )
        for t in unreachable:
            t.kind, t.max_bytes = "kept", 0
    return CompressionPlan(tensors, checkpoint_bytes, allowed, fixed, card_bytes, max_shard_size)


def _met_ratio(checkpoint_bytes: int, fixed: int, dense: int) -> float:
    """Return the ratio that is met if `dense` bytes of matrices are compressed `_MOST_COMPENSATION` times further."""
    return (checkpoint_bytes - dense / _MOST_COMPENSATION) / fixed


def _reachable(ratio: float, checkpoint_bytes: int) -> str:
    """Name a ratio and a size to ask for instead, rounded so that they can be met."""
    ratio = math.floor(100 * ratio - 0.5) / 100
    return f"a ratio of {ratio:.2f}, which is {math.ceil(checkpoint_bytes / ratio)} bytes, is certain to be met"


def _certain_ratio(tensor: TensorPlan, method: MethodConfig) -> float:
    """Return the ratio up to which a tensor's budget is certain to hold its smallest record."""
    return tensor.dense_bytes / _least_bytes(tensor, method) / _MOST_COMPENSATION


def _least_bytes(tensor: TensorPlan, method: MethodConfig) -> int:
    rows, columns = tensor.shape[-2:]
    return tensor.matrices * method_for(method, tensor.vocabulary).least_bytes(rows, columns)


def _fixed_bytes(tensors: list[TensorPlan]) -> int:
    total = 8 * (len(tensors) + 1) + 3 * _ENTRY_BYTES  # checksum tables, file metadata
    for t in tensors:
        total += _entries(t) * (_name_bytes(t) + _ENTRY_BYTES + 4)  # 4 bytes of CRC per entry
        total += t.added_bytes + {"kept": t.dense_bytes, "exact": t.max_bytes}.get(t.kind, 0)
    return total


def _split_bytes(tensors: list[TensorPlan], total: float, max_shard_size: int) -> int:
    """Return the bytes that splitting adds: the index, and each further file's header and checksum table."""
    if total <= max_shard_size:
        return 0
    # Two successive files are together larger than `max_shard_size`.
    files = min(1 + sum(map(_entries, tensors)), 2 * math.ceil(total / max_shard_size))
    return (files + 1) * 2 * _ENTRY_BYTES + sum(_entries(t) * (_name_bytes(t) + _ENTRY_BYTES) for t in tensors)


def _entries(tensor: TensorPlan) -> int:
    return (tensor.kind != "equal") + (tensor.added_rows > 0)


def _name_bytes(tensor: TensorPlan) -> int:
    return len(json.dumps(tensor.name))  # JSON escapes characters that are not ASCII
