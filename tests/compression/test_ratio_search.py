"""The search for the highest ratio within a limit, on curves that are known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from impart_hf.compression.ratio_search import MOST_POINTS, Point, best, next_ratio

Harm = Callable[[float], float]
LOWEST, HIGHEST = 1.5, 3000.0


def search(harm: Harm, start: float = 32.0, size: Callable[[float], float] = lambda ratio: 1e9 / ratio) -> list[Point]:
    points: list[Point] = []
    while (ratio := next_ratio(points, start, LOWEST, HIGHEST)) is not None:
        assert LOWEST <= ratio <= HIGHEST and ratio not in [point.ratio for point in points]
        assert ratio == float(f"{ratio:.4g}")
        points.append(Point(ratio, harm(ratio), int(size(ratio))))
    return points


def ratio_of(points: list[Point]) -> float:
    found = best(points)
    assert found is not None and found.harm <= 1
    return found.ratio


def power(root: float, slope: float) -> Harm:
    return lambda ratio: (ratio / root) ** slope


def noisy(root: float, slope: float, share: float) -> Harm:
    """The same noise whenever a ratio is tried."""
    return lambda ratio: (ratio / root) ** slope * math.exp(share * random.Random(ratio).gauss(0, 1))


def measured(*points: tuple[float, float]) -> Harm:
    """Lines between points in logarithms, and beyond them."""

    def harm(ratio: float) -> float:
        pairs = list(zip(points, points[1:], strict=False))
        (x, a), (y, b) = next((pair for pair in pairs if ratio <= pair[1][0]), pairs[-1])
        return a * (ratio / x) ** (math.log(b / a) / math.log(y / x))

    return harm


@pytest.mark.parametrize("root", [1.9, 7.0, 31.0, 33.0, 150.0, 2400.0])
@pytest.mark.parametrize("slope", [0.8, 1.5, 3.0])
def test_power_laws_take_few_points(root: float, slope: float) -> None:
    points = search(power(root, slope))
    assert root / 1.02 < ratio_of(points) <= root
    assert len(points) <= 5


@pytest.mark.parametrize("kl", [0.0003, 0.001, 0.003, 0.01, 0.03])
def test_a_curve_that_was_measured(kl: float) -> None:
    """Of impart-rd and a light fine-tune of Gemma 3 270M."""
    curve = measured((32, 0.00073), (128, 0.0056), (400, 0.0325))
    points = search(lambda ratio: curve(ratio) / kl)
    found = ratio_of(points)
    assert curve(found * 1.02) > kl and len(points) <= 5


@pytest.mark.parametrize("share", [0.02, 0.05])
@pytest.mark.parametrize("root", [5.0, 40.0, 500.0])
def test_noise(root: float, share: float) -> None:
    """What is found was measured to keep the target, and is as near as the noise allows."""
    points = search(noisy(root, 1.5, share))
    assert ratio_of(points) == pytest.approx(root, rel=0.03 + 2 * share)
    assert len(points) <= 10


@pytest.mark.parametrize("root", [3.0, 20.0, 700.0])
def test_a_step(root: float) -> None:
    points = search(lambda ratio: 0.3 if ratio <= root else 3.0)
    assert root / 1.03 < ratio_of(points) <= root and len(points) <= MOST_POINTS


@pytest.mark.parametrize("root", [3.0, 45.0, 700.0])
def test_harm_that_is_zero_or_negative(root: float) -> None:
    """A text's cross-entropy may fall, and a delta may be exact."""
    for harm in (lambda r: 0.0 if r < root / 2 else (r / root) ** 1.5, lambda r: 2 * (r / root) ** 1.5 - 1):
        points = search(harm)
        assert root / 1.03 < ratio_of(points) <= root and len(points) <= 10


def test_flat_curves() -> None:
    """Harm that does not grow is followed to the highest ratio, and harm that does not fall to the lowest, quickly."""
    points = search(lambda ratio: 0.5)
    assert ratio_of(points) == HIGHEST and len(points) <= 5
    points = search(lambda ratio: 2.0)
    assert best(points) is None and points[-1].ratio == LOWEST and len(points) <= 5


def test_nan_breaks_the_target() -> None:
    assert best(search(lambda ratio: math.nan)) is None
    assert ratio_of(search(lambda ratio: math.nan if ratio > 10 else 0.5)) == pytest.approx(10, rel=0.03)


def test_a_method_that_has_no_use_for_more_bytes() -> None:
    points = search(lambda ratio: 3.0, size=lambda ratio: 1e6)
    assert best(points) is None and len(points) == 2


def test_a_method_with_steps_in_its_size() -> None:
    """A repository that would be hardly smaller is not looked for."""
    points = search(lambda ratio: (ratio // 10) / 5, size=lambda ratio: 1e9 - 1e7 * (ratio // 10))
    assert 50 <= ratio_of(points) < 60 and len(points) <= 4


def test_limits() -> None:
    """The highest ratio is tried if all are harmless, the start is brought within the limits, and one ratio is one."""
    points = search(power(1e9, 1.5))
    assert ratio_of(points) == HIGHEST and len(points) <= 4
    assert [p.ratio for p in search(power(1e9, 1.5), start=1e7)] == [HIGHEST]
    assert next_ratio([], 32.0, 40.0, 40.0) == 40.0
    assert next_ratio([Point(40.0, 0.0, 1)], 32.0, 40.0, 40.0) is None


def test_a_stopped_search_goes_on_as_if_it_had_not_been() -> None:
    harm = noisy(200.0, 1.3, 0.05)
    whole = search(harm)
    assert len(whole) > 2
    for count in range(len(whole)):
        assert next_ratio(whole[:count], 32.0, LOWEST, HIGHEST) == whole[count].ratio
