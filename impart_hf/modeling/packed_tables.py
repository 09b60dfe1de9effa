"""What the kernels must know of a record's columns to unpack any tile of its planes: a few numbers for each column.

Columns are numbered through both sides: those of U (or of the direct plane) come first, then those of V. Nothing here
depends on Triton, and everything but `kernels_wanted` is NumPy's work.
"""

import os

import numpy as np
import torch

from .delta_record import FACTORED, MAX_THRESHOLD, DeltaFormatError, Record
from .seeded_mask import column_keys
from .width_codes import BFLOAT16, BITS, FLOAT16, NORMAL_LEVELS, packed_bytes

# Entries between two neighbouring counts of kept entries. A tile of a plane starts at a multiple of it.
BLOCK = 64

# The rows of a column table, 32 bits a number. `prefix` is where the column's counts of kept entries begin, `step` the
# distance of evenly spaced levels, `scale` the column scale, `sigma` the component's sigma * scale of the record (in a
# direct record that scale).
FIELDS = ("byte", "bit", "bits", "kind", "key", "limit", "prefix", "step", "scale", "sigma")
EVEN, NORMAL, HALF, BRAIN = range(4)  # `kind`: what a code stands for

KERNELS_VARIABLE = "IMPART_HF_KERNELS"


def kernels_wanted(device: torch.device) -> bool:
    """Return whether to look for Triton kernels for a device: `IMPART_HF_KERNELS` is `always`, `never` or unset.

    Unset, they are used on devices that Triton compiles for. `always` is for Triton's interpreter, which runs on CPUs.
    """
    asked = os.environ.get(KERNELS_VARIABLE, "")
    return asked == "always" or (asked != "never" and device.type in ("cuda", "xpu"))


def normal_levels() -> np.ndarray:
    """Return the levels for normally distributed values, float32 (17, 16): row b has those of b bits, rising."""
    table = np.zeros((17, 16), np.float32)
    for width, above in NORMAL_LEVELS.items():
        table[BITS[width], : 2 * len(above)] = [*(-level for level in reversed(above)), *above]
    return table


def _kind(width: int) -> int:
    return {FLOAT16: HALF, BFLOAT16: BRAIN}.get(width, NORMAL if width in NORMAL_LEVELS else EVEN)


class PackedTables:
    """The tables of one record.

    Attributes:
        masks: int32, (4, masked columns): key, threshold, entries of the column, where its counts begin.
        blocks: how many counts of kept entries all masked columns have: one for each `BLOCK` entries.
    """

    def __init__(self, record: Record):
        self._record = record
        self._heights = [record.plane_rows(side) for side in range(record.sides)]
        numbers = np.flatnonzero(record.thresholds < MAX_THRESHOLD)
        self._masked = [side * record.plane_columns + numbers for side in range(record.sides)]
        keys = np.concatenate([column_keys(record.mask_seed, side, numbers) for side in range(record.sides)])
        limits = np.tile(record.thresholds[numbers].astype(np.int32), record.sides)
        heights = np.repeat(np.array(self._heights, np.int64), len(numbers))
        ends = np.cumsum(-(-heights // BLOCK))
        self.blocks = int(ends[-1]) if len(ends) else 0
        starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        self.masks = np.stack([keys.view(np.int32), limits, heights.astype(np.int32), starts.astype(np.int32)])

    def columns(self, kept: np.ndarray, name: str) -> np.ndarray:
        """Return the column table, int32 (len(FIELDS), columns of both sides); floats are there with their bits.

        Args:
            kept: integers (masked columns,): how many entries of each masked column are kept.
            name: the tensor's name, for messages.

        Raises:
            DeltaFormatError: if there are not as many codes as kept entries.
        """
        record = self._record
        count = record.plane_columns
        kept_of = np.repeat(np.array(self._heights, np.int64), count)
        kept_of[np.concatenate(self._masked)] = kept
        table = {field: np.zeros(record.sides * count, np.int32) for field in FIELDS}
        step, scale = (np.ones(record.sides * count, np.float32) for _ in range(2))
        first_bit = np.zeros(record.sides * count, np.int64)
        at = start = 0
        for segment, scales in zip(record.segments, record.column_scales, strict=True):
            for side, width in enumerate(segment.widths()):
                run = slice(side * count + start, side * count + start + segment.columns)
                bits, ends = BITS[width], np.cumsum(kept_of[run])
                first_bit[run] = 8 * at + bits * (ends - kept_of[run])
                table["bits"][run], table["kind"][run] = bits, _kind(width)
                step[run] = 2.0 / ((1 << bits) - 1)
                if scales is not None:
                    scale[run] = scales[side].astype(np.float32)
                at += packed_bytes(width, int(ends[-1]))
            start += segment.columns
        if at != len(record.codes):
            fewer = at > len(record.codes)
            what = "fewer than the masks need" if fewer else f"more than the {at} that the masks need"
            raise DeltaFormatError(f"{name}: {len(record.codes)} bytes of codes are {what}")
        masked = np.concatenate(self._masked)
        table["limit"][:] = MAX_THRESHOLD
        table["key"][masked], table["limit"][masked], _, table["prefix"][masked] = self.masks
        table["byte"] = (first_bit >> 3).astype(np.uint32).view(np.int32)
        table["bit"] = (first_bit & 7).astype(np.int32)
        factor = np.float32(record.scale)
        sigma = record.sigma.astype(np.float32) * factor if record.layout == FACTORED else np.full(count, factor)
        for field, numbers in (("step", step), ("scale", scale), ("sigma", np.tile(sigma, record.sides))):
            table[field] = numbers.astype(np.float32).view(np.int32)
        return np.stack([table[field] for field in FIELDS])
