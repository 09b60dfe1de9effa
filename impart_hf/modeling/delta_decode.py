"""Decoding a record to the delta of its matrix: unpacking, planes, and the product U diag(sigma) V^T.

All arithmetic is float32. The product is dense although most entries of U and V are zeros: a multiply-add of a sparse
product costs 5 to 40 times as much, which pays if fewer than a tenth of the entries are kept, but not if a fifth is
(scripts/benchmark_load.py prints the factor).
"""

from collections.abc import Callable

import numpy as np
import torch

from .base_tensors import finite_where_base_is
from .checkpoints import all_finite
from .codebook import CODEBOOKS, Floats
from .delta_record import FACTORED, DeltaFormatError, Record, parse_record
from .factors import DirectDelta, Factors, MatrixDelta
from .packed_tables import kernels_wanted
from .planes import KeptEntries, Plane, Run
from .precision import full_float32

# Rows of a matrix that are decoded and added to the base at once on a CPU. More rows need more memory and are no
# faster; with fewer the product is slower (with 128 by a tenth to a quarter).
TILE_ROWS = 512
# The same on an accelerator, which is busy with this many; all rows of an output projection would take gigabytes.
DEVICE_TILE_ROWS = 8192
_ALL = slice(None)


def _side_values(packed: torch.Tensor, width: int, per_column: np.ndarray, scales: np.ndarray | None) -> torch.Tensor:
    """Return the float32 values of one side of one segment; `per_column` is the number kept in each column."""
    values = CODEBOOKS[width].unpack(packed, int(per_column.sum()))
    if scales is None:
        return values
    repeats = torch.from_numpy(per_column).to(packed.device)
    return values * torch.from_numpy(scales.astype(np.float32)).to(packed.device).repeat_interleave(repeats)


def decode_planes(record: Record, name: str, device: torch.device | str = "cpu") -> list[Plane]:
    """Decode the planes of a record on `device`: [U, V] if it is factored, [P] if it is direct.

    Raises:
        DeltaFormatError: if there are not as many codes as kept entries, or a value is not finite.
    """
    kept = [KeptEntries(record, side, device) for side in range(record.sides)]
    codes = torch.from_numpy(np.array(record.codes)).to(device)
    runs: list[list[Run]] = [[] for _ in kept]
    at = start = 0
    for segment, scales in zip(record.segments, record.column_scales, strict=True):
        stop = start + segment.columns
        for side, width in enumerate(segment.widths()):
            per_column = kept[side].counts[start:stop]
            size = CODEBOOKS[width].packed_bytes(int(per_column.sum()))
            if at + size > len(codes):
                raise DeltaFormatError(f"{name}: {len(codes)} bytes of codes are fewer than the masks need")
            side_scales = None if scales is None else scales[side]
            values = _side_values(codes[at : at + size], width, per_column, side_scales)
            # A level times a finite column scale is finite, so only floats need the check.
            if isinstance(CODEBOOKS[width], Floats) and not all_finite(values):
                raise DeltaFormatError(f"{name}: a stored value is not finite")
            runs[side] += kept[side].runs(start, stop, values)
            at += size
        start = stop
    if at != len(codes):
        raise DeltaFormatError(f"{name}: {len(codes)} bytes of codes are more than the {at} that the masks need")
    rows = [record.plane_rows(side) for side in range(record.sides)]
    no_values = torch.empty(0, device=device)
    return [
        Plane(record.plane_columns, length, side_runs or [Run(0, length, no_values, None)])
        for length, side_runs in zip(rows, runs, strict=True)
    ]


def _row_deltas(
    record: Record, name: str, device: torch.device | str, columns: slice = _ALL
) -> Callable[[slice], MatrixDelta]:
    """Return a function that returns the delta of a range of the matrix's rows, in some of its columns."""
    planes = decode_planes(record, name, device)
    if record.layout != FACTORED:  # its plane is as large as the matrix, so only the rows are made dense
        return lambda rows: DirectDelta(planes[0].select(rows).dense()[:, columns], record.scale)
    sigma = torch.from_numpy(record.sigma.astype(np.float32) * np.float32(record.scale)).to(device)
    return Factors(planes[0].dense(), sigma, planes[1].dense()[:, columns]).select


