"""The encoders that store levels of few bits, against the papers' formulas, written out naively in float64."""

import functools
import json
from pathlib import Path

import naive_impart
import naive_reader
import numpy as np
import pytest
import torch
from tiny_models import Pair

from impart_hf import compress
from impart_hf.methods import (
    BitDeltaConfig,
    DareQtConfig,
    DeltaComeConfig,
    ImPartQtConfig,
    MethodConfig,
    method_class,
)
from impart_hf.methods.base import Wanted
from impart_hf.modeling.delta_decode import decode_planes, decode_record
from impart_hf.modeling.delta_record import KEEP_ALL, Record, parse_record

NAMES = ["bitdelta", "dare-qt", "delta-come", "impart-qt"]
QUANTISING = NAMES[1:]
FACTORED = NAMES[2:]
SHAPES = [(96, 96), (48, 128), (128, 48), (400, 64)]
HEADER, SEGMENT = 32, 8  # bytes, by docs/FORMAT.md


def make_delta(rows: int, columns: int, seed: int = 0, decay: float = 0.5) -> torch.Tensor:
    """Singular values that fall as a power of their index, random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, rank, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(columns, rank, generator=generator))[0]
    return 0.01 * (u * torch.arange(1, rank + 1).float() ** -decay) @ v.T


def make_hessian(size: int, seed: int = 0) -> torch.Tensor:
    """Second moments of inputs of which few directions carry most of the power, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) * torch.arange(1, size + 1).float() ** -0.7
    inputs = torch.randn(4 * size, size, generator=generator) @ mixing.T
    return inputs.T @ inputs / len(inputs)


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


