"""The scan of a pair: which tensors changed, and their checksums."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..coding.exact_encoder import encode_exact
from ..common import processes
from ..common.progress import Progress
from ..modeling.base_tensors import BaseTensors
from ..modeling.checkpoints import DTYPE_NAMES, SAFETENSORS_DTYPES, all_finite, same_values
from ..modeling.checksums import tensor_bytes, tensor_checksum
from ..modeling.tensors import Model
from .compatibility import IncompatibleModelsError, is_matrix_shape, vocabulary_size
from .exact_names import NONE, ExactNames
from .stages import SCANNING

# The squares of larger numbers, summed over a column, overflow in float32.
_LARGEST = 1e15
# Share of a tensor's numbers: if more changed, its exact record has more than half a bit for each.
_SPARSE = 1 / 8
# What a sampled scan reads of a tensor at most, in how many places.
_SAMPLED_BYTES, _PLACES = 64 << 10, 16


@dataclass
class TensorPlan:
    """How one fine-tuned tensor is stored.

    Attributes:
        name: the tensor's name.
        kind: "equal" (to the base, and not stored), "kept" (stored whole), "exact" or "encoded".
        shape: shape of the part that base and fine-tune share.
        dtype: dtype of the fine-tuned tensor.
        vocabulary: whether it has a row for every token: an embedding or output projection.
        added_rows: number of rows beyond the base's.
        max_bytes: byte budget of the tensor's records, for "encoded"; size of its exact record, for "exact", if there
            are budgets.
        exact_bytes: size of the exact record of a tensor to encode of which few numbers changed; 0 if it is not known.
        base_checksum, checksum: checksums of the base's and of the fine-tuned tensor.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    vocabulary: bool = False
    added_rows: int = 0
    max_bytes: int = 0
    exact_bytes: int = 0
    base_checksum: int = 0
    checksum: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in types that JSON can hold."""
        return dataclasses.asdict(self) | {"dtype": DTYPE_NAMES[self.dtype]}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TensorPlan":
        """Return the plan that `to_dict` gave these fields."""
        own = {"shape": tuple(fields["shape"]), "dtype": SAFETENSORS_DTYPES[fields["dtype"]]}
        return cls(**(fields | own))

    @property
    def dense_bytes(self) -> int:
        """Bytes of the shared part in the fine-tuned checkpoint."""
        return element_count(self.shape) * self.dtype.itemsize

    @property
    def added_bytes(self) -> int:
        return self.added_rows * element_count(self.shape[1:]) * self.dtype.itemsize

    @property
    def matrices(self) -> int:
        """Number of matrices in the stack; 1 for a plain matrix."""
        return element_count(self.shape[:-2])

    @property
    def work(self) -> float:
        """What decomposing its matrices takes, relative to other tensors: m n min(m, n) each."""
        return float(element_count(self.shape)) * min(self.shape[-2:])


def element_count(shape: tuple[int, ...]) -> int:
    """Return how many elements a tensor of this shape has."""
    return torch.Size(shape).numel()


def order_to_take(tensors: list[TensorPlan]) -> list[TensorPlan]:
    """Return tensors in the order in which the processes of a job take them: those that take longest first."""
    if not processes.is_distributed():
        return tensors
    return sorted(tensors, key=lambda t: t.dense_bytes * min(t.shape[-2:], default=1), reverse=True)


def scan(base: BaseTensors, finetuned: Model, progress: Progress, exact: ExactNames) -> list[TensorPlan]:
    """Read both models once: find equal tensors, compute checksums, and check that all values that differ are finite.

    Several processes share the tensors out.

    Raises:
        IncompatibleModelsError: if a tensor holds NaN or infinity where base and fine-tune differ.
    """

    def size(name: str) -> int:
        return element_count(finetuned.shape(name))

    own = processes.share(finetuned.names(), size)
    tokens = vocabulary_size(finetuned)
    scanned = processes.together(
        lambda: [scan_tensor(name, base, finetuned, tokens, exact) for name in progress.track(own, SCANNING, size)]
    )
    return sorted(itertools.chain(*scanned), key=lambda plan: plan.name)


def scan_tensor(
    name: str, base: BaseTensors, finetuned: Model, tokens: int | None, exact: ExactNames = NONE
) -> TensorPlan:
    """Scan one tensor; see `scan`.

    Args:
        tokens: size of the vocabulary.
        exact: the tensors to store exactly. Any bits of theirs differ, and may be NaN.
    """
    (whole, base_checksum), after = base.whole_and_checksum(name), finetuned.tensor(name)
    before = base.shared(name, whole)
    shared, added = _parts(before, after)
    is_exact = name in exact
    equal = _comparable(before, after) and (_same_bits if is_exact else same_values)(before.to(after.dtype), shared)
    if not equal and not is_exact:
        rows: Any = ...
        if _is_vocabulary(after, tokens) and not (all_finite(before) and all_finite(shared)):
            rows = _differing_rows(before.to(after.dtype), shared)
        _check_numbers(before[rows], f"{name} of '{base.source}'", _is_matrix(before))
        _check_numbers(shared[rows], f"{name} of '{finetuned.source}'", _is_matrix(before))
    _check_numbers(added, f"{name} of '{finetuned.source}'", False)
    found = _plan(name, before, after, equal, _is_vocabulary(after, tokens))
    # Readers take the dtype of an integer tensor from the base, so that one of another dtype is kept.
    if is_exact and not equal and _comparable(before, after):
        size = 0 if exact.are_all else len(encode_exact(before, shared))  # then there is no budget
        found = dataclasses.replace(found, kind="exact", max_bytes=size)
    elif found.kind == "encoded" and _is_sparse(before, shared):
        found = dataclasses.replace(found, exact_bytes=len(encode_exact(before, shared)))
    return dataclasses.replace(found, base_checksum=base_checksum, checksum=tensor_checksum(after))


def sampled_scan(base: BaseTensors, finetuned: Model) -> list[TensorPlan]:
    """Find equal tensors by a few places of each, without checksums; of files that are mapped, little more is read.

    A tensor that differs elsewhere only passes for equal.
    """
    plans, tokens = [], vocabulary_size(finetuned)
    for name in finetuned.names():
        before, after = base.tensor(name), finetuned.tensor(name)
        equal = _comparable(before, after) and _same_in_places(before, _parts(before, after)[0])
        plans.append(_plan(name, before, after, equal, _is_vocabulary(after, tokens)))
    return plans


def _parts(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a fine-tuned tensor into the part that the base shares and the rows added to it."""
    return (after[: before.shape[0]], after[before.shape[0] :]) if before.dim() else (after, after[None][:0])