def matrix_delta(record: Record, name: str, device: torch.device | str = "cpu") -> MatrixDelta:
    """Decode a record on a device without multiplying its factors; errors as for `decode_planes`."""
    return _row_deltas(record, name, device)(slice(0, record.rows))


@full_float32()
def decode_record(record: Record, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """Decode a record to the dense delta: float32, shape (rows, columns), on `device`."""
    zeros = torch.zeros(record.rows, record.columns, dtype=torch.float32, device=device)
    return matrix_delta(record, name, device).add_to(zeros)


@full_float32()
def add_delta(
    base: torch.Tensor, data: np.ndarray, name: str, dtype: torch.dtype, kernels: bool | None = None
) -> torch.Tensor:
    """Return base plus decoded delta, summed in float32 and rounded once to `dtype`.

    Args:
        base: shape (m, n), or (s, m, n) for a stack of s matrices, on the device to decode on.
        data: uint8: the tensor's record, or its s records one after the other.
        name: the tensor's name, for messages.
        dtype: the fine-tuned tensor's dtype.
        kernels: whether Triton kernels decode, if they can; None for `packed_tables.kernels_wanted`.

    Raises:
        DeltaFormatError: if the records do not fit the base's shape or do not end where the data ends, or the result
            is not finite where the base is.
    """
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    decoder = None
    if kernels_wanted(base.device) if kernels is None else kernels:
        from .triton_decode import decoder_for  # importing Triton takes a second, which a CPU need not spend

        decoder = decoder_for(base, dtype)
    at = 0
    for target, matrix in zip(_matrices(out), _matrices(base), strict=True):
        record, length = parse_record(data[at:], (matrix.shape[0], matrix.shape[1]), name)
        (decoder.add_record if decoder else _add_record)(target, matrix, record, name)
        at += length
    if at != len(data):
        raise DeltaFormatError(f"{name}: {len(data) - at} bytes follow the last record")
    if decoder and not decoder.finite():
        return add_delta(base, data, name, dtype, kernels=False)  # it says what is not finite
    return out


@full_float32()
def add_delta_part(
    base: torch.Tensor,
    data: np.ndarray,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    rows: slice,
    columns: slice,
) -> torch.Tensor:
    """Return a part of a matrix's base plus decoded delta, as `add_delta` would: `add_delta(…)[rows, columns]`.

    Args:
        base: the base's part, on the device to decode on.
        data: uint8: the matrix's record.
        name, dtype: as for `add_delta`.
        shape: the matrix's shape.
        rows, columns: the part, as slices with non-negative bounds.

    Raises:
        DeltaFormatError: as for `add_delta`.
    """
    record, length = parse_record(data, shape, name)
    if length != len(data):
        raise DeltaFormatError(f"{name}: {len(data) - length} bytes follow the last record")
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    _add_record(out, base, record, name, rows.start, columns)
    return out


def _add_record(
    out: torch.Tensor, base: torch.Tensor, record: Record, name: str, first_row: int = 0, columns: slice = _ALL
) -> None:
    """Write base plus decoded delta to `out`: all of the matrix, or the part that begins in a row, in some columns."""
    delta_of = _row_deltas(record, name, base.device, columns)
    step = TILE_ROWS if base.device.type == "cpu" else DEVICE_TILE_ROWS
    for start in range(0, len(base), step):
        stop = min(start + step, len(base))
        tile = base[start:stop].to(torch.float32, copy=True)
        delta_of(slice(first_row + start, first_row + stop)).add_to(tile)
        out[start:stop].copy_(tile)
        if not finite_where_base_is(out[start:stop], base[start:stop]):
            raise DeltaFormatError(f"{name} decodes to NaN or infinity in {out.dtype}")


def _matrices(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor] if tensor.dim() == 2 else list(tensor.flatten(0, -3))
