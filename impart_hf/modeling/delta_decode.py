"""Decoding a record to the delta of its matrix, and adding the delta to the base.

All arithmetic is float32. The product is dense although most entries of U and V are zeros: a multiply-add of a sparse
product costs 5 to 40 times as much, which pays if fewer than a tenth of the entries are kept, but not if a fifth is
(scripts/benchmark_load.py prints the factor).
"""

import numpy as np
import torch

from .base_tensors import finite_where_base_is
from .compact_planes import compact_planes
from .delta_record import FACTORED, DeltaFormatError, Record, parse_record
from .factors import DirectDelta, Factors, MatrixDelta
from .packed_tables import kernels_wanted
from .planes import Plane, Run, stored_runs
from .precision import full_float32

# Rows of a matrix that are decoded and added to the base at once on a CPU. More rows need more memory and are no
# faster; with fewer the product is slower (with 128 by a tenth to a quarter).
TILE_ROWS = 512
# The same on an accelerator, which is busy with this many; all rows of an output projection would take gigabytes.
DEVICE_TILE_ROWS = 8192
# The memory of a product, in shares of the matrix in float32: U and V where they are not packed, with the columns of V
# that are decoded; and rows of the sum, with those of U. For each part of V's columns U is decoded again.
HELD_SHARE, LEAST_HELD_SHARE, TILE_SHARE = 1 / 5, 1 / 16, 1 / 16
# Entries that are decoded at once whatever the matrix's size.
LEAST_ENTRIES, DEVICE_LEAST_ENTRIES = 1 << 20, 1 << 25
LEAST_COLUMNS = 64
# Rows of a direct record are decoded by so many entries, which stay in a core's cache, or keep an accelerator busy.
DIRECT_ENTRIES, DEVICE_DIRECT_ENTRIES = 1 << 18, 1 << 25
_ALL = slice(None)


def decode_planes(record: Record, name: str, device: torch.device | str = "cpu") -> list[Plane]:
    """Decode the planes of a record on `device`: [U, V] if it is factored, [P] if it is direct.

    Raises:
        DeltaFormatError: if there are not as many codes as kept entries, or a value is not finite.
    """
    runs: list[list[Run]] = [[] for _ in range(record.sides)]
    for run in stored_runs(record, name, device):
        runs[run.side].append(run.decode(name))
    rows = [record.plane_rows(side) for side in range(record.sides)]
    no_values = torch.empty(0, device=device)
    return [
        Plane(record.plane_columns, length, side_runs or [Run(0, length, no_values, None)])
        for length, side_runs in zip(rows, runs, strict=True)
    ]


def _sigma(record: Record, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(record.sigma.astype(np.float32) * np.float32(record.scale)).to(device)


def matrix_delta(record: Record, name: str, device: torch.device | str = "cpu") -> MatrixDelta:
    """Decode a record on a device without multiplying its factors; errors as for `decode_planes`."""
    planes = decode_planes(record, name, device)
    if record.layout != FACTORED:
        return DirectDelta(planes[0].dense(), record.scale)
    return Factors(planes[0].dense(), _sigma(record, device), planes[1].dense())


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
    add = _add_product if record.layout == FACTORED else _add_entries
    add(out, base, record, name, first_row, range(record.columns)[columns])
    step = TILE_ROWS if base.device.type == "cpu" else DEVICE_TILE_ROWS
    for result, before in zip(out.split(step), base.split(step), strict=True):
        if not finite_where_base_is(result, before):
            raise DeltaFormatError(f"{name} decodes to NaN or infinity in {out.dtype}")


def _add_product(
    out: torch.Tensor, base: torch.Tensor, record: Record, name: str, first_row: int, columns: range
) -> None:
    """Do `_add_record` for a factored record, without checking the sum."""
    on_cpu, entries, rank = base.device.type == "cpu", record.rows * record.columns, record.rank
    u_plane, v_plane = compact_planes(record, name, base.device)
    sigma = _sigma(record, base.device)[:, None]
    least = LEAST_ENTRIES if on_cpu else DEVICE_LEAST_ENTRIES
    spread = (u_plane.spread_bytes() + v_plane.spread_bytes()) / 4
    held = max(least, LEAST_HELD_SHARE * entries, HELD_SHARE * entries - spread)
    width = _even_step(len(columns), int(held) // max(1, rank))
    most_rows = TILE_ROWS if on_cpu else DEVICE_TILE_ROWS
    height = min(most_rows, max(1, int(max(least, TILE_SHARE * entries)) // (width + rank)))
    # Made once: the system would clear their pages each time.
    v_memory, u_memory, tile_memory = (
        torch.empty(shape, dtype=torch.float32, device=base.device)
        for shape in (rank * width, rank * height, width * height)
    )
    for left in range(0, len(columns), width):
        part = slice(left, min(left + width, len(columns)))
        v = _view(v_memory, rank, part)
        v_plane.read(columns[part].start, v)
        for top in range(0, len(base), height):
            rows = slice(top, min(top + height, len(base)))
            u = _view(u_memory, rank, rows)
            u_plane.read(first_row + top, u).mul_(sigma)
            tile = _view(tile_memory, rows.stop - top, part).copy_(base[rows, part])
            out[rows, part] = tile.addmm_(u.t(), v)


def _view(memory: torch.Tensor, rows: int, columns: slice) -> torch.Tensor:
    """Return the first numbers as a matrix of so many rows and columns."""
    size = columns.stop - columns.start
    return memory[: rows * size].view(rows, size)


def _even_step(size: int, most: int) -> int:
    """Return the step that divides a size into equal parts of at most so many, but at least `LEAST_COLUMNS`."""
    parts = -(-size // max(LEAST_COLUMNS, most))
    return max(LEAST_COLUMNS, -(-size // max(1, parts)))


def _add_entries(
    out: torch.Tensor, base: torch.Tensor, record: Record, name: str, first_row: int, columns: range
) -> None:
    """Do `_add_record` for a direct record, without checking the sum."""
    most = DIRECT_ENTRIES if base.device.type == "cpu" else DEVICE_DIRECT_ENTRIES
    stop = 0
    for alike in stored_runs(record, name, base.device, most):
        for run in alike.pieces(most):
            start, stop = stop, stop + run.columns
            first, last = max(start, first_row), min(stop, first_row + len(base))
            if first < last:  # otherwise its entries were only counted
                values = run.decode(name).dense()[first - start : last - start, columns.start : columns.stop]
                rows = slice(first - first_row, last - first_row)
                tile = base[rows].to(torch.float32, copy=True)
                out[rows] = DirectDelta(values, record.scale).add_to(tile)


def _matrices(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor] if tensor.dim() == 2 else list(tensor.flatten(0, -3))