def exact_svd(matrix: torch.Tensor, wanted: Wanted) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the encoders are given in these tests, so that values can be compared and not only subspaces."""
    u, sigma, vt = whole_svd(matrix.numpy().tobytes(), tuple(matrix.shape))
    count = max(1, min(len(sigma), wanted(sigma.numpy())))
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


# --- bytes


def most_bytes(name: str, rows: int, columns: int) -> int:
    """The size of the record that drops nothing."""
    if name in FACTORED:
        widths = [8] * 2 + [3] * 32 + [2] * (min(rows, columns) - 34)
        thresholds = 0  # none are stored where all is kept
        return HEADER + 3 * SEGMENT + sum(2 + w * (rows + columns) / 8 for w in widths) + thresholds
    return HEADER + SEGMENT + (rows * columns + 7) // 8 * (2 if name == "dare-qt" else 1) + 2 * rows * (name[0] == "d")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [2, 4, 12, 20])
def test_records_fit_and_use_their_budget(name: str, shape: tuple[int, int], ratio: float) -> None:
    delta = make_delta(*shape)
    method = method_class(name)(compression_ratio=ratio)
    budget = int(delta.numel() * 2 / ratio)
    assert budget >= method.least_bytes(*shape)
    record, size = encode(method, delta, ratio)
    if name in FACTORED:
        # What is left is at most one component, at the width that comes next.
        component = SEGMENT + 4 + [8, 8, *[3] * 32, *[2] * 400][record.rank] * sum(shape) / 8
        unused, whole = 1.1 * component, most_bytes(name, *shape) - component
        if (record.thresholds == 65535).all():  # reckoned with while searching, not stored after all
            unused += 2 * record.rank
    else:
        # What is left is what chance kept fewer: four standard deviations.
        q, width = record.keep_ratios()[0], record.segments[0].width_u
        unused = 2 + width / 8 * (4 * (delta.numel() * q * (1 - q)) ** 0.5 + delta.numel() / 65536 + 8)
        whole = most_bytes(name, *shape)
    assert size >= min(budget - unused, whole)
    assert record.relative_error == pytest.approx(
        ((decode_record(record, "delta") - delta).norm() / delta.norm()).item(), rel=1e-5
    )


def test_impart_qt_uses_every_budget() -> None:
    """Masks keep more or fewer entries than expected; whatever the budget, about a component of it stays unused."""
    delta = make_delta(48, 72)
    method = ImPartQtConfig()
    for budget in range(method.least_bytes(48, 72), 1600, 37):
        for seed in range(3):
            data = method.encode(delta, budget, seed).data
            record = parse(data, (48, 72))
            component = SEGMENT + 4 + [8, 8, *[3] * 32, *[2] * 72][record.rank] * (48 + 72) / 8
            thresholds = 2 * record.rank if (record.thresholds == 65535).all() else 0
            assert budget - 1.5 * component - thresholds <= len(data) <= budget, (budget, seed)


@pytest.mark.parametrize("ratio", [1.5, 4, 14])
@pytest.mark.parametrize("shape", [(96, 96), (50, 77)])
def test_bitdelta_stores_one_bit_an_entry(shape: tuple[int, int], ratio: float) -> None:
    """There are no more: below 16x the rest of the budget stays unused."""
    _, size = encode(BitDeltaConfig(compression_ratio=ratio), make_delta(*shape), ratio)
    assert size == HEADER + SEGMENT + -(-shape[0] * shape[1] // 8)


@pytest.mark.parametrize(
    "shape", [(1, 500), (4096, 1), (8, 512), (1500, 3), (20, 256), (64, 64), (65, 131), (300, 33), (34, 200)]
)
@pytest.mark.parametrize("name", NAMES)
def test_the_least_bytes_are_enough(name: str, shape: tuple[int, int]) -> None:
    delta = make_delta(*shape)
    for method in [method_class(name)(), *([method_class(name)(bits=(2, 7), groups=(3,))] if name in FACTORED else [])]:
        least = method.least_bytes(*shape)
        for more in (0, 1, 7, 60, 400):
            for seed in range(3):
                data = method.encode(delta, least + more, seed, hessian=make_hessian(shape[1]) if more == 7 else None)
                assert len(data.data) <= least + more
                decoded = decode_record(parse(data.data, shape), "delta")
                assert decoded.any(), "the smallest record is to say something of the delta"


# --- what is stored


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize(
    "settings, widths",
    [
        ({}, [8] * 2 + [3] * 32 + [2] * 62),
        ({"bits": (5, 4, 2), "groups": (3, 10)}, [5] * 3 + [4] * 10 + [2] * 83),
        ({"bits": (2, 8), "groups": (20,)}, [2] * 20 + [8] * 76),
        ({"bits": (6,), "groups": ()}, [6] * 96),
        ({"bits": (8, 4, 4, 3), "groups": (1, 2, 3)}, [8] + [4] * 5 + [3] * 90),
        ({"bits": (3, 2), "groups": (96,)}, [3] * 96),
    ],
)
def test_widths_are_those_of_the_groups(name: str, settings: dict, widths: list[int]) -> None:
    for shape, ratio in (((96, 128), 3), ((96, 128), 12), ((20, 256), 4)):
        record, _ = encode(method_class(name)(**settings), make_delta(*shape), ratio)
        assert widths_of(record) == widths[: record.rank]
        # Neighbours of the same width make one segment.
        assert len(record.segments) == len({w for w in widths[: record.rank]})
        assert not any(s.scaled for s in record.segments)


@pytest.mark.parametrize("ratio", [3, 8, 24])
@pytest.mark.parametrize("shape", [(80, 120), (130, 70)])
def test_delta_come_stores_the_leading_components_whole(shape: tuple[int, int], ratio: float) -> None:
    delta = make_delta(*shape)
    record, size = encode(DeltaComeConfig(compression_ratio=ratio), delta, ratio)
    assert (record.thresholds == 65535).all() and all(s.keep == KEEP_ALL for s in record.segments)
    # As many components as fit, at their prices.
    prices = np.cumsum([2 + w * sum(shape) / 8 for w in [8] * 2 + [3] * 32 + [2] * (min(shape) - 34)])
    assert record.rank == (prices + HEADER + SEGMENT * len(record.segments) <= delta.numel() * 2 / ratio).sum()
    assert size == pytest.approx(prices[record.rank - 1] + HEADER + SEGMENT * len(record.segments), abs=8)
    (u, v), sigma = factors(delta, record.rank)
    for true, levels in zip((u, v), levels_of(record), strict=True):
        assert levels.all(), "the levels of an even number of codes are never zero"
        similarity = torch.nn.functional.cosine_similarity(true, levels, dim=1)
        # The best two-bit grid of normally distributed numbers has 0.94, three bits 0.98.
        assert similarity.min() > 0.9 and similarity[:2].min() > 0.9999 and similarity[2:34].min() > 0.96


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("ratio", [3, 10])
def test_kept_values_have_their_nearest_levels(name: str, ratio: float) -> None:
    delta = make_delta(80, 120)
    record, _ = encode(method_class(name)(compression_ratio=ratio), delta, ratio)
    planes, _ = factors(delta, record.rank)
    for side, (true, levels) in enumerate(zip(planes, levels_of(record), strict=True)):
        kept = naive_mask(record, side, true.shape[1])
        assert torch.equal(levels != 0, kept)
        for k, width in enumerate(widths_of(record)):
            if kept[k].any():
                assert_nearest_levels(true[k, kept[k]], levels[k, kept[k]], width)


@pytest.mark.parametrize("value_bits", [2, 3, 4, 8])
def test_dare_qt_keeps_entries_at_their_nearest_levels(value_bits: int) -> None:
    delta = make_delta(60, 90)
    record, _ = encode(DareQtConfig(compression_ratio=6, value_bits=value_bits), delta, 6)
    assert widths_of(record) == [value_bits] * 60 and len(set(record.thresholds.tolist())) == 1
    (scales,) = record.column_scales
    assert scales is not None and scales.shape == (1, 60)
    values, kept = levels_of(record)[0], naive_mask(record, 0, 90)
    assert torch.equal(values != 0, kept)
    for row in range(60):
        levels = values[row, kept[row]] / float(scales[0, row])
        assert_nearest_levels(delta[row, kept[row]].double(), levels, value_bits)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", FACTORED)
def test_components_have_the_right_size(name: str, calibrated: bool) -> None:
    """In its own direction a quantised component is as large as the kept entries, times 1/q for each side.

    With a Hessian, V's direction is that of the outputs on the inputs it stands for.
    """
    delta = make_delta(80, 120)
    hessian = make_hessian(120) if calibrated else None
    record, _ = encode(method_class(name)(compression_ratio=6), delta, 6, hessian=hessian)
    planes, sigma = factors(delta, record.rank)
    found = torch.from_numpy(record.scale * record.sigma.astype(np.float64))
    expected = sigma / torch.from_numpy(record.keep_ratios()) ** 2
    for side, (true, levels) in enumerate(zip(planes, levels_of(record), strict=True)):
        kept = true * naive_mask(record, side, true.shape[1])
        image = damped_image(kept, hessian if side == 1 else None)
        found = found * (image * levels).sum(1)
        expected = expected * (image * kept).sum(1)
    assert record.rank > 34 and expected.min() > 0
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)


def damped_image(kept: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
    """What rows are multiplied with in the inner product of the outputs, damped by 1 % of the mean input's."""
    if hessian is None:
        return kept
    return kept @ hessian.double() + 0.01 * hessian.diagonal().double().mean() * kept


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("value_bits", [2, 4])
def test_rows_of_dare_qt_have_the_right_size(value_bits: int, calibrated: bool) -> None:
    delta = make_delta(100, 90)
    hessian = make_hessian(90) if calibrated else None
    record, _ = encode(DareQtConfig(compression_ratio=6, value_bits=value_bits), delta, 6, hessian=hessian)
    kept = delta.double() * naive_mask(record, 0, 90)
    image = damped_image(kept, hessian)
    found = (image * decode_record(record, "delta").double()).sum(1) * record.keep_ratios()[0]
    torch.testing.assert_close(found, (image * kept).sum(1), rtol=2e-3, atol=0)


