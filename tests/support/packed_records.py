"""Valid records with chosen segments and random numbers, made without the package's encoders, and where kernels run."""

from __future__ import annotations

import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from impart_hf.modeling.delta_record import FACTORED, KEEP_PER_COLUMN, KEEP_SHARED, Record, Segment, pack_record
from support import naive_reader

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Kernels run on a device, or in Triton's interpreter (tests/conftest.py).
needs_kernels = pytest.mark.skipif(
    find_spec("triton") is None or (DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="Triton is not installed, or there is no device and its interpreter is off",
)


def _codes(width: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` random codes, packed; floats are finite."""
    if width in (16, 17):
        numbers = torch.from_numpy(generator.normal(size=count)).to([torch.float16, torch.bfloat16][width - 16])
        return numbers.view(torch.uint8).numpy() if count else np.empty(0, np.uint8)
    bits = width if width <= 8 else width - 32
    stream = sum(int(c) << (bits * i) for i, c in enumerate(generator.integers(0, 1 << bits, count)))
    return np.frombuffer(stream.to_bytes((count * bits + 7) // 8, "little"), np.uint8)


def make_record(layout: int, shape: tuple[int, int], segments: list[Segment], seed: int = 0) -> Record:
    """A record with these segments; columns under masks of their own keep some, half or all of their entries."""
    generator = np.random.default_rng(seed)
    columns = sum(segment.columns for segment in segments)
    heights = shape if layout == FACTORED else shape[1:]
    limits, scales, codes, start = [], [], [], 0
    for segment in segments:
        limit = np.full(segment.columns, 65535)
        if segment.keep == KEEP_SHARED:
            limit[:] = generator.integers(20_000, 50_000)
        elif segment.keep == KEEP_PER_COLUMN:
            limit = generator.choice([3_000, 32_767, 65_535], segment.columns)
        limits.append(limit)
        sides = len(segment.widths())
        scales.append(generator.normal(size=(sides, segment.columns)).astype(np.float16) if segment.scaled else None)
        for side, (width, height) in enumerate(zip(segment.widths(), heights, strict=True)):
            kept = sum(
                limit[column] == 65535 or naive_reader.kept(seed, side, start + column, entry, limit[column])
                for column in range(segment.columns)
                for entry in range(height)
            )
            codes.append(_codes(width, int(kept), generator))
        start += segment.columns
    return Record(
        layout=layout,
        rows=shape[0],
        columns=shape[1],
        rank=columns if layout == FACTORED else 0,
        mask_seed=seed,
        scale=1.5,
        relative_error=0.0,
        segments=segments,
        sigma=generator.normal(size=columns if layout == FACTORED else 0).astype(np.float16),
        thresholds=np.concatenate(limits).astype(np.uint16) if limits else np.empty(0, np.uint16),
        column_scales=scales,
        codes=np.concatenate(codes) if codes else np.empty(0, np.uint8),
    )


def naive_delta(record: Record) -> torch.Tensor:
    """What a record stands for, by the second reader: float64 (m, n)."""
    return torch.from_numpy(naive_reader.decode_record(pack_record(record))[0])


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding, whose size is that of the largest numbers: of float32, or of three TF32 products."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    near = (3e-6 if DEVICE.type == "cpu" else 2e-5) * max(largest, 1e-3)
    found, expected = found.double().cpu(), expected.double().cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=near)
    assert (found - expected).norm() <= 1e-5 * expected.norm()  # docs/FORMAT.md, "Rounding"
