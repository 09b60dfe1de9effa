"""What encoders of few bits stored, and what they should have."""

import functools

import numpy as np
import torch

from impart_hf.coding.svd import RankRule
from impart_hf.methods import MethodConfig
from impart_hf.modeling.delta_decode import decode_planes
from impart_hf.modeling.delta_record import Record, parse_record
from support import naive_reader

NAMES = ["bitdelta", "dare-qt", "delta-come", "impart-qt"]
QUANTISING = NAMES[1:]
FACTORED = NAMES[2:]


def parse(data: bytes, shape: tuple[int, int]) -> Record:
    record, length = parse_record(np.frombuffer(data, np.uint8), shape, "delta")
    assert length == len(data)
    return record


def encode(
    method: MethodConfig, delta: torch.Tensor, ratio: float, seed: int = 1, hessian: torch.Tensor | None = None
) -> tuple[Record, int]:
    budget = int(delta.numel() * 2 / ratio)
    data = method.encode(delta, budget, seed, hessian=hessian, svd=exact_svd).data
    assert len(data) <= budget
    return parse(data, (delta.shape[0], delta.shape[1])), len(data)


@functools.lru_cache(maxsize=4)
def whole_svd(data: bytes, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    matrix = torch.from_numpy(np.frombuffer(data, np.float32).reshape(shape).astype(np.float64))
    return torch.linalg.svd(matrix, full_matrices=False)


def exact_svd(
    matrix: torch.Tensor, wanted: int | RankRule, known: np.ndarray | None = None, /
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the encoders are given in these tests, so that values can be compared and not only subspaces."""
    u, sigma, vt = whole_svd(matrix.numpy().tobytes(), tuple(matrix.shape))
    count = max(1, min(len(sigma), wanted(sigma.numpy()) if callable(wanted) else wanted))
    return u[:, :count].float(), sigma[:count].float(), vt[:count].T.float()


def factors(delta: torch.Tensor, rank: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """[U^T (r, m), V^T (r, n)] and sigma, in float64, of the values that the encoders were given."""
    u, sigma, v = exact_svd(delta, lambda _: rank)
    return [u.T.double(), v.T.double()], sigma.double()


def levels_of(record: Record) -> list[torch.Tensor]:
    """Per side, the stored levels between -1 and 1, (columns, entries), zeros where dropped."""
    return [plane.dense().double() for plane in decode_planes(record, "delta")]


def widths_of(record: Record) -> list[int]:
    assert all(s.width_v in (s.width_u, 0) for s in record.segments)
    return [s.width_u for s in record.segments for _ in range(s.columns)]


def naive_mask(record: Record, side: int, entries: int) -> torch.Tensor:
    """(columns, entries), by the second reader."""
    return torch.tensor(
        [
            [t == 65535 or naive_reader.kept(record.mask_seed, side, column, i, t) for i in range(entries)]
            for column, t in enumerate(record.thresholds.tolist())
        ]
    )


def size_of_levels(values: torch.Tensor, levels: torch.Tensor, width: int) -> tuple[float, float]:
    """Between which sizes a grid's outermost level lies, if every value was rounded to its nearest level.

    Empty (the first number above the second) if there is no such grid.
    """
    top = 2**width - 1
    codes = ((levels + 1) * top / 2).round()
    torch.testing.assert_close(2 * codes / top - 1, levels, rtol=0, atol=1e-6)
    lowest, highest = 0.0, float("inf")
    for code in range(top):
        boundary = (2 * code + 1) / top - 1  # between this level and the next
        below, above = values[codes <= code], values[codes > code]
        largest = below.max().item() if len(below) else -float("inf")
        smallest = above.min().item() if len(above) else float("inf")
        if abs(boundary) < 1e-9:
            assert largest <= 1e-9 and smallest >= -1e-9
        elif boundary > 0:
            lowest, highest = max(lowest, largest / boundary), min(highest, smallest / boundary)
        else:
            lowest, highest = max(lowest, smallest / boundary), min(highest, largest / boundary)
    return lowest, highest


def least_rounding_error(values: torch.Tensor, sizes: np.ndarray, width: int) -> float:
    """The least squared error among grids whose outermost levels lie at these sizes."""
    top, scale = 2**width - 1, torch.from_numpy(sizes)[:, None]
    codes = ((values / scale + 1) * top / 2).round().clamp(0, top)
    return ((2 * codes / top - 1) * scale - values).square().sum(1).min().item()


def assert_nearest_levels(values: torch.Tensor, levels: torch.Tensor, width: int) -> None:
    """Every value has its nearest level on one grid, and hardly any other grid would be closer to the values."""
    lowest, highest = size_of_levels(values, levels, width)
    assert lowest <= highest * (1 + 1e-5)
    largest = values.abs().max().item()
    ends = [s for s in (lowest, highest) if 0 < s < float("inf")] or [largest]
    found = least_rounding_error(values, np.linspace(min(ends), max(ends), 50), width)
    best = least_rounding_error(values, np.geomspace(0.2 * largest, 1.01 * largest, 300), width)
    assert found <= (1.1 if width <= 4 else 3) * best


def output_error(decoded: torch.Tensor, delta: torch.Tensor, hessian: torch.Tensor) -> float:
    """E|delta x - decoded x|^2 over E|delta x|^2."""
    error, whole = (decoded - delta).double(), delta.double()
    return ((error @ hessian.double() * error).sum() / (whole @ hessian.double() * whole).sum()).item()
