"""Deciding, before any work, what becomes of every tensor and how many bytes each may take."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from .methods import MethodConfig, method_for
from .modeling.checkpoints import DTYPE_NAMES, TIED_OUTPUT, Checkpoint, all_finite
from .modeling.checksums import tensor_checksum
from .modeling.configuration_delta_compressed import FORMAT_VERSION
from .modeling.delta_repository import BASE_CHECKSUMS, CRC_ENTRY, RECORD_SUFFIX, ROWS_SUFFIX
from .progress import Progress

# Matrices of fewer entries than this are kept as they are: a record of them would be mostly header.
_SMALL_MATRIX = 4096
# Bytes of a safetensors header for one entry, beside its name: dtype, shape and two offsets of ten digits.
_ENTRY_BYTES = 96
# A matrix may be compressed beyond the ratio asked for, to make up for what cannot be, by up to this factor.
_MOST_EXTRA = 1.5
# Squares of larger numbers, summed over a column, leave float32's range.
_LARGEST = 1e15
_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class IncompatibleModelsError(ValueError):
    """Base and fine-tuned model are not a pair that a delta can be made of."""


@dataclass
class TensorPlan:
    """What becomes of one fine-tuned tensor.

    Attributes:
        kind: "equal" (to the base; costs nothing), "kept" (stored as it is) or "encoded".
        shape: of the part that base and fine-tune share.
        dtype: of the fine-tuned tensor.
        vocabulary: whether it has a row for every token: an embedding or output projection.
        added_rows: rows that the fine-tune has beyond the base's.
        max_bytes: budget of the tensor's records, for "encoded".
        base_checksum, checksum: of the base's and of the fine-tuned tensor.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    vocabulary: bool = False
    added_rows: int = 0
    max_bytes: int = 0
    base_checksum: int = 0
    checksum: int = 0

    @property
    def dense_bytes(self) -> int:
        """Bytes of the shared part in the fine-tuned checkpoint."""
        return _numel(self.shape) * self.dtype.itemsize

    @property
    def added_bytes(self) -> int:
        return self.added_rows * _numel(self.shape[1:]) * self.dtype.itemsize

    @property
    def matrices(self) -> int:
        """How many matrices it is a stack of."""
        return _numel(self.shape[:-2])


@dataclass
class CompressionPlan:
    """The plan of a whole repository.

    Attributes:
        tensors: by name, sorted.
        checkpoint_bytes: size on disk of the fine-tuned checkpoint's weight files.
        allowed_bytes: what the repository may take at the requested ratio.
        fixed_bytes: what it takes whatever the method does: kept tensors, added rows, headers, config and card.
    """

    tensors: list[TensorPlan]
    checkpoint_bytes: int
    allowed_bytes: int
    fixed_bytes: int

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


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def check_pair(base: Checkpoint, finetuned: Checkpoint) -> None:
    """Compare architectures, names and shapes; only headers are read.

    Raises:
        IncompatibleModelsError: naming the first difference.
    """
    types = base.config.get("model_type"), finetuned.config.get("model_type")
    if types[0] != types[1]:
        advice = "; give the pruned model that it was trained from as the base" if types[1] == "pruned_llama" else ""
        raise IncompatibleModelsError(f"the base is a '{types[0]}' model, the fine-tune a '{types[1]}' model{advice}")
    base_names, names = set(base.names()), set(finetuned.names())
    if base_names != names:
        lost, extra = sorted(base_names - names), sorted(names - base_names)
        what = f"lacks {lost[0]}" if lost else f"has {extra[0]}, which the base lacks"
        raise IncompatibleModelsError(
            f"'{finetuned.source}' is not a fine-tune of '{base.source}': it {what} "
            f"({len(lost)} tensors missing, {len(extra)} extra)"
        )
    _check_names(finetuned)
    for name in finetuned.names():
        for checkpoint in (base, finetuned):
            dtype = checkpoint.dtype(name)
            if dtype not in DTYPE_NAMES or (dtype.is_floating_point and dtype not in _FLOAT_DTYPES):
                raise IncompatibleModelsError(f"'{checkpoint.source}': {name} has the unsupported dtype {dtype}")
        if base.dtype(name).is_floating_point != finetuned.dtype(name).is_floating_point:
            raise IncompatibleModelsError(
                f"{name} has dtype {finetuned.dtype(name)} in '{finetuned.source}' and {base.dtype(name)} in "
                f"'{base.source}'"
            )
        ours, theirs = finetuned.shape(name), base.shape(name)
        if ours != theirs and not _grew(finetuned, name, ours, theirs):
            raise IncompatibleModelsError(
                f"{name} has shape {list(ours)} in '{finetuned.source}' and {list(theirs)} in '{base.source}'; only "
                "embeddings and output projection may differ, by rows added to the vocabulary"
            )


