"""The stages of a compression, by the titles of their bars."""

from ..calibration.sensitivity import STAGE as MEASURING
from ..methods import MethodConfig

SCANNING, STORING, DECOMPOSING, ALLOCATING, COMPRESSING, DISTILLING, WRITING = (
    "Scanning", "Storing exactly", "Decomposing", "Allocating", "Compressing", "Distilling", "Writing",
)  # fmt: skip


EXACT_STAGES = [STORING, WRITING]  # of method `exact`, after the scan


def stage_titles(method: MethodConfig, calibrates: bool, distils: bool, exactly: bool = False) -> list[str]:
    """Return the stages of a compression in order, after the scan.

    Args:
        calibrates: whether there is a calibration text.
        distils: whether its records are trained.
        exactly: whether some tensors are stored exactly.
    """
    first = [STORING] if exactly else []
    measures = [MEASURING] if calibrates else []
    shares = [DECOMPOSING, *measures, ALLOCATING] if method.shares_budget else []
    return [*first, *shares, COMPRESSING, *([DISTILLING] if distils else []), WRITING]
