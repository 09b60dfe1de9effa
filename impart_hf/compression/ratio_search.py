"""The search for the highest compression ratio at which a measured harm stays within what is allowed.

Harm grows with the ratio, nearly as a power of it, up to noise. So the search works on logarithms: it extrapolates a
line through measured points until one keeps the target and one does not, then interpolates between these two, and
halves the interval where the line leads nowhere. It is a pure function of the points that are known, so that a search
that was stopped goes on from them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The result is known well enough if a ratio higher by this share, or a repository smaller by it, breaks the target.
PRECISION = 0.02
MOST_POINTS = 12
_STEP = 8.0  # the most by which a ratio is changed beyond what has been measured
_USUAL_SLOPE = 1.5  # of log harm against log ratio, from KL of real fine-tunes between ratios 32 and 400
_LEAST_SLOPE, _MOST_SLOPE = 0.25, 4.0  # a line that is flatter or steeper is not trusted
_NEAR = 2.0  # nor is one through points whose ratios differ by more than this
_SAME_SIZE = 0.003


@dataclass(frozen=True)
class Point:
    """One ratio that was tried.

    Attributes:
        ratio: the requested compression ratio.
        harm: what was measured, over what is allowed: the target is kept if it is at most 1. NaN counts as infinite.
        bytes: size of the repository.
    """

    ratio: float
    harm: float
    bytes: int

    @property
    def keeps_target(self) -> bool:
        return self.harm <= 1


def best(points: Sequence[Point]) -> Point | None:
    """Return the point with the highest ratio that keeps the target; None if none does."""
    return max((point for point in points if point.keeps_target), key=lambda point: point.ratio, default=None)


def next_ratio(points: Sequence[Point], start: float, lowest: float, highest: float) -> float | None:
    """Return the ratio to try next, of four digits; None if the search is over.

    It is over when `best` is known to `PRECISION`, when the highest ratio keeps the target, when the lowest one breaks
    it, when lower ratios give no larger repository, or after `MOST_POINTS` points.

    Args:
        points: what was tried, in that order.
        start: the first ratio to try.
        lowest, highest: the ratios between which to search.
    """
    if not points:
        return _digits(min(max(start, lowest), highest))
    if len(points) >= MOST_POINTS:
        return None
    kept = best(points)
    found = _lower(points, lowest) if kept is None else _higher_or_between(points, kept, highest)
    if found is None:
        return None
    ratio = _digits(min(max(found, lowest), highest))
    return None if any(ratio == point.ratio for point in points) else ratio


def _digits(ratio: float) -> float:
    """Round a ratio, so that it is read easily and does not depend on how sums were rounded."""
    return float(f"{ratio:.4g}")


def _lower(points: Sequence[Point], lowest: float) -> float | None:
    """Return a lower ratio than all that were tried, which all break the target."""
    least, *others = sorted(points, key=lambda point: point.ratio)
    if least.ratio <= _digits(lowest):
        return None
    if others and others[0].bytes > least.bytes * (1 - _SAME_SIZE):
        return None  # the method has no use for more bytes
    root = _root(least, points) or least.ratio / _STEP
    return min(max(root / _margin(), least.ratio / _STEP), least.ratio / _least_step(points))


def _higher_or_between(points: Sequence[Point], kept: Point, highest: float) -> float | None:
    """Return a ratio above the best one."""
    above = min((point for point in points if point.ratio > kept.ratio), key=lambda p: p.ratio, default=None)
    if kept.ratio >= _digits(highest):
        return None
    if above is not None and min(above.ratio / kept.ratio, kept.bytes / above.bytes) <= 1 + PRECISION:
        return None
    root = _root(kept, points, trusted=True)
    if root is not None and kept.ratio <= root <= kept.ratio * (1 + PRECISION):
        return None
    if above is None:
        root = _root(kept, points) or kept.ratio * _STEP
        return max(min(root / _margin(), kept.ratio * _STEP), kept.ratio * _least_step(points))
    middle = math.sqrt(kept.ratio * above.ratio)
    line = _line(kept, above)
    if line is None or not _is_narrowing(points, kept, above):
        return middle
    guess = kept.ratio * kept.harm ** (-1 / line)
    # Harm mostly grows faster at higher ratios: then this is too low, and the line through lower points too high.
    if (beyond := _root(kept, [p for p in points if p.ratio < kept.ratio], trusted=True)) is not None:
        guess = math.sqrt(guess * min(beyond, above.ratio))
    guess /= _margin()
    first, last = kept.ratio * _margin(), above.ratio / _margin()
    return middle if first > last else min(max(guess, first), last)


def _margin() -> float:
    """The factor by which a ratio is tried below the one where the target is expected, so that it is likely kept."""
    return 1 + PRECISION / 2


def _least_step(points: Sequence[Point]) -> float:
    """The factor by which a ratio is changed at least beyond all that were tried, larger with each that was."""
    return (1 + PRECISION) ** (2 ** (len(points) - 1))


def _root(point: Point, points: Sequence[Point], trusted: bool = False) -> float | None:
    """Return the ratio at which a line through a point reaches the target; None if there is no logarithm of its harm.

    The line's slope is that to the nearest other point, within limits.

    Args:
        trusted: return None if the slope is beyond the limits, or the other point is far away or missing.
    """
    if not 0 < point.harm < math.inf:
        return None
    others = [other for other in points if other.ratio != point.ratio]
    nearest = min(others, key=lambda other: abs(math.log(other.ratio / point.ratio)), default=None)
    slope = None if nearest is None else _line(point, nearest)
    if trusted:
        if nearest is None or slope is None or not _LEAST_SLOPE <= slope <= _MOST_SLOPE:
            return None
        if max(nearest.ratio / point.ratio, point.ratio / nearest.ratio) > _NEAR:
            return None
    slope = _USUAL_SLOPE if slope is None else min(max(slope, _LEAST_SLOPE), _MOST_SLOPE)
    return point.ratio * point.harm ** (-1 / slope)


def _line(one: Point, other: Point) -> float | None:
    """Return the slope of log harm against log ratio between two points; None if it is not defined."""
    if not (0 < one.harm < math.inf and 0 < other.harm < math.inf):
        return None
    return math.log(other.harm / one.harm) / math.log(other.ratio / one.ratio)


def _is_narrowing(points: Sequence[Point], kept: Point, above: Point) -> bool:
    """Return whether the last two points have halved the interval in which the target is broken, or there was none."""
    before = points[:-2]
    kept_before = best(before)
    if kept_before is None:
        return True
    above_before = min((p.ratio for p in before if p.ratio > kept_before.ratio), default=None)
    if above_before is None:
        return True
    return math.log(above.ratio / kept.ratio) <= 0.5 * math.log(above_before / kept_before.ratio)
