"""The delta of a linear layer's weight as something that multiplies the layer's inputs."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..modeling.delta_decode import matrix_delta
from ..modeling.delta_record import Record, parse_record
from ..modeling.factors import DirectDelta
from ..modeling.packed_deltas import PackedDeltas, RowGroups
from ..modeling.precision import full_float32


class LinearDelta(Protocol):
    """What a delta adds to a linear layer's outputs."""

    def add_to(self, outputs: Tensor, inputs: Tensor) -> None:
        """Add to outputs (rows, out_features), in place, what inputs (rows, in_features) give; both contiguous."""


class _Dense:
    """A delta that was decoded once: matrices that the inputs are multiplied by, one after the other."""

    def __init__(self, matrices: Sequence[Tensor]):
        self._matrices = matrices

    def add_to(self, outputs: Tensor, inputs: Tensor) -> None:
        *first, last = self._matrices
        for matrix in first:
            inputs = inputs.to(matrix.dtype) @ matrix
        outputs.add_(inputs.to(last.dtype) @ last)


class _Packed:
    """A delta that stays as it is in the file, multiplied by kernels or decoded each time."""

    def __init__(self, record: Record, name: str, device: torch.device):
        self._deltas = PackedDeltas([record], name, device)

    def add_to(self, outputs: Tensor, inputs: Tensor) -> None:
        rows = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        self._deltas.add_to(outputs, inputs, RowGroups.of(rows, 1))


class _PackedTransposed:
    """A packed delta of a weight that is stored as (in_features, out_features), for which there is no kernel."""

    def __init__(self, record: Record, name: str, device: torch.device):
        self._record, self._name = record, name
        matrix_delta(record, name, device)  # it raises what is wrong with the record

    @full_float32()
    def add_to(self, outputs: Tensor, inputs: Tensor) -> None:
        outputs.add_(inputs.float() @ matrix_delta(self._record, self._name, inputs.device).matrix())


def linear_delta(
    data: np.ndarray,
    shape: tuple[int, int],
    name: str,
    *,
    transposed: bool,
    packed: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> LinearDelta:
    """Return the delta of a linear layer's weight.

    Args:
        data: uint8: the weight's record.
        shape: of the weight as stored: (out_features, in_features), or the other way round if `transposed`.
        name: the tensor's name, for messages.
        packed: whether it stays packed; otherwise it is decoded to two factors or one matrix, whichever is smaller.
        device: where the layer is.
        dtype: of what is decoded.

    Raises:
        DeltaFormatError: if the record is damaged or does not fit the shape.
    """
    record, _ = parse_record(data, shape, name)
    if packed:
        return (_PackedTransposed if transposed else _Packed)(record, name, device)
    with full_float32():
        delta = matrix_delta(record, name, device)
        if isinstance(delta, DirectDelta) or len(delta.sigma) * sum(shape) >= shape[0] * shape[1]:
            matrices = [delta.matrix()]
        else:
            matrices = [delta.u.t() * delta.sigma, delta.v]  # (m, rank), (rank, n)
    if not transposed:
        matrices = [matrix.t() for matrix in matrices[::-1]]
    return _Dense([matrix.to(dtype).contiguous() for matrix in matrices])
