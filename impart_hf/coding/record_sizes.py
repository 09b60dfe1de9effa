"""Sizes of records, and the thresholds of their masks, computed without the values.

This module uses only NumPy, so that the methods' settings can be checked without importing torch.
"""

import itertools
from typing import Any

import numpy as np

from ..modeling.delta_record import HEADER_BYTES, MAX_THRESHOLD, SEGMENT_BYTES
from ..modeling.width_codes import BFLOAT16, FLOAT16, packed_bytes

VALUE_WIDTHS = {"float16": FLOAT16, "bfloat16": BFLOAT16}
VALUE_BYTES = 2
OVERHEAD_BYTES = HEADER_BYTES + SEGMENT_BYTES
COMPONENT_BYTES = 4  # sigma and threshold of a singular component


def thresholds_of(keep_ratios: np.ndarray) -> np.ndarray:
    """Return the 16-bit thresholds nearest to keep ratios in (0, 1]."""
    return (np.clip(np.round(keep_ratios * (MAX_THRESHOLD + 1)), 1, MAX_THRESHOLD + 1) - 1).astype(np.uint16)


def kept_ratios(thresholds: np.ndarray) -> np.ndarray:
    """Return the exact probabilities, float64, with which thresholds keep entries."""
    return (thresholds.astype(np.float64) + 1) / (MAX_THRESHOLD + 1)


def check_value_dtype(value_dtype: str) -> None:
    """Check that values can be stored in a dtype.

    Raises:
        ValueError: if they cannot.
    """
    if value_dtype not in VALUE_WIDTHS:
        raise ValueError(f"value_dtype must be one of {', '.join(VALUE_WIDTHS)}, got {value_dtype!r}")


def runs(widths: np.ndarray) -> list[tuple[Any, slice]]:
    """Return the runs of equal numbers (r,), or of equal rows (r, c), each with its slice: a run becomes a segment."""
    result, start = [], 0
    for width, group in itertools.groupby(widths.tolist()):
        stop = start + len(list(group))
        result.append((width, slice(start, stop)))
        start = stop
    return result


def factored_bytes(widths: np.ndarray, *kept: np.ndarray) -> int:
    """Return an upper bound for the size of a factored record, in bytes.

    Args:
        widths: width codes of each component's values, shape (r,), or of its values of U and of V, (r, 2).
        kept: for U and for V, the number of kept entries of each component, (r,).
    """
    size = HEADER_BYTES + COMPONENT_BYTES * len(widths)
    both = widths if widths.ndim == 2 else np.stack([widths, widths], 1)
    for pair, part in runs(both):
        counts = [int(np.ceil(side[part].sum())) for side in kept]
        size += SEGMENT_BYTES + sum(packed_bytes(width, count) for count, width in zip(counts, pair, strict=True))
    return size