def _check_names(checkpoint: Checkpoint) -> None:
    names = checkpoint.names()
    if not any(checkpoint.dtype(name).is_floating_point for name in names):
        raise IncompatibleModelsError(f"'{checkpoint.source}' holds no weights")
    reserved = {BASE_CHECKSUMS, CRC_ENTRY, *(n + suffix for n in names for suffix in (RECORD_SUFFIX, ROWS_SUFFIX))}
    if taken := sorted(reserved & set(names)):
        raise IncompatibleModelsError(
            f"'{checkpoint.source}' has a tensor named {taken[0]}, which the delta format uses itself"
        )


def _grew(finetuned: Checkpoint, name: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """Whether the tensor's first axis is a vocabulary that has grown."""
    vocabulary = finetuned.config.get("vocab_size")
    return len(ours) == len(theirs) == 2 and ours[1] == theirs[1] and theirs[0] < ours[0] == vocabulary


def scan(base: Checkpoint, finetuned: Checkpoint, progress: Progress) -> list[TensorPlan]:
    """Read both checkpoints once: find what is equal, take checksums, refuse what is not finite.

    Raises:
        IncompatibleModelsError: if a tensor holds NaN or infinity, or a stored output projection would be lost.
    """
    check_tied_output(finetuned)
    plans = []
    names = finetuned.names()
    for name in progress.track(names, "Scanning"):
        before, after = base.tensor(name), finetuned.tensor(name)
        for source, tensor in ((base.source, before), (finetuned.source, after)):
            _check_numbers(tensor, f"{name} of '{source}'")
        shared = after[: before.shape[0]] if before.dim() else after
        # Readers convert floats to the fine-tune's dtype, and leave whole numbers as they are.
        comparable = after.is_floating_point() or before.dtype == after.dtype
        equal = comparable and torch.equal(before.to(after.dtype), shared)
        plans.append(
            TensorPlan(
                name=name,
                kind="equal" if equal else "encoded" if _is_matrix(before) else "kept",
                shape=tuple(before.shape),
                dtype=after.dtype,
                vocabulary=after.dim() == 2 and after.shape[0] == finetuned.config.get("vocab_size"),
                added_rows=after.shape[0] - before.shape[0] if before.dim() else 0,
                base_checksum=tensor_checksum(before),
                checksum=tensor_checksum(after),
            )
        )
    return plans


def check_tied_output(checkpoint: Checkpoint) -> None:
    """See that a tied checkpoint stores no output projection of its own, which nobody would read.

    Raises:
        IncompatibleModelsError: if it does.
    """
    if checkpoint.has_untied_output():
        raise IncompatibleModelsError(
            f"config.json of '{checkpoint.source}' ties the output projection to the input embeddings, but its "
            f"{TIED_OUTPUT} is another matrix: set tie_word_embeddings to false there"
        )


def _check_numbers(tensor: torch.Tensor, name: str) -> None:
    if not tensor.is_floating_point():
        return
    if not all_finite(tensor):
        raise IncompatibleModelsError(f"{name} holds NaN or infinity")
    if _is_matrix(tensor) and max(map(abs, torch.stack(tensor.aminmax()).tolist())) > _LARGEST:
        raise IncompatibleModelsError(f"{name} holds numbers beyond {_LARGEST:g}, of which no delta can be taken")


def _is_matrix(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a matrix, or a stack of matrices, large enough to be encoded."""
    return tensor.is_floating_point() and is_matrix_shape(tuple(tensor.shape))


def is_matrix_shape(shape: tuple[int, ...]) -> bool:
    """Whether a shape is that of a matrix, or a stack of matrices, large enough for a method to work on."""
    return len(shape) in (2, 3) and shape[-1] * shape[-2] >= _SMALL_MATRIX


def make_plan(
    tensors: list[TensorPlan], method: MethodConfig, checkpoint_bytes: int, other_bytes: int, max_shard_size: int
) -> CompressionPlan:
    """Give every encoded tensor its budget, in proportion to its size.

    Args:
        tensors: from `scan`.
        checkpoint_bytes: size on disk of the fine-tuned checkpoint's weight files.
        other_bytes: of config.json and model card.
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
        fixed = other_bytes + _fixed_bytes(tensors)
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
    return CompressionPlan(tensors, checkpoint_bytes, allowed, fixed)


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