def _comparable(before: torch.Tensor, after: torch.Tensor) -> bool:
    # Readers convert floats to the fine-tune's dtype, and leave integers unchanged.
    return after.is_floating_point() or before.dtype == after.dtype


def _same_bits(before: torch.Tensor, after: torch.Tensor) -> bool:
    return before.shape == after.shape and np.array_equal(tensor_bytes(before), tensor_bytes(after))


def _is_sparse(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Return whether so few numbers changed that an exact record may be smaller than a lossy one."""
    return int((before.to(after.dtype) != after).count_nonzero()) <= _SPARSE * after.numel()


def _is_vocabulary(after: torch.Tensor, tokens: int | None) -> bool:
    return after.dim() == 2 and after.shape[0] == tokens


def _same_in_places(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Return whether two tensors of one shape have the same values in places that are evenly spaced."""
    one, other = before.reshape(-1), after.reshape(-1)
    count = _SAMPLED_BYTES // _PLACES // other.element_size()
    starts = range(0, len(other), max(count, len(other) // _PLACES))
    return all(
        same_values(one[start : start + count].to(other.dtype), other[start : start + count]) for start in starts
    )


def _plan(name: str, before: torch.Tensor, after: torch.Tensor, equal: bool, vocabulary: bool) -> TensorPlan:
    return TensorPlan(
        name=name,
        kind="equal" if equal else "encoded" if _is_matrix(before) else "kept",
        shape=tuple(before.shape),
        dtype=after.dtype,
        vocabulary=vocabulary,
        added_rows=len(_parts(before, after)[1]),
    )


def _differing_rows(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return which rows of two matrices differ: bool (rows). Padding may hold NaN, the same in both."""
    return ~((before == after) | (before.isnan() & after.isnan())).all(dim=1)


def _check_numbers(tensor: torch.Tensor, name: str, has_delta: bool) -> None:
    if not tensor.is_floating_point() or not tensor.numel():
        return
    if not all_finite(tensor):
        raise IncompatibleModelsError(f"{name} holds NaN or infinity: its weights are damaged")
    if has_delta and max(map(abs, torch.stack(tensor.aminmax()).tolist())) > _LARGEST:
        raise IncompatibleModelsError(f"{name} holds numbers beyond {_LARGEST:g}, for which no delta can be computed")


def _is_matrix(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a floating-point matrix, or a stack of such, large enough to be encoded."""
    return tensor.is_floating_point() and is_matrix_shape(tuple(tensor.shape))
