"""The encoders that store levels of few bits, against the papers' formulas, written out naively in float64."""

import numpy as np
import pytest
import torch
from support import naive_impart
from support.quantised import (
    FACTORED,
    NAMES,
    assert_nearest_levels,
    encode,
    factors,
    levels_of,
    naive_mask,
    parse,
    widths_of,
)
from support.random_deltas import make_delta, make_hessian

from impart_hf.methods import BitDeltaConfig, DareQtConfig, DeltaComeConfig, ImPartQtConfig, method_class
from impart_hf.modeling.delta_decode import decode_record
from impart_hf.modeling.delta_record import KEEP_ALL

SHAPES = [(96, 96), (48, 128), (128, 48), (400, 64)]
HEADER, SEGMENT = 32, 8  # bytes, by docs/FORMAT.md


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


@pytest.mark.slow
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
