"""The stages of a compression, by the titles of their bars."""

from ..calibration.sensitivity import STAGE as MEASURING
from ..methods import MethodConfig

SCANNING, DECOMPOSING, ALLOCATING, COMPRESSING, DISTILLING, WRITING = (
    "Scanning", "Decomposing", "Allocating", "Compressing", "Distilling", "Writing",
)  # fmt: skip


def stage_titles(method: MethodConfig, calibrates: bool, distils: bool, scanned: bool = False) -> list[str]:
    """Return the stages of a compression in order.

    Args:
        calibrates: whether there is a calibration text.
        distils: whether its records are trained.
        scanned: whether an earlier run's scan is used.
    """
    first = [] if scanned else [SCANNING]
    measures = [MEASURING] if calibrates else []
    shares = [DECOMPOSING, *measures, ALLOCATING] if method.shares_budget else []
    return [*first, *shares, COMPRESSING, *([DISTILLING] if distils else []), WRITING]
