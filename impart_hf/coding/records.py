"""Building records from planes."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from ..modeling.codebook import CODEBOOKS
from ..modeling.delta_decode import decode_record
from ..modeling.delta_record import (
    DIRECT,
    FACTORED,
    KEEP_ALL,
    KEEP_PER_COLUMN,
    KEEP_SHARED,
    MAX_THRESHOLD,
    Record,
    Segment,
    pack_record,
)
from ..modeling.seeded_mask import keep_mask
from .record_sizes import runs, thresholds_of


@dataclass(frozen=True)
class MeasuredRecord:
    """A record's bytes, and how much of the delta is missing in it.

    Attributes:
        dropped: 1 - <decoded, delta> / <delta, delta>: 0 for noise alone, 1 if nothing is stored. What the squared
            relative error has beyond it is noise.
    """

    data: bytes
    dropped: float


def kept_counts(
    mask_seed: int, thresholds: np.ndarray, shape: tuple[int, int], device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Return for U and for V of a matrix (m, n) the number of kept entries of each component, int64 (r,)."""
    return kept_counts_of_all([mask_seed], [thresholds], shape, device)[0]


def kept_counts_of_all(
    seeds: list[int], thresholds: list[np.ndarray], shape: tuple[int, int], device: torch.device
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return `kept_counts` of several matrices of one shape, by their mask seeds and thresholds."""
    ranks = [len(own) for own in thresholds]
    ends = np.cumsum(ranks)[:-1]
    numbers = np.concatenate([np.arange(rank) for rank in ranks])
    sides = [
        keep_mask(np.repeat(seeds, ranks), side, np.concatenate(thresholds), length, device, numbers).sum(1)
        for side, length in enumerate(shape)
    ]
    of_u, of_v = (np.split(counts, ends) for counts in torch.stack(sides).cpu().numpy())
    return list(zip(of_u, of_v, strict=True))


def _keep_mode(thresholds: np.ndarray) -> int:
    """Return the keep mode of a segment with these thresholds."""
    if (thresholds == MAX_THRESHOLD).all():
        return KEEP_ALL
    return KEEP_SHARED if (thresholds == thresholds[0]).all() else KEEP_PER_COLUMN


def _planes_codes(planes: list[torch.Tensor], thresholds: np.ndarray, segments: list[Segment], seed: int) -> np.ndarray:
    masks = [keep_mask(seed, side, thresholds, plane.shape[1], plane.device) for side, plane in enumerate(planes)]
    codes = [
        CODEBOOKS[width].pack(plane[part][mask[part]])
        for segment, part in zip(segments, columns_of(segments), strict=True)
        for width, plane, mask in zip(segment.widths(), planes, masks, strict=True)
    ]
    return np.concatenate(codes) if codes else np.empty(0, np.uint8)


def columns_of(segments: list[Segment]) -> list[slice]:
    """Return the columns of each segment."""
    ends = np.cumsum([0, *(segment.columns for segment in segments)]).tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def factored(
    u: torch.Tensor,
    sigma: np.ndarray,
    v: torch.Tensor,
    thresholds: np.ndarray,
    widths: np.ndarray,
    mask_seed: int,
    widths_v: np.ndarray | None = None,
) -> Record:
    """Return the record of the sum of sigma_k u_k v_k^T over components k, dropping entries of u_k and v_k by masks.

    `pack_measured` makes its bytes.

    Args:
        u, v: float32 of shapes (m, r), (n, r): values to be stored as floats, or levels.
        sigma: float64 (r,), not negative: singular values times the 1/q^2 of both masks (eq. 4 and 5) and times the
            scales of both planes' levels, so that decoding does not depend on the method.
        thresholds: uint16 of shape (r,), the same for U and V.
        widths: width codes of the components, shape (r,).
        mask_seed: the record's 32-bit mask seed.
        widths_v: width codes of V's values, if they differ from U's.
    """
    both = np.stack([widths, widths if widths_v is None else widths_v], 1)
    segments = [
        Segment(
            part.stop - part.start, int(both[part.start, 0]), int(both[part.start, 1]), _keep_mode(thresholds[part])
        )
        for _, part in runs(both[:, 0] << 8 | both[:, 1])
    ]
    scale = float(sigma.max(initial=0.0))
    return Record(
        layout=FACTORED,
        rows=u.shape[0],
        columns=v.shape[0],
        rank=len(sigma),
        mask_seed=mask_seed,
        scale=scale,
        relative_error=0.0,
        segments=segments,
        sigma=(sigma / (scale or 1.0)).astype(np.float16),
        thresholds=thresholds,
        column_scales=[None] * len(segments),
        codes=_planes_codes([u.t(), v.t()], thresholds, segments, mask_seed),
    )


def direct_record(
    delta: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    threshold: int,
    width: int,
    mask_seed: int,
    column_scales: np.ndarray | None = None,
) -> MeasuredRecord:
    """Build the direct record of a matrix, dropping entries by a mask with one threshold.

    Args:
        delta: float32 (m, n), the exact delta, to measure the record's error.
        values: float32 (m, n): values to be stored as floats, or levels between -1 and 1.
        scale: factor of all values, including 1/q.
        threshold: 0 to 65535.
        width: width code.
        mask_seed: the record's 32-bit mask seed.
        column_scales: float16 (m,), column scales: one for each row of the matrix, a column of the plane; or None.
    """
    rows, columns = delta.shape
    thresholds = np.full(rows, threshold, np.uint16)
    segments = [Segment(rows, width, 0, _keep_mode(thresholds), int(column_scales is not None))]
    record = Record(
        layout=DIRECT,
        rows=rows,
        columns=columns,
        rank=0,
        mask_seed=mask_seed,
        scale=scale,
        relative_error=0.0,
        segments=segments,
        sigma=np.empty(0, np.float16),
        thresholds=thresholds,
        column_scales=[None if column_scales is None else column_scales[None]],
        codes=_planes_codes([values], thresholds, segments, mask_seed),
    )
    return pack_measured(record, delta)


def fit_threshold(rows: int, columns: int, most_values: int, mask_seed: int, device: torch.device) -> int:
    """Return nearly the largest threshold with which a direct record's mask keeps at most `most_values` entries."""
    threshold = int(thresholds_of(np.array([min(1.0, most_values / (rows * columns))]))[0])
    while threshold > 0:
        mask = keep_mask(mask_seed, 0, np.full(rows, threshold, np.uint16), columns, device)
        excess = int(mask.sum()) - most_values
        if excess <= 0:
            break
        threshold -= max(1, int(excess / (rows * columns) * (MAX_THRESHOLD + 1)))
    return max(0, threshold)


def pack_measured(record: Record, delta: torch.Tensor) -> MeasuredRecord:
    """Return a record's bytes, with its errors measured by decoding it.

    Args:
        delta: float32 (m, n), the exact delta.
    """
    record.scale = float(np.float32(record.scale))
    decoded = decode_record(record, "encoded matrix", delta.device)
    error, norm = decoded - delta, delta.norm()
    missing = -torch.dot(error.flatten(), delta.flatten()) / norm**2
    record.relative_error, dropped = torch.stack([error.norm() / norm, missing]).tolist()
    return MeasuredRecord(pack_record(record), dropped)


def empty_record(rows: int, columns: int, relative_error: float = 0.0) -> MeasuredRecord:
    """Return the record of a zero delta: of an unchanged matrix in a stack, or one for which nothing is stored."""
    sigma, thresholds, codes = (np.empty(0, dtype) for dtype in (np.float16, np.uint16, np.uint8))
    record = Record(FACTORED, rows, columns, 0, 0, 0.0, relative_error, [], sigma, thresholds, [], codes)
    return MeasuredRecord(pack_record(record), relative_error)