@pytest.mark.parametrize("ratio", [1.5, 8, 15])
def test_bitdelta_is_sign_times_mean(ratio: float) -> None:
    delta = make_delta(60, 90)
    record, _ = encode(BitDeltaConfig(compression_ratio=ratio), delta, ratio)
    expected = delta.double().sign() * delta.double().abs().mean()
    torch.testing.assert_close(decode_record(record, "delta").double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("ratio", [20, 64])
def test_bitdelta_beyond_16x_is_thinned_out(ratio: float) -> None:
    delta = make_delta(100, 120)
    record, _ = encode(BitDeltaConfig(compression_ratio=ratio), delta, ratio)
    q = record.keep_ratios()[0]
    expected = naive_mask(record, 0, 120) * delta.double().sign() * delta.double().abs().mean() / q
    torch.testing.assert_close(decode_record(record, "delta").double(), expected, rtol=1e-6, atol=0)
    assert q == pytest.approx(16 / ratio, rel=0.15)


def test_bitdelta_of_entries_that_did_not_change() -> None:
    """There is no third sign: a zero becomes one of the two, the mean counts it as zero."""
    delta = make_delta(64, 64)
    delta[:40] = 0
    delta[0] = -0.0
    record, _ = encode(BitDeltaConfig(compression_ratio=4), delta, 4)
    decoded = decode_record(record, "delta").double()
    mean = delta.double().abs().mean()
    torch.testing.assert_close(decoded.abs(), mean.expand(64, 64), rtol=1e-6, atol=0)
    assert torch.equal(decoded[40:].sign(), delta[40:].double().sign())


# --- right on average


def projections(mean: torch.Tensor, delta: torch.Tensor, rank: int) -> torch.Tensor:
    (u, v), sigma = factors(delta, rank)
    return (u @ mean.double() * v).sum(1) / sigma


@pytest.mark.parametrize("bits", [(8, 3, 2), (8, 8, 8)])
def test_impart_qt_is_unbiased_over_seeds(bits: tuple[int, ...]) -> None:
    delta = make_delta(64, 64)
    method = ImPartQtConfig(bits=bits)
    records = [encode(method, delta, 8, seed)[0] for seed in range(200)]
    decoded = [decode_record(r, "delta") for r in records]
    mean, rank = torch.stack(decoded).mean(0), min(r.rank for r in records)
    share = projections(mean, delta, rank)
    assert share.mean().item() == pytest.approx(1, abs=0.02), "2 bits without their bias taken out have 0.78"
    assert (share - 1).abs().max() < 0.15
    (u, v), sigma = factors(delta, 64)
    leading = [(u[: r.rank].T * sigma[: r.rank]) @ v[: r.rank] for r in records]  # chance may cost one a component
    one = torch.stack([(d - whole).norm() for d, whole in zip(decoded, leading, strict=True)]).mean()
    # The error of a mean of 200 falls fourteenfold; rounding is wrong in the same way in each of them.
    assert (mean - torch.stack(leading).mean(0)).norm() < (0.09 if bits[2] == 8 else 0.4) * one


@pytest.mark.parametrize("value_bits", [2, 8])
def test_dare_qt_is_unbiased_over_seeds(value_bits: int) -> None:
    delta = make_delta(64, 64)
    method = DareQtConfig(value_bits=value_bits)
    decoded = [decode_record(encode(method, delta, 20, seed)[0], "delta") for seed in range(200)]
    mean = torch.stack(decoded).mean(0)
    assert ((mean * delta).sum() / delta.square().sum()).item() == pytest.approx(1, abs=0.02)
    one = torch.stack([(d - delta).norm() for d in decoded[:20]]).mean()
    assert (mean - delta).norm() < (0.09 if value_bits == 8 else 0.3) * one


# --- algorithm 3


@pytest.mark.parametrize("ratio", [6, 16, 40])
@pytest.mark.parametrize("settings", [{}, {"bits": (4, 2), "groups": (8,)}, {"beta": 0.8, "c": 0.5}])
def test_the_sparsity_is_that_which_meets_the_ratio(settings: dict, ratio: float) -> None:
    """Bits expected by keep ratios and widths meet the budget; the ratios are algorithm 1's at that sparsity."""
    rows, columns = 320, 256
    delta = make_delta(rows, columns, decay=0.3)
    method = ImPartQtConfig(compression_ratio=ratio, **settings)
    record, _ = encode(method, delta, ratio)
    budget = int(delta.numel() * 2 / ratio)

    def expected_bytes(ratios: np.ndarray) -> float:
        widths = np.repeat(method.bits, [*method.groups, 400])[: len(ratios)]
        values = (ratios * widths).sum() * (rows + columns) / 8
        return HEADER + SEGMENT * len(set(widths.tolist())) + 4 * len(ratios) + values

    assert 0.96 * budget < expected_bytes(record.keep_ratios()) < 1.02 * budget
    sigma = torch.linalg.svdvals(delta.double()).tolist()
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        dropped = naive_impart.drop_ratios(sigma, 256, middle, method.beta, method.c)
        ratios = 1 - np.array([p for p in dropped if p < 1])
        low, high = (low, middle) if expected_bytes(ratios) <= budget else (middle, high)
    dropped = naive_impart.drop_ratios(sigma, 256, high, method.beta, method.c)
    ratios = 1 - np.array([p for p in dropped if p < 1])
    assert abs(record.rank - len(ratios)) <= 1 + 0.02 * len(ratios)
    both = min(record.rank, len(ratios))
    np.testing.assert_allclose(record.keep_ratios()[:both], ratios[:both], rtol=0.03)


def test_fewer_bits_keep_more_entries() -> None:
    delta = make_delta(200, 160)
    kept = [
        encode(ImPartQtConfig(bits=bits, groups=()), delta, 16)[0].keep_ratios().sum() for bits in ((2,), (4,), (8,))
    ]
    assert kept[0] / kept[1] == pytest.approx(2, rel=0.1) and kept[1] / kept[2] == pytest.approx(2, rel=0.1)


# --- with a Hessian


@pytest.mark.parametrize(
    "method, most",
    [(ImPartQtConfig(), 0.8), (ImPartQtConfig(bits=(2,), groups=()), 0.8), (DeltaComeConfig(), 0.8),
     (DareQtConfig(), 0.6), (DareQtConfig(value_bits=4), 0.98)],
    ids=["impart-qt", "impart-qt at 2 bits", "delta-come", "dare-qt", "dare-qt at 4 bits"],
)  # fmt: skip
def test_a_hessian_lowers_the_output_error(method: MethodConfig, most: float) -> None:
    errors = np.zeros(2)
    for seed in range(3):
        for shape in ((96, 96), (64, 128), (128, 64)):
            delta, hessian = make_delta(*shape, seed), make_hessian(shape[1], seed)
            for i, given in enumerate((None, hessian)):
                record, _ = encode(method, delta, 4, seed, given)
                errors[i] += output_error(decode_record(record, "delta"), delta, hessian)
    assert errors[1] < most * errors[0]


@pytest.mark.parametrize("name", QUANTISING)
def test_only_directions_and_not_sizes_of_a_hessian_count(name: str) -> None:
    delta, hessian = make_delta(80, 96), make_hessian(96)
    method = method_class(name)()
    plain, one, other = (method.encode(delta, 2000, 1, hessian=h).data for h in (None, hessian, 1024 * hessian))
    assert one == other != plain


def test_inputs_that_are_not_correlated_change_nothing() -> None:
    """Then nothing can make up for an entry's error; and of the components, V sees the inputs themselves."""
    delta = make_delta(80, 96)
    same, inputs = 4 * torch.eye(96), torch.diag(torch.linspace(0.5, 2, 96))
    for method in (DareQtConfig(), DareQtConfig(value_bits=5)):
        one, other = (decode_record(encode(method, delta, 8, 1, h)[0], "delta") for h in (None, same))
        torch.testing.assert_close(one, other, rtol=2e-3, atol=0)
    for name in FACTORED:
        records = [encode(method_class(name)(), delta, 8, 1, hessian)[0] for hessian in (None, inputs)]
        (u, v), (other_u, other_v) = map(levels_of, records)
        assert torch.equal(v, other_v) and not torch.equal(u, other_u)


def test_u_is_quantised_for_what_v_passes_on() -> None:
    """Inputs that the first components answer to alike: in U, later components make up for errors of earlier ones."""
    delta, hessian = make_delta(96, 96), make_hessian(96)
    errors = []
    for given in (None, hessian):
        record, _ = encode(DeltaComeConfig(bits=(3,), groups=()), delta, 5, hessian=given)
        (u, _), sigma = factors(delta, record.rank)
        found, v = levels_of(record)
        weights = torch.from_numpy(record.scale * record.sigma.astype(np.float64))
        passed = v * weights[:, None]
        passed = passed @ hessian.double() @ passed.T
        # The unit in which U is stored is not in the file: the one that fits best.
        unit = (found * u).sum() / found.square().sum()
        error = (u - unit * found).T
        errors.append((((error @ passed) * error).sum() / ((u.T @ passed) * u.T).sum()).item())
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("live", [0, 60])
@pytest.mark.parametrize("name", QUANTISING)
def test_inputs_that_are_always_zero(name: str, live: int) -> None:
    """Nothing is known of them, and text other than the calibration text may well reach them."""
    delta = make_delta(64, 64)
    rounded, _ = encode(method_class(name)(), delta, 6)
    record, _ = encode(method_class(name)(), delta, 6, hessian=torch.diag((torch.arange(64) < live).float()))
    assert record.relative_error < 1.3 * rounded.relative_error


def test_rows_that_answer_to_no_live_input_are_kept() -> None:
    delta = make_delta(64, 64)
    hessian = torch.diag((torch.arange(64) < 3).float())
    record, _ = encode(DareQtConfig(), delta, 20, hessian=hessian)
    kept = naive_mask(record, 0, 64)
    assert (kept.any(1) & ~kept[:, :3].any(1)).sum() > 5, "this is about some rows"
    assert torch.equal(decode_record(record, "delta").any(1), kept.any(1))


# --- the same for every method


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bytes(name: str) -> None:
    delta, hessian = make_delta(64, 96), make_hessian(96)
    method = method_class(name)(compression_ratio=24)
    for given in (None, hessian):
        one, same, other = (method.encode(delta.clone(), 500, seed, hessian=given).data for seed in (5, 5, 6))
        assert one == same != other
        if name == "delta-come":  # without masks, the seed is a number in the header
            assert one[:16] == other[:16] and one[20:] == other[20:]


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_small_deltas_keep_their_precision(name: str, calibrated: bool) -> None:
    """Light fine-tunes change weights by millionths, under float16's normal range."""
    delta, hessian = make_delta(96, 96), make_hessian(96) if calibrated else None
    large, _ = encode(method_class(name)(), delta, 5, hessian=hessian)
    for factor in (1e-6, 1e6):
        record, _ = encode(method_class(name)(), delta * factor, 5, hessian=hessian)
        assert record.relative_error == pytest.approx(large.relative_error, rel=0.02)
        assert record.scale == pytest.approx(large.scale * factor, rel=0.02)


@pytest.mark.parametrize("name", QUANTISING)
def test_rows_and_columns_of_zeros(name: str) -> None:
    delta = make_delta(96, 96)
    delta[::3] = 0
    delta[:, 40:60] = 0
    record, _ = encode(method_class(name)(), delta, 5)
    decoded = decode_record(record, "delta")
    assert torch.isfinite(decoded).all() and record.relative_error < 1
    # Levels are never zero, but those of a row without a value are next to nothing.
    assert decoded[::3].norm() < 0.5 * decoded.norm() * (name != "dare-qt") + 1e-3 * decoded.norm()


# --- settings


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("bits", [0, 1, 9, -3, True, 2.5, "8", None])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_bits_are_from_2_to_8(name: str, bits: object, place: int) -> None:
    settings = [8, 3, 2]
    settings[place] = bits  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=f"bits must be whole numbers from 2 to 8, got {bits!r}$"):
        method_class(name)(bits=settings)


