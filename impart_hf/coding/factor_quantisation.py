"""Quantising singular vectors by ImPart's algorithm 2 (arXiv 2504.13237): V for the layer's inputs, then U.

U is quantised for the outputs of the quantised V, which are its inputs. Without masks this is GPTQ, without a Hessian
rounding.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..modeling.delta_record import MAX_THRESHOLD
from ..modeling.seeded_mask import keep_mask
from .gptq import DAMPING, Grid, quantise, shared_factor
from .level_scales import fit_levels
from .record_sizes import kept_ratios

# A column of the best U is scaled up by the inverse of its cosine with the exact one. If that is below this, as with
# equal singular values and vectors of few entries, the column is mostly error, and scaling would make it huge.
_LEAST_COSINE = 0.25
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
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
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
        scales: (r,) and (r,), the scales that `fit_levels` gives the levels of U and V, if they are known.
        delta: float32 (m, n), if U is to compensate for the error of the quantised V: the U that fits the quantised V
            best is then quantised instead, each column scaled so that its component along the exact column is right.
        transposed: whether the layer's inputs belong to U, so that U and V change roles: U is quantised first, and V
            for its outputs.

    Returns:
        U's levels (m, r), sigma as `factored_record` takes it, V's levels (n, r), notes.
    """
    widths_v = widths if widths_v is None else widths_v
    side_u, side_v = (
        _Side(part, plane_mask(mask_seed, side, thresholds, part), own, None if scales is None else scales[side])
        for side, (part, own) in enumerate(((u, widths), (v, widths_v)))
    )
    rescaled = sigma * torch.from_numpy(kept_ratios(thresholds) ** -2).to(u)
    if not transposed:
        return _quantised(side_u, side_v, rescaled, hessian, delta)
    delta = None if delta is None else delta.t()
    outer, scaled, inner, notes = _quantised(side_v, side_u, rescaled, hessian, delta)
    return inner, scaled, outer, notes


@dataclass(frozen=True)
class _Side:
    """U or V, (length, r), with its mask (r, length) or None, its width codes (r,) and its scales (r,) or None."""

    part: torch.Tensor
    mask: torch.Tensor | None
    widths: np.ndarray
    scale: torch.Tensor | None

    def fitted(self) -> torch.Tensor:
        return fit_levels(self.part.t(), self.mask, self.widths).scale if self.scale is None else self.scale


def plane_mask(mask_seed: int, side: int, thresholds: np.ndarray, part: torch.Tensor) -> torch.Tensor | None:
    """Return the mask (r, length) of U or V, (length, r); None if it keeps all."""
    if (thresholds == MAX_THRESHOLD).all():
        return None
    return keep_mask(mask_seed, side, thresholds, len(part), part.device)


def _quantised(
    u: _Side, v: _Side, sigma: torch.Tensor, hessian: torch.Tensor | None, delta: torch.Tensor | None
) -> tuple[torch.Tensor, np.ndarray, torch.Tensor, tuple[str, ...]]:
    """Quantise V, to which the layer's inputs belong, and then U; as `quantised`."""
    scale_v = v.fitted()
    factor = None if hessian is None else shared_factor(hessian)
    quant_v = quantise(v.part.t(), v.mask, hessian, Grid(scale_v[:, None], v.widths), factor)
    image = quant_v.values if hessian is None else quant_v.values @ hessian
    gram = None if hessian is None and delta is None else image @ quant_v.values.t()
    sigma = sigma * bias_correction(v.part.t(), quant_v.values, v.mask, hessian)
    if delta is not None and gram is not None:
        best = _best_u(delta, u.part, image, gram)
        u = replace(u, part=best, scale=fit_levels(best.t(), u.mask, u.widths, u.scale).scale)
    scale_u = u.fitted()
    # U's inputs are the outputs of the quantised V, each times its sigma.
    hessian_u = None if hessian is None or gram is None else gram * sigma[:, None] * sigma
    quant_u = quantise(u.part, None if u.mask is None else u.mask.t(), hessian_u, Grid(scale_u[None], u.widths))
    sigma = sigma * bias_correction(u.part.t(), quant_u.values.t(), u.mask) * scale_u * scale_v
    notes = tuple(dict.fromkeys((*quant_v.notes, *quant_u.notes)))
    return quant_u.values / scale_u, sigma.double().cpu().numpy(), (quant_v.values / scale_v[:, None]).t(), notes


def bias_correction(
    plane: torch.Tensor, quantised: torch.Tensor, mask: torch.Tensor | None, hessian: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the factors <x, x> / <x, Q(x)>, (rows,), that remove the bias of the rows of a quantised plane.

    Levels with the least error are closer to zero than the values that they replace (2 bits: 12 % of the squared
    norm). Such a bias accumulates over a model, whereas noise averages out, and removing it costs no bytes.

    Args:
        plane, quantised: float32 (rows, length), before and after quantisation.
        mask: bool (rows, length), true where an entry is kept; None keeps all.
        hessian: float32 (length, length); if given, the inner products are those of outputs on the calibration text.
    """
    kept = plane if mask is None else plane * mask
    image = kept
    if hessian is not None:
        # Damped as in GPTQ: a row may respond to inputs that are rare in the calibration text.
        image = kept @ hessian + (DAMPING * hessian.diagonal().mean() + torch.finfo(plane.dtype).tiny) * kept
    factors = (image * kept).sum(1) / (image * quantised).sum(1).clamp_min(torch.finfo(plane.dtype).tiny)
    return factors.clamp(1 / _MOST_CORRECTION, _MOST_CORRECTION)


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
    return _solved(image @ rows.t(), image @ delta.t(), damping)


def _solved(gram: torch.Tensor, right: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the X, (r, m), for which (gram + damping) X is `right`; damping is in units of the mean diagonal."""
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    lower, failed = torch.linalg.cholesky_ex(damped)
    # Rounding can make the Gram matrix of rows that are nearly dependent indefinite.
    return torch.linalg.solve(damped, right) if bool(failed) else torch.cholesky_solve(right, lower)


def _best_u(delta: torch.Tensor, u: torch.Tensor, image: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return the U for which U diag(...) times the quantised V^T (r, n) is nearest to delta, in the output.

    Least squares shrinks U by as much as V's error. Each column is therefore scaled so that its component along the
    exact column is right.

    Args:
        image: (r, n), the quantised V^T times the Hessian, if there is one.
        gram: (r, r), `image` times the quantised V.
    """
    fitted = _solved(gram, image @ delta.t(), DAMPING).t()
    along = (fitted * u).sum(0)
    # A column that is not along the exact one is useless: take the exact one.
    return torch.where(along > _LEAST_COSINE * torch.linalg.vector_norm(fitted, dim=0), fitted / along, u)
