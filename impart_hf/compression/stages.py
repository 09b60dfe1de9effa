"""The stages of a compression, by the titles of their bars."""

from ..methods import MethodConfig

SCANNING, DECOMPOSING, ALLOCATING, COMPRESSING, DISTILLING, WRITING = (
    "Scanning", "Decomposing", "Allocating", "Compressing", "Distilling", "Writing",
)  # fmt: skip


def stage_titles(method: MethodConfig, distils: bool, scanned: bool = False) -> list[str]:
    """Return the stages of a compression in order.

    Args:
        distils: whether its records are trained.
        scanned: whether an earlier run's scan is used.
    """
    first = [] if scanned else [SCANNING]
    shares = [DECOMPOSING, ALLOCATING] if method.shares_budget else []
    return [*first, *shares, COMPRESSING, *([DISTILLING] if distils else []), WRITING]
