"""The comparison of one tensor with the part that its base has, a few million entries at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..coding.spectrum import singular_values
from ..compression.budgets import ZERO_DELTA, embedding_weight
from ..compression.compatibility import is_matrix_shape, vocabulary_size
from ..methods import Spectrum
from ..modeling.base_tensors import BaseTensors
from ..modeling.checkpoints import all_finite
from ..modeling.exact_record import matrix_shape
from ..modeling.ordered_bits import rounded
from ..modeling.tensors import Model
from .exact_bits import exact_bits
from .tensor_diff import TensorDiff

LEADING = (16, 64, 256)  # numbers of components whose share of the squared norm is told
_CHUNK = 1 << 22  # entries that are looked at together
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_diff(
    name: str, base: BaseTensors, finetuned: Model, device: torch.device, with_spectra: bool = True
) -> TensorDiff:
    """Compare one tensor of a pair, on a device.

    Raises:
        CheckpointError, DeltaFormatError, WrongBaseError: if one of the two cannot be read.
    """
    after = finetuned.tensor(name, device)
    before = base.tensor(name, device)
    vocabulary = after.dim() == 2 and after.shape[0] == vocabulary_size(finetuned)
    return compared(name, before, after, vocabulary, with_spectra)


def compared(
    name: str, before: torch.Tensor, after: torch.Tensor, vocabulary: bool = False, with_spectra: bool = True
) -> TensorDiff:
    """Compare a tensor with the part that its base has.

    Args:
        before: the base's tensor, in its own dtype.
        after: the fine-tune's, of the base's shape or with more rows; on the same device.
        vocabulary: whether it has a row for every token.
        with_spectra: whether singular values are computed.
    """
    shape = tuple(before.shape)
    shared, added = (after[: shape[0]], after.shape[0] - shape[0]) if shape else (after, 0)
    with_spectra = with_spectra and after.is_floating_point() and is_matrix_shape(shape)
    totals, spectra = _Totals(), []
    for old, new in zip(_matrices(before), _matrices(shared), strict=True):
        own = _Totals()
        delta = None  # made once there is a change: for equal tensors, which may be large, it need not be
        for start, before_rows, after_rows in _rows(old, new):
            change = own.add(before_rows, after_rows)
            if with_spectra and own.changed:
                delta = torch.zeros(old.shape, device=old.device) if delta is None else delta
                delta[start : start + len(change)] = change
        if delta is not None and float(delta.abs().max()) > ZERO_DELTA:
            spectra.append(_spectrum(old, delta, own, vocabulary))
        totals.join(own)
    return TensorDiff(
        name=name,
        shape=shape,
        base_dtype=before.dtype,
        dtype=after.dtype,
        vocabulary=vocabulary,
        changed=totals.changed,
        changed_rows=totals.changed_rows if len(shape) > 1 else None,
        nonfinite=totals.nonfinite,
        added_rows=added,
        norm=math.sqrt(totals.square),
        base_norm=math.sqrt(totals.base_square),
        largest=totals.largest,
        bits=exact_bits(before, shared) / max(1, before.numel()),
        stable_rank=sum(s.energy / float(s.sigma[0]) ** 2 for s in spectra) / len(spectra) if spectra else None,
        leading=_leading(spectra),
        spectra=tuple(spectra),
    )


@dataclass
class _Totals:
    """Sums over a part of a tensor; see `TensorDiff`. The squares are of norms, `after_square` of the fine-tune's."""

    changed: int = 0
    changed_rows: int = 0
    nonfinite: int = 0
    square: float = 0.0
    base_square: float = 0.0
    after_square: float = 0.0
    largest: float = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Add rows (r, n), and return their change: float64, or float32 of numbers of 16 bits or fewer; all finite."""
        before = _in_dtype_of(after, before)
        differs = _bits(before) != _bits(after)
        wide = torch.float64 if max(before.itemsize, after.itemsize) > 2 else torch.float32
        old, new = before.to(wide), after.to(wide)
        change = new - old
        if not all_finite(change):
            finite = old.isfinite() & new.isfinite()
            self.nonfinite += int((differs & ~finite).sum())
            change, old, new = (part.where(finite, 0.0) for part in (change, old, new))
        self.changed += int(differs.sum())
        self.changed_rows += int(differs.any(dim=1).sum())
        self.square += _square(change)
        self.base_square += _square(old)
        self.after_square += _square(new)
        self.largest = max(self.largest, float(change.abs().max()))
        return change

    def join(self, other: "_Totals") -> None:
        """Add the sums over another part."""
        largest = max(self.largest, other.largest)
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        self.largest = largest


def _matrices(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a stack of matrices (b, m, n): of one unless it is a stack; of one row if it has one axis."""
    if tensor.dim() == 3 and is_matrix_shape(tuple(tensor.shape)):
        return tensor
    shape = matrix_shape(tuple(tensor.shape)) if tensor.dim() > 1 else (1, tensor.numel())
    return tensor.reshape(1, *shape)


def _rows(*matrices: torch.Tensor) -> Iterator[tuple]:
    """Yield matrices of one shape by blocks of rows, each with the number of the first row; nothing of empty ones."""
    rows, columns = matrices[0].shape
    block = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows if columns else 0, block):
        yield start, *(matrix[start : start + block] for matrix in matrices)


def _in_dtype_of(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return a base's numbers rounded to a fine-tune's dtype; integers of other sizes are converted."""
    return rounded(before, after.dtype) if after.is_floating_point() else before.to(after.dtype)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(_INTEGERS[tensor.itemsize])


def _square(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _spectrum(base: torch.Tensor, delta: torch.Tensor, totals: _Totals, vocabulary: bool) -> Spectrum:
    """Return what the share of a matrix in a byte budget depends on."""
    sigma = singular_values(delta)
    return Spectrum(
        sigma,
        delta.shape[0],
        delta.shape[1],
        float((sigma**2).sum()),
        vocabulary,
        embedding_weight(base, delta) if vocabulary else 1.0,
        math.sqrt(totals.square / totals.after_square) if totals.after_square else math.inf,
    )


def _leading(spectra: list[Spectrum]) -> dict[int, float]:
    """Return the share of the leading components in the squared norm of matrices."""
    whole = sum(spectrum.energy for spectrum in spectra)
    return {n: sum(float((s.sigma[:n] ** 2).sum()) for s in spectra) / whole for n in LEADING} if whole else {}
