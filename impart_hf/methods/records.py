"""Building records from planes of numbers, for the methods that store 16-bit values."""

import numpy as np
import torch

from ..modeling.checksums import tensor_bytes
from ..modeling.delta_decode import decode_record
from ..modeling.delta_record import (
    BFLOAT16,
    DIRECT,
    FACTORED,
    FLOAT16,
    HEADER_BYTES,
    KEEP_ALL,
    KEEP_PER_COLUMN,
    KEEP_SHARED,
    MAX_THRESHOLD,
    SEGMENT_BYTES,
    Record,
    Segment,
    pack_record,
)
from ..modeling.seeded_mask import keep_mask

VALUE_DTYPES = {"float16": (FLOAT16, torch.float16), "bfloat16": (BFLOAT16, torch.bfloat16)}
VALUE_BYTES = 2
OVERHEAD_BYTES = HEADER_BYTES + SEGMENT_BYTES


def thresholds_of(keep_ratios: np.ndarray) -> np.ndarray:
    """The 16-bit thresholds nearest to keep ratios in (0, 1]."""
    return (np.clip(np.round(keep_ratios * (MAX_THRESHOLD + 1)), 1, MAX_THRESHOLD + 1) - 1).astype(np.uint16)


def kept_ratios(thresholds: np.ndarray) -> np.ndarray:
    """The exact probabilities, float64, with which thresholds keep entries."""
    return (thresholds.astype(np.float64) + 1) / (MAX_THRESHOLD + 1)


def check_value_dtype(value_dtype: str) -> None:
    if value_dtype not in VALUE_DTYPES:
        raise ValueError(f"value_dtype must be one of {', '.join(VALUE_DTYPES)}, got {value_dtype!r}")


def _codes(values: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    return tensor_bytes(values.to(dtype))


def factored_record(
    delta: torch.Tensor,
    u: torch.Tensor,
    sigma: torch.Tensor,
    v: torch.Tensor,
    thresholds: np.ndarray,
    mask_seed: int,
    value_dtype: str,
) -> bytes:
    """A record of U diag(sigma) V^T with entries of U and V dropped by seeded masks and the rest rescaled by 1/q.

    Args:
        delta: float32 (m, n), what the record stands for; for the measured error.
        u, sigma, v: float32 of shapes (m, r), (r,), (n, r).
        thresholds: uint16 of shape (r,), the same for U and V.
        mask_seed: the record's 32-bit mask seed.
        value_dtype: a key of VALUE_DTYPES.
    """
    width, dtype = VALUE_DTYPES[value_dtype]
    rows, columns, rank = u.shape[0], v.shape[0], len(thresholds)
    ratios = kept_ratios(thresholds)
    # Both 1/q factors (eq. 4 and 5) go into sigma: the decoder then needs no knowledge of the method.
    rescaled = sigma.double().cpu().numpy() / ratios**2
    scale = float(rescaled.max(initial=0.0))
    keep = KEEP_ALL if (thresholds == MAX_THRESHOLD).all() else KEEP_PER_COLUMN
    codes = [
        _codes(side.t()[keep_mask(mask_seed, number, thresholds, side.shape[0], side.device)], dtype)
        for number, side in enumerate((u, v))
    ]
    record = Record(
        layout=FACTORED,
        rows=rows,
        columns=columns,
        rank=rank,
        mask_seed=mask_seed,
        scale=scale,
        relative_error=0.0,
        segments=[Segment(rank, width, width, keep)] if rank else [],
        sigma=(rescaled / (scale or 1.0)).astype(np.float16),
        thresholds=thresholds,
        column_scales=[None] if rank else [],
        codes=np.concatenate(codes),
    )
    return _measured(record, delta)


def direct_record(delta: torch.Tensor, threshold: int, mask_seed: int, value_dtype: str) -> bytes:
    """A record of the delta's own entries, dropped by a seeded mask with one threshold and the rest rescaled by 1/q.

    Args:
        delta: float32 (m, n).
        threshold: 0 to 65535, for all columns of the plane.
        mask_seed: the record's 32-bit mask seed.
        value_dtype: a key of VALUE_DTYPES.
    """
    width, dtype = VALUE_DTYPES[value_dtype]
    rows, columns = delta.shape
    thresholds = np.full(rows, threshold, np.uint16)
    kept = delta[keep_mask(mask_seed, 0, thresholds, columns, delta.device)]
    # Deltas are small numbers: relative to the largest they stay clear of float16's subnormal range.
    largest = float(delta.abs().max())
    record = Record(
        layout=DIRECT,
        rows=rows,
        columns=columns,
        rank=0,
        mask_seed=mask_seed,
        scale=largest / float(kept_ratios(thresholds[:1])[0]),
        relative_error=0.0,
        segments=[Segment(rows, width, 0, KEEP_SHARED)],
        sigma=np.empty(0, np.float16),
        thresholds=thresholds,
        column_scales=[None],
        codes=_codes(kept / largest, dtype),
    )
    return _measured(record, delta)


def _measured(record: Record, delta: torch.Tensor) -> bytes:
    """The record's bytes, the error measured by decoding it as a reader would."""
    record.scale = float(np.float32(record.scale))
    decoded = decode_record(record, "encoded matrix", delta.device)
    record.relative_error = float((decoded - delta).norm() / delta.norm())
    return pack_record(record)


def empty_record(rows: int, columns: int) -> bytes:
    """The record of a matrix that the fine-tune did not change, as happens in a stack."""
    return pack_record(
        Record(FACTORED, rows, columns, 0, 0, 0.0, 0.0, [], np.empty(0, np.float16), np.empty(0, np.uint16), [],
               np.empty(0, np.uint8))
    )  # fmt: skip