@pytest.mark.parametrize("bits", [0, 1, 9, True, 2.5, "8", None, (2,)])
def test_value_bits_are_from_2_to_8(bits: object) -> None:
    with pytest.raises(ValueError, match="value_bits must be whole numbers from 2 to 8, got "):
        DareQtConfig(value_bits=bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FACTORED)
def test_bits_and_groups_fit_each_other(name: str) -> None:
    method = method_class(name)
    for bits, groups in (((8, 3, 2), (2,)), ((8, 3), (2, 32)), ((), ()), ((8,), (1,))):
        with pytest.raises(ValueError, match=r"groups must have one number fewer than bits.*got bits \("):
            method(bits=bits, groups=groups)
    for groups in ((0, 32), (2, -1), (2, 1.5), (True, 2), ("2", 3)):
        with pytest.raises(ValueError, match="groups must be whole numbers above 0"):
            method(groups=groups)


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("setting", [{"bits": 8}, {"bits": None}, {"bits": "832"}, {"groups": 2}, {"groups": None}])
def test_bits_and_groups_are_sequences(name: str, setting: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        method_class(name)(**setting)


@pytest.mark.parametrize("name", FACTORED)
def test_groups_that_exceed_the_rank(name: str, tiny_pair: Pair, tmp_path: Path) -> None:
    pair, output = (str(tiny_pair.base), str(tiny_pair.finetuned)), tmp_path / "delta"
    method = method_class(name)
    with pytest.raises(ValueError, match=r"groups \(2, 63\) have 65 components, more than the rank .*\(64\)") as caught:
        compress(*pair, output, method(compression_ratio=4, groups=(2, 63)))
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
    report = compress(*pair, output, method(compression_ratio=4, groups=(2, 62)))
    assert report.ratio >= 4 and output.exists()


@pytest.mark.parametrize(
    "method",
    [
        BitDeltaConfig(compression_ratio=20, seed=3, embeddings="method"),
        DareQtConfig(compression_ratio=7.5, value_bits=4),
        DeltaComeConfig(bits=(6, 2), groups=(5,)),
        ImPartQtConfig(beta=0.7, c=0.5, bits=[8, 2], groups=[9]),  # type: ignore[arg-type]
    ],
    ids=NAMES,
)
def test_settings_survive_json(method: MethodConfig) -> None:
    settings = json.loads(json.dumps(method.to_dict()))
    again = method_class(settings.pop("name"))(**settings)
    assert again == method and again.to_dict() == method.to_dict() and type(again) is type(method)
    delta = make_delta(64, 64)
    assert again.encode(delta, 900, 1).data == method.encode(delta, 900, 1).data
