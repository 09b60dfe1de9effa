"""The memory that decoding takes on a CPU, as torch's profiler counts what is allocated and freed."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from impart_hf.modeling import compact_planes, delta_decode
from impart_hf.modeling.codebook import BFLOAT16, CODEBOOKS, FLOAT16
from impart_hf.modeling.delta_decode import add_delta, decode_record
from impart_hf.modeling.delta_record import DIRECT, FACTORED, KEEP_SHARED, Record, Segment, pack_record
from impart_hf.modeling.seeded_mask import keep_mask

SIZE = 1024
WHOLE, HALF, SIXTH = 65535, 32767, 10922  # thresholds

# By name: the layout, and for each segment its share of all columns, widths, threshold, and whether there are scales.
RECORDS = {
    "levels": (FACTORED, [(0.05, 8, 36, WHOLE, 0), (0.3, 35, 34, WHOLE, 0), (0.3, 1, 1, WHOLE, 0)]),
    "scaled levels": (FACTORED, [(0.2, 2, 2, WHOLE, 0), (0.2, 3, 1, WHOLE, 1)]),
    "levels under masks": (FACTORED, [(0.02, 8, 8, HALF, 0), (0.08, 3, 3, HALF, 1), (0.14, 2, 2, HALF, 0)]),
    "floats": (FACTORED, [(0.3, FLOAT16, BFLOAT16, WHOLE, 0)]),
    "floats under masks": (FACTORED, [(0.105, FLOAT16, FLOAT16, SIXTH, 0)]),
    "direct": (DIRECT, [(1.0, FLOAT16, 0, HALF, 0)]),
    "direct levels": (DIRECT, [(0.5, 4, 0, HALF, 1), (0.5, 1, 0, WHOLE, 1)]),
}


def make_record(layout: int, parts: list[tuple[float, int, int, int, int]]) -> Record:
    generator = np.random.default_rng(0)
    segments, limits, scales, codes = [], [], [], []
    for share, width_u, width_v, limit, scaled in parts:
        columns, start = round(share * SIZE), sum(segment.columns for segment in segments)
        segments.append(Segment(columns, width_u, width_v, KEEP_SHARED, scaled))
        limits.append(np.full(columns, limit, np.uint16))
        sides = range(2 if layout == FACTORED else 1)
        scales.append(generator.normal(size=(len(sides), columns)).astype(np.float16) if scaled else None)
        for side in sides:
            numbers = np.arange(start, start + columns)
            kept = int(keep_mask(1, side, limits[-1], SIZE, numbers=numbers).sum())
            size = CODEBOOKS[segments[-1].widths()[side]].packed_bytes(kept)
            # Less than 0x40 in a high byte, so that floats are small
            codes.append(generator.integers(0, 0x40, size, np.uint8))
    rank = sum(segment.columns for segment in segments) if layout == FACTORED else 0
    sigma, thresholds = generator.normal(size=rank).astype(np.float16), np.concatenate(limits)
    return Record(layout, SIZE, SIZE, rank, 1, 0.1, 0.0, segments, sigma, thresholds, scales, np.concatenate(codes))


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors that were alive at once and had been made by the work."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
    assert profiled.profiler is not None and result is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max())


@pytest.mark.parametrize("name", RECORDS)
def test_peak(name: str) -> None:
    """Beside base and result, decoding takes at most 0.3 of the matrix in float32."""
    record = make_record(*RECORDS[name])
    data = np.frombuffer(pack_record(record), np.uint8)
    base = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    # As for a matrix of 4096 x 4096 with the numbers as they are
    with (
        patch.object(delta_decode, "LEAST_ENTRIES", delta_decode.LEAST_ENTRIES // 16),
        patch.object(delta_decode, "DIRECT_ENTRIES", delta_decode.DIRECT_ENTRIES // 16),
        patch.object(compact_planes, "PIECE_ENTRIES", compact_planes.PIECE_ENTRIES // 16),
    ):
        add_delta(base, data, name, base.dtype)  # tables are made once
        peak = peak_bytes(lambda: add_delta(base, data, name, base.dtype)) - base.nbytes
        found = add_delta(base, data, name, torch.float32)
    assert 0 < peak <= 0.3 * 4 * SIZE**2, peak / (4 * SIZE**2)
    delta = decode_record(record, name)
    assert (found - base.float() - delta).norm() <= 1e-5 * delta.norm() + 1e-6 * base.float().norm()
