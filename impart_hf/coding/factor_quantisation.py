"""Quantising singular vectors by ImPart's algorithm 2 (arXiv 2504.13237): V for the layer's inputs, then U.

U is quantised for the outputs of the quantised V, which are its inputs. Without masks this is GPTQ, without a Hessian
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
_MOST_CORRECTION = 2.0  # exceeds the bias of any levels; limits the factor of a row that is mostly rounding error


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
    transposed: bool = False,
) -> tuple[torch.Tensor, np.ndarray, torch.Tensor, tuple[str, ...]]:
    """Mask and quantise U and V (algorithm 2).

    Args:
        u, sigma, v: float32 of shapes (m, r), (r,), (n, r).
        thresholds: uint16 (r,), for the masks of both.
        widths: (r,), width codes of each component's values: evenly spaced levels, or those in `NORMAL_LEVELS`.
        mask_seed: the record's mask seed.
        hessian: float32 (n, n), or (m, m) if `transposed`, or None.
        widths_v: width codes of V's values, if they differ from U's.
        delta: float32 (m, n), if U is to compensate for the error of the quantised V: the U that fits the quantised V
            best is then quantised instead, each column scaled so that its component along the exact column is right.
        transposed: whether the layer's inputs belong to U, so that U and V change roles: U is quantised first, and V
            for its outputs.

    Returns:
        U's levels (m, r), sigma as `factored_record` takes it, V's levels (n, r), notes.
    """
    widths_v = widths if widths_v is None else widths_v
    mask_u, mask_v = (
        keep_mask(mask_seed, side, thresholds, len(part), part.device) for side, part in enumerate((u, v))
    )
    if transposed:
        delta = None if delta is None else delta.t()
        outer, scaled, inner, notes = _quantised(
            v, sigma, u, mask_v, mask_u, thresholds, widths_v, widths, hessian, delta
        )
        return inner, scaled, outer, notes
    return _quantised(u, sigma, v, mask_u, mask_v, thresholds, widths, widths_v, hessian, delta)


def _quantised(
    u: torch.Tensor,
    sigma: torch.Tensor,
    v: torch.Tensor,
    mask_u: torch.Tensor,
    mask_v: torch.Tensor,
    thresholds: np.ndarray,
    widths: np.ndarray,
    widths_v: np.ndarray,
    hessian: torch.Tensor | None,
    delta: torch.Tensor | None,
) -> tuple[torch.Tensor, np.ndarray, torch.Tensor, tuple[str, ...]]:
    """Quantise V, to which the layer's inputs belong, and then U; as `quantised`, with the masks (r, m) and (r, n)."""
    scale_v = level_scales(v.t(), mask_v, widths_v)
    rescale = torch.from_numpy(kept_ratios(thresholds) ** -2).to(u)
    quant_v = quantise(v.t(), mask_v, hessian, Grid(scale_v[:, None], widths_v))
    scaled_sigma = sigma * rescale * bias_correction(v.t(), quant_v.values, mask_v, hessian)
    if delta is not None:
        u = _best_u(delta, u, quant_v.values, hessian)
    scale_u = level_scales(u.t(), mask_u, widths)
    hessian_u = None
    if hessian is not None:
        factor = quant_v.values * scaled_sigma[:, None]
        hessian_u = factor @ hessian @ factor.t()
    quant_u = quantise(u, mask_u.t(), hessian_u, Grid(scale_u[None], widths))
    scaled_sigma *= bias_correction(u.t(), quant_u.values.t(), mask_u) * scale_u * scale_v
    notes = tuple(dict.fromkeys((*quant_v.notes, *quant_u.notes)))
    return quant_u.values / scale_u, scaled_sigma.double().cpu().numpy(), (quant_v.values / scale_v[:, None]).t(), notes


def bias_correction(
    plane: torch.Tensor, quantised: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the factors <x, x> / <x, Q(x)>, (rows,), that remove the bias of the rows of a quantised plane.

    Levels with the least error are closer to zero than the values that they replace (2 bits: 12 % of the squared
    norm). Such a bias accumulates over a model, whereas noise averages out, and removing it costs no bytes.

    Args:
        plane, quantised: float32 (rows, length), before and after quantisation.
        mask: bool (rows, length), true where an entry is kept.
        hessian: float32 (length, length); if given, the inner products are those of outputs on the calibration text.
    """
    kept = plane * mask
    image = kept
    if hessian is not None:
        # Damped as in GPTQ: a row may respond to inputs that are rare in the calibration text.
        image = kept @ hessian + (DAMPING * hessian.diagonal().mean() + torch.finfo(plane.dtype).tiny) * kept
    factors = (image * kept).sum(1) / (image * quantised).sum(1).clamp_min(torch.finfo(plane.dtype).tiny)
    return factors.clamp(1 / _MOST_CORRECTION, _MOST_CORRECTION)


def level_scales(plane: torch.Tensor, mask: torch.Tensor, widths: np.ndarray) -> torch.Tensor:
    """Return the scales, (r,), of the levels of a plane (r, length) that give about the least squared error."""

    def scales(plane: torch.Tensor, mask: torch.Tensor, width: int) -> torch.Tensor:
        if isinstance(level_codebook(width), EvenLevels):
            return best_scale(plane, mask, width)
        kept = plane * mask
        scale = (kept.square().sum(1) / mask.sum(1).clamp_min(1)).sqrt().clamp_min(_TINY)
        for _ in range(_LLOYD_STEPS):  # for normally distributed values, the first scale is already right
            grid = Grid(scale[:, None], np.full(len(plane), width))
            levels = grid.values(grid.codes(plane)).mul_(mask).div_(scale[:, None])
            scale = ((levels * kept).sum(1) / levels.square().sum(1).clamp_min(_TINY)).clamp_min(_TINY)
        return scale

    return torch.cat([scales(plane[part], mask[part], width) for width, part in runs(widths)])


def cosines(plane: torch.Tensor, mask: torch.Tensor, widths: np.ndarray) -> torch.Tensor:
    """Return the cosines, (r,), between the rows of a masked plane (r, length) and the same rows rounded."""
    scale = level_scales(plane, mask, widths)[:, None]
    grid = Grid(scale, widths)
    return torch.nn.functional.cosine_similarity(plane * mask, grid.values(grid.codes(plane)).mul_(mask))


def least_squares(
    rows: torch.Tensor, delta: torch.Tensor, damping: float, hessian: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the X, (r, m), for which X^T `rows` is nearest to delta (m, n).

    Args:
        rows: float32 (r, n).
        damping: added to the diagonal of the rows' inner products, in units of its mean.
        hessian: (n, n); if given, X^T `rows` is nearest in the layer's output.
    """
    image = rows if hessian is None else rows @ hessian
    gram = image @ rows.t()
    gram.diagonal().add_(damping * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    return torch.linalg.solve(gram, image @ delta.t())


def _best_u(delta: torch.Tensor, u: torch.Tensor, rows: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
    """Return the U for which U diag(...) `rows` (r, n) is nearest to delta, in the output if there is a Hessian.

    Least squares shrinks U by as much as V's error. Each column is therefore scaled so that its component along the
    exact column is right.
    """
    fitted = least_squares(rows, delta, DAMPING, hessian).t()
    along = (fitted * u).sum(0)
    # A column without a positive component along the exact one is useless: take the exact one.
    return torch.where(along > 0, fitted / along, u)
