"""The exact record: what a fine-tuned tensor differs from its base in, bit for bit (docs/FORMAT.md, "Exact records").

A number of the fine-tune is so many steps from the base's. How many is coded with the base's exponent as context, which
the reader knows: the change of a number is about as large for small numbers as for large ones, a step is not.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .checksums import tensor_bytes, tensor_checksum
from .coded_numbers import PART, CodedNumbers, decode_in_parts, decode_numbers, parse_numbers
from .delta_record import Cursor, DeltaFormatError
from .ordered_bits import exponents, has_steps, integers, moved, rounded
from .packed_tables import kernels_wanted

WHOLE, DENSE, SPARSE = 0, 1, 2  # codings: the bytes as they are, every number's steps, changed numbers and their gaps
SOME_ROWS, SOME_COLUMNS = 1, 2  # flags: only some are coded, and the others equal the base's

# Layout, coding, bytes of a number, flags; rows, columns; length of the record, checksum of the fine-tuned tensor.
_HEADER = struct.Struct("<BBBBIIQQ")
HEADER_BYTES = _HEADER.size
LAYOUT = 3


@dataclass(frozen=True)
class Gaps:
    """Where the changed numbers of a sparse record are.

    Attributes:
        changed: int64, how many changed numbers each class has.
        numbers: by class: how many unchanged numbers of the class are before each changed one.
    """

    changed: np.ndarray
    numbers: CodedNumbers


@dataclass(frozen=True)
class CodedSteps:
    """The steps of a tensor's numbers, parsed but not decoded.

    Attributes:
        row_gaps: the rows that are coded, as the number of rows between each and the one before; None if all are.
        column_gaps: the same of the columns.
        first_exponent, classes: the class of every exponent from the first on, uint8; smaller exponents have the first
            class, larger ones the last.
        gaps: where the changed numbers are, if the record is sparse.
        numbers: the steps of all numbers; if it is sparse, those of the changed ones by class, less 1.
    """

    row_gaps: CodedNumbers | None
    column_gaps: CodedNumbers | None
    first_exponent: int
    classes: np.ndarray
    gaps: Gaps | None
    numbers: CodedNumbers


@dataclass(frozen=True)
class ExactRecord:
    """An exact record, parsed but not decoded.

    Attributes:
        rows, columns: the tensor as a matrix: its last axis, and all others; one row if it has no others.
        checksum: of the fine-tuned tensor's part that the base shares (`checksums.tensor_checksum`).
        length: in bytes.
        content: the bytes of the tensor, or its steps.
    """

    rows: int
    columns: int
    checksum: int
    length: int
    content: np.ndarray | CodedSteps


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns that a tensor has as a matrix."""
    columns = shape[-1] if shape else 1
    return (torch.Size(shape).numel() // columns if columns else 0), columns


def pack_record(
    coding: int, item_bytes: int, flags: int, shape: tuple[int, ...], checksum: int, parts: list[bytes]
) -> bytes:
    """Return the bytes of an exact record whose header is followed by these parts."""
    length = _HEADER.size + sum(map(len, parts))
    rows, columns = matrix_shape(shape)
    return b"".join([_HEADER.pack(LAYOUT, coding, item_bytes, flags, rows, columns, length, checksum), *parts])


def _header(cursor: Cursor) -> tuple[int, ...]:
    return _HEADER.unpack(cursor.take("u1", _HEADER.size).tobytes())


def stated_shape(data: np.ndarray, name: str) -> tuple[int, int]:
    """Return the rows and columns that a record states, for reading it without its base."""
    fields = _header(Cursor(data, name))
    return fields[4], fields[5]


def stated_checksum(data: np.ndarray, name: str) -> int:
    """Return the checksum of the fine-tuned tensor that a record, of which the header is enough, states."""
    return _header(Cursor(data, name))[7]


def parse_exact(data: np.ndarray, shape: tuple[int, ...], item_bytes: int, name: str) -> ExactRecord:
    """Parse and check an exact record.

    Args:
        data: uint8, one axis, the record and nothing else.
        shape: of the tensor.
        item_bytes: of a number of the fine-tune.
        name: the tensor's name, for messages.

    Raises:
        DeltaFormatError: if any number in the record is invalid.
    """
    cursor = Cursor(data, name)
    layout, coding, stated_bytes, flags, rows, columns, length, checksum = _header(cursor)
    if layout != LAYOUT or coding not in (WHOLE, DENSE, SPARSE) or flags > SOME_ROWS | SOME_COLUMNS:
        raise DeltaFormatError(
            f"{name}: unknown exact record ({layout}, {coding}, {flags}); a newer impart-hf may help"
        )
    if (rows, columns) != matrix_shape(shape) or stated_bytes != item_bytes or length != len(data):
        raise DeltaFormatError(
            f"{name}: the exact record is for {rows}x{columns} numbers of {stated_bytes} bytes and has {length} bytes "
            f"itself; the tensor has {'x'.join(map(str, matrix_shape(shape)))} of {item_bytes}, the record {len(data)}"
        )
    if coding == WHOLE:
        content: np.ndarray | CodedSteps = cursor.take("u1", rows * columns * item_bytes)
    else:
        content = _parse_steps(cursor, rows, columns, flags, coding == SPARSE, 8 * item_bytes)
    if cursor.at != len(data):
        raise DeltaFormatError(f"{name}: {len(data) - cursor.at} bytes follow the end of the exact record")
    return ExactRecord(rows, columns, checksum, length, content)


def _parse_steps(cursor: Cursor, rows: int, columns: int, flags: int, is_sparse: bool, bits: int) -> CodedSteps:
    """Parse what follows the header of a record with steps of so many bits."""
    name = cursor.name
    if rows * columns >= 1 << 32:
        raise DeltaFormatError(f"{name}: {rows * columns} numbers are too many for steps")
    row_gaps = _parse_gaps(cursor, rows, "rows") if flags & SOME_ROWS else None
    column_gaps = _parse_gaps(cursor, columns, "columns") if flags & SOME_COLUMNS else None
    count = (rows if row_gaps is None else row_gaps.count) * (columns if column_gaps is None else column_gaps.count)
    first, last = cursor.take("u1", 2).tolist()
    if first > last:
        raise DeltaFormatError(f"{name}: the exact record has classes for exponents {first} to {last}")
    classes = cursor.take("u1", last - first + 1)
    gaps = None
    if is_sparse:
        changed = cursor.take("<u4", int(classes.max()) + 1).astype(np.int64)
        if int(changed.sum()) > count:
            raise DeltaFormatError(f"{name}: the exact record has {changed.sum()} changes in {count} numbers")
        count = int(changed.sum())
        gaps = Gaps(changed, parse_numbers(cursor, count, 32))
    numbers = parse_numbers(cursor, count, bits)
    if int(classes.max()) >= min(numbers.classes, 256 if gaps is None else gaps.numbers.classes):
        raise DeltaFormatError(f"{name}: the exact record has no table for class {classes.max()}")
    return CodedSteps(row_gaps, column_gaps, first, classes, gaps, numbers)


def _parse_gaps(cursor: Cursor, size: int, what: str) -> CodedNumbers:
    """Parse which of so many rows or columns are coded."""
    count = int(cursor.take("<u4", 1)[0])
    if count > size:
        raise DeltaFormatError(f"{cursor.name}: the exact record has {count} changed {what} of {size}")
    return parse_numbers(cursor, count, 32)


def _indices(gaps: CodedNumbers | None, size: int, name: str) -> torch.Tensor:
    """Return the indices of the rows or columns that are coded, int64, ascending."""
    if gaps is None:
        return torch.arange(size)
    indices = np.cumsum(decode_numbers(gaps, None, name).astype(np.int64) + 1) - 1
    if len(indices) and indices[-1] >= size:
        raise DeltaFormatError(f"{name}: the exact record changes row or column {indices[-1]} of {size}")
    return torch.from_numpy(indices)


def exponent_classes(coded: CodedSteps) -> np.ndarray:
    """Return the class of every exponent: uint8 (256,)."""
    classes = np.repeat(coded.classes[[0, -1]], [coded.first_exponent, 256 - coded.first_exponent])
    classes[coded.first_exponent :][: len(coded.classes)] = coded.classes
    return classes


def _classes_of(coded: CodedSteps, base: torch.Tensor) -> np.ndarray:
    """Return the class of each of a base's numbers: uint8, one axis."""
    if len(coded.classes) == 1:
        return np.full(base.numel(), coded.classes[0], np.uint8)
    classes, of_exponents = bytearray(), exponent_classes(coded).tobytes()
    for part in base.reshape(-1).split(PART):
        classes += exponents(part).numpy().tobytes().translate(of_exponents)  # faster than NumPy's `take`
    return np.frombuffer(classes, np.uint8)


def restore(base: torch.Tensor, data: np.ndarray, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Return the fine-tuned tensor that an exact record stands for, bit for bit.

    Args:
        base: the base's tensor, or the part of it that the fine-tune shares; the result is on its device. There a
            kernel decodes if it can. Only on a CPU is the tensor's checksum compared: it would have to be copied back.
        data: uint8: the record.
        name: the tensor's name, for messages.
        dtype: the fine-tuned tensor's dtype.

    Raises:
        DeltaFormatError: if the record is damaged or does not fit the base.
    """
    record, device = parse_exact(data, tuple(base.shape), dtype.itemsize, name), base.device
    if not (isinstance(record.content, CodedSteps) and _has_kernel(device)):
        base = base.cpu()
    if isinstance(record.content, CodedSteps):
        if not has_steps(dtype, base.dtype):
            raise DeltaFormatError(f"{name}: the exact record has steps from {base.dtype} to {dtype}, which has none")
        matrix = rounded(base, dtype).reshape(record.rows, record.columns)
        tensor = _stepped(record.content, matrix, name).view(base.shape)
    else:
        tensor = torch.empty(base.shape, dtype=dtype)
        tensor_bytes(tensor)[:] = record.content
    if tensor.device.type == "cpu" and tensor_checksum(tensor) != record.checksum:
        raise DeltaFormatError(f"{name}: the decoded tensor is not the one that was stored (its checksum differs)")
    return tensor.to(device)


def _has_kernel(device: torch.device) -> bool:
    if not kernels_wanted(device):
        return False
    from .triton_exact import works_on  # importing Triton takes a second, which a CPU need not spend

    return works_on(device)


def _stepped(coded: CodedSteps, base: torch.Tensor, name: str) -> torch.Tensor:
    """Return the matrix that steps lead to from a base of the same dtype."""
    device, is_whole = base.device, coded.row_gaps is None and coded.column_gaps is None
    rows, columns = _indices(coded.row_gaps, len(base), name), _indices(coded.column_gaps, base.shape[1], name)
    place = rows[:, None].to(device), columns.to(device)
    chosen = base if is_whole else base[place]
    before, after = chosen.reshape(-1), torch.empty(chosen.numel(), dtype=base.dtype, device=device)
    start = 0
    for numbers in _steps_of(coded, chosen, name):
        part = slice(start, start + len(numbers))
        after[part] = moved(before[part], numbers)
        start = part.stop
    after = after.view(chosen.shape)
    if is_whole:
        return after
    result = base.clone()
    result[place] = after
    return result


def _steps_of(coded: CodedSteps, base: torch.Tensor, name: str) -> Iterator[torch.Tensor]:
    """Yield the steps of all of a base's numbers, as `ordered_bits.steps` gives them, some at a time."""
    if _has_kernel(base.device):
        from .triton_exact import all_steps

        yield from (numbers.to(integers(base[:0]).dtype) for numbers in all_steps(coded, base, name))
        return
    for unsigned in _all_steps(coded, _classes_of(coded, base), name):
        own = unsigned.astype(f"<u{base.itemsize}", copy=False)
        yield torch.from_numpy(own.view(f"<i{base.itemsize}"))


def _all_steps(coded: CodedSteps, classes: np.ndarray, name: str) -> Iterator[np.ndarray]:
    """Yield the steps of all numbers of these classes, uint32, PART at a time."""
    if coded.gaps is None:
        yield from decode_in_parts(coded.numbers, classes, name)
        return
    changed = coded.gaps.changed
    own = np.repeat(np.arange(len(changed), dtype=np.uint8), changed)
    gaps = decode_numbers(coded.gaps.numbers, own, name).astype(np.int64)
    steps = decode_numbers(coded.numbers, own, name) + np.uint32(1)
    starts = np.cumsum(changed) - changed
    # Where each changed number is among those of its class.
    ranks = [np.cumsum(gaps[at : at + count] + 1) - 1 for at, count in zip(starts, changed, strict=True)]
    seen = np.zeros(len(changed), np.int64)
    for start in range(0, len(classes), PART):
        part = classes[start : start + PART]
        numbers = np.zeros(len(part), np.uint32)
        for own_class in np.flatnonzero(changed):
            places = np.flatnonzero(part == own_class)
            before, seen[own_class] = seen[own_class], seen[own_class] + len(places)
            first, last = np.searchsorted(ranks[own_class], (before, seen[own_class]))
            here = places[ranks[own_class][first:last] - before]
            numbers[here] = steps[starts[own_class] + first : starts[own_class] + last]
        yield numbers
    if any(len(rank) and rank[-1] >= count for rank, count in zip(ranks, seen, strict=True)):
        raise DeltaFormatError(f"{name}: the exact record changes more numbers than the base has")
