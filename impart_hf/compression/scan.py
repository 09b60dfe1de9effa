"""The scan of a pair: which tensors changed, and their checksums."""

from dataclasses import dataclass

import torch

from ..common.progress import Progress
from ..modeling.checkpoints import Checkpoint, all_finite
from ..modeling.checksums import tensor_checksum
from .compatibility import IncompatibleModelsError, check_tied_output, is_matrix_shape

# The squares of larger numbers, summed over a column, overflow in float32.
_LARGEST = 1e15


@dataclass
class TensorPlan:
    """How one fine-tuned tensor is stored.

    Attributes:
        name: the tensor's name.
        kind: "equal" (to the base, and not stored), "kept" (stored unchanged) or "encoded".
        shape: shape of the part that base and fine-tune share.
        dtype: dtype of the fine-tuned tensor.
        vocabulary: whether it has a row for every token: an embedding or output projection.
        added_rows: number of rows beyond the base's.
        max_bytes: byte budget of the tensor's records, for "encoded".
        base_checksum, checksum: checksums of the base's and of the fine-tuned tensor.
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
        return element_count(self.shape) * self.dtype.itemsize

    @property
    def added_bytes(self) -> int:
        return self.added_rows * element_count(self.shape[1:]) * self.dtype.itemsize

    @property
    def matrices(self) -> int:
        """Number of matrices in the stack; 1 for a plain matrix."""
        return element_count(self.shape[:-2])


def element_count(shape: tuple[int, ...]) -> int:
    """Return how many elements a tensor of this shape has."""
    return torch.Size(shape).numel()


def scan(base: Checkpoint, finetuned: Checkpoint, progress: Progress) -> list[TensorPlan]:
    """Read both checkpoints once: find equal tensors, compute checksums, and check that all values are finite.

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
        # Readers convert floats to the fine-tune's dtype, and leave integers unchanged.
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


def _check_numbers(tensor: torch.Tensor, name: str) -> None:
    if not tensor.is_floating_point():
        return
    if not all_finite(tensor):
        raise IncompatibleModelsError(f"{name} holds NaN or infinity: its weights are damaged")
    if _is_matrix(tensor) and max(map(abs, torch.stack(tensor.aminmax()).tolist())) > _LARGEST:
        raise IncompatibleModelsError(f"{name} holds numbers beyond {_LARGEST:g}, for which no delta can be computed")


def _is_matrix(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a floating-point matrix, or a stack of such, large enough to be encoded."""
    return tensor.is_floating_point() and is_matrix_shape(tuple(tensor.shape))
