"""Singular vectors quantised by ImPart's algorithm 2 (arXiv 2504.13237): V against the layer's inputs, then U.

U is quantised against the inputs as the quantised V passes them on. Without masks it is GPTQ, without a Hessian
rounding.
"""

import numpy as np
import torch

from ..modeling.codebook import EvenLevels, level_codebook
from ..modeling.seeded_mask import keep_mask
from .gptq import DAMPING, Grid, best_scale, quantise
from .record_sizes import kept_ratios, runs

_LLOYD_STEPS = 3
_TINY = 1e-20
_MOST_CORRECTION = 2.0  # more than the bias of any levels: a row of rounding errors alone must not be blown up


def quantised(
    u: torch.Tensor,
    sigma: torch.Tensor,
    v: torch.Tensor,
    thresholds: np.ndarray,
    widths: np.ndarray,
    mask_seed: int,
    hessian: torch.Tensor | None,
    *,
    widths_v: np.ndarray | None = None,
    delta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, np.ndarray, torch.Tensor, tuple[str, ...]]:
    """Levels for U and V, masked and quantised (algorithm 2): between -1 and 1, or for normally distributed numbers.

    Args:
        u, sigma, v: float32 of shapes (m, r), (r,), (n, r).
        thresholds: uint16 (r,), of the masks of both.
        widths: (r,), width codes of each component's values: bits, or of `NORMAL_LEVELS`.
        mask_seed: the record's.
        hessian: float32 (n, n), or None.
        widths_v: those of V's values, if they are others than U's.
        delta: float32 (m, n), if U is to make up for the error of the quantised V: then the U that goes best with that
            is quantised instead, each of its columns as long as it is along the exact one.

    Returns:
        U's levels (m, r), sigma as `factored_record` takes it, V's levels (n, r), notes.
    """
    widths_v = widths if widths_v is None else widths_v
    mask_u, mask_v = (
        keep_mask(mask_seed, side, thresholds, len(part), part.device) for side, part in enumerate((u, v))
    )
    scale_v = level_scales(v.t(), mask_v, widths_v)
    rescale = torch.from_numpy(kept_ratios(thresholds) ** -2).to(u)
    found_v = quantise(v.t(), mask_v, hessian, Grid(scale_v[:, None], widths_v))
    scaled_sigma = sigma * rescale * unbiased(v.t(), found_v.values, mask_v, hessian)
    if delta is not None:
        u = _best_partner(delta, u, found_v.values, hessian)
    scale_u = level_scales(u.t(), mask_u, widths)
    passed = None
    if hessian is not None:
        factor = found_v.values * scaled_sigma[:, None]
        passed = factor @ hessian @ factor.t()
    found_u = quantise(u, mask_u.t(), passed, Grid(scale_u[None], widths))
    scaled_sigma *= unbiased(u.t(), found_u.values.t(), mask_u) * scale_u * scale_v
    notes = tuple(dict.fromkeys((*found_v.notes, *found_u.notes)))
    return found_u.values / scale_u, scaled_sigma.double().cpu().numpy(), (found_v.values / scale_v[:, None]).t(), notes


def unbiased(
    plane: torch.Tensor, quantised: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor | None = None
) -> torch.Tensor:
    """Factors <x, x> / <x, Q(x)> by which the rows of a quantised plane become right on average, shape (rows,).

    The levels with the least error lie closer to zero than the values they stand for (2 bits: 12 % of the squared
    norm). Such a bias adds up over a model where noise averages out, and taking it out again costs no byte.

    Args:
        plane, quantised: float32 (rows, length), what was quantised, and to what.
        mask: bool (rows, length), what is kept.
        hessian: float32 (length, length): the inner products are then those of outputs on the calibration text.
    """
    kept = plane * mask
    image = kept
    if hessian is not None:
        # Damped as in GPTQ: a row may answer to inputs that the calibration text hardly holds
        image = kept @ hessian + (DAMPING * hessian.diagonal().mean() + torch.finfo(plane.dtype).tiny) * kept
    factors = (image * kept).sum(1) / (image * quantised).sum(1).clamp_min(torch.finfo(plane.dtype).tiny)
    return factors.clamp(1 / _MOST_CORRECTION, _MOST_CORRECTION)


def level_scales(plane: torch.Tensor, mask: torch.Tensor, widths: np.ndarray) -> torch.Tensor:
    """For a plane (r, length) the scales, (r,), of the levels of its width codes, with about the least error."""

    def scales(plane: torch.Tensor, mask: torch.Tensor, width: int) -> torch.Tensor:
        if isinstance(level_codebook(width), EvenLevels):
            return best_scale(plane, mask, width)
        kept = plane * mask
        scale = (kept.square().sum(1) / mask.sum(1).clamp_min(1)).sqrt().clamp_min(_TINY)
        for _ in range(_LLOYD_STEPS):  # right at once where values are distributed so
            grid = Grid(scale[:, None], np.full(len(plane), width))
            levels = grid.values(grid.codes(plane)).mul_(mask).div_(scale[:, None])
            scale = ((levels * kept).sum(1) / levels.square().sum(1).clamp_min(_TINY)).clamp_min(_TINY)
        return scale

    return torch.cat([scales(plane[part], mask[part], width) for width, part in runs(widths)])


def cosines(plane: torch.Tensor, mask: torch.Tensor, widths: np.ndarray) -> torch.Tensor:
    """Between the rows of a plane (r, length), as far as a mask keeps them, and themselves rounded: (r,)."""
    scale = level_scales(plane, mask, widths)[:, None]
    grid = Grid(scale, widths)
    return torch.nn.functional.cosine_similarity(plane * mask, grid.values(grid.codes(plane)).mul_(mask))


def least_squares(
    rows: torch.Tensor, delta: torch.Tensor, damping: float, hessian: torch.Tensor | None = None
) -> torch.Tensor:
    """The X, (r, m), for which X^T `rows` is nearest to delta (m, n), in the output if there is a Hessian (n, n).

    Args:
        rows: float32 (r, n).
        damping: added to the diagonal of their inner products, in units of its mean.
    """
    image = rows if hessian is None else rows @ hessian
    gram = image @ rows.t()
    gram.diagonal().add_(damping * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    return torch.linalg.solve(gram, image @ delta.t())


def _best_partner(
    delta: torch.Tensor, u: torch.Tensor, rows: torch.Tensor, hessian: torch.Tensor | None
) -> torch.Tensor:
    """The U for which U diag(...) `rows` (r, n) is nearest to delta, in the output if there is a Hessian.

    Least squares would shrink it, by as much as V's error; so each column is stretched until its part along the exact
    one is right.
    """
    found = least_squares(rows, delta, DAMPING, hessian).t()
    along = (found * u).sum(0)
    # Where nothing is right about it, the exact one is the better guess
    return torch.where(along > 0, found / along, u)
