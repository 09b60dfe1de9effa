"""Sizes of records, and the thresholds that decide how many values they keep: what is known without the values.

Everything here is computed with NumPy alone, so that the settings of the methods can be checked without torch.
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
    """The 16-bit thresholds nearest to keep ratios in (0, 1]."""
    return (np.clip(np.round(keep_ratios * (MAX_THRESHOLD + 1)), 1, MAX_THRESHOLD + 1) - 1).astype(np.uint16)


def kept_ratios(thresholds: np.ndarray) -> np.ndarray:
    """The exact probabilities, float64, with which thresholds keep entries."""
    return (thresholds.astype(np.float64) + 1) / (MAX_THRESHOLD + 1)


def check_value_dtype(value_dtype: str) -> None:
    """Check that values can be stored in a dtype.

    Raises:
        ValueError: if they cannot.
    """
    if value_dtype not in VALUE_WIDTHS:
        raise ValueError(f"value_dtype must be one of {', '.join(VALUE_WIDTHS)}, got {value_dtype!r}")


def runs(widths: np.ndarray) -> list[tuple[Any, slice]]:
    """The runs of equal numbers (r,), or rows (r, c) of them, each with its place: what becomes a segment."""
    found, start = [], 0
    for width, group in itertools.groupby(widths.tolist()):
        stop = start + len(list(group))
        found.append((width, slice(start, stop)))
        start = stop
    return found


def factored_bytes(widths: np.ndarray, *kept: np.ndarray) -> int:
    """Size at most of a factored record.

    Args:
        widths: of each component's values, shape (r,), or of its values of U and of V, (r, 2).
        kept: for U and for V, how many entries of each component are kept.
    """
    size = HEADER_BYTES + COMPONENT_BYTES * len(widths)
    both = widths if widths.ndim == 2 else np.stack([widths, widths], 1)
    for pair, part in runs(both):
        counts = [int(np.ceil(side[part].sum())) for side in kept]
        size += SEGMENT_BYTES + sum(packed_bytes(width, count) for count, width in zip(counts, pair, strict=True))
    return size
