"""Quantising singular vectors by ImPart's algorithm 2 (arXiv 2504.13237): V for the layer's inputs, then U.

U is quantised for the outputs of the quantised V, which are its inputs. Without masks this is GPTQ, without a Hessian
rounding.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..modeling.delta_record import MAX_THRESHOLD
from ..modeling.seeded_mask import keep_mask
from .gptq import DAMPING, Factor, Grid, Quantised, StackError, inverse_factor, mean_diagonal, quantise, shared_factor
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
        U's levels (m, r), sigma as `records.factored` takes it, V's levels (n, r), notes.
    """
    widths_v = widths if widths_v is None else widths_v
    u_side, v_side = (
        Side(part, plane_mask(mask_seed, side, thresholds, part), own, None if scales is None else scales[side])
        for side, (part, own) in enumerate(((u, widths), (v, widths_v)))
    )
    rescaled = sigma * torch.from_numpy(kept_ratios(thresholds) ** -2).to(u)
    outer, inner = (v_side, u_side) if transposed else (u_side, v_side)
    delta = None if delta is None else delta.t() if transposed else delta
    factor = None if hessian is None else shared_factor(hessian)
    done = quantise_sides(outer, inner, rescaled, hessian, factor, delta)
    levels = done.outer.values / done.outer_scale, (done.inner.values / done.inner_scale[:, None]).t()
    levels_u, levels_v = reversed(levels) if transposed else levels
    notes = tuple(dict.fromkeys((*done.inner.notes, *done.outer.notes)))
    return levels_u, done.sigma.double().cpu().numpy(), levels_v, notes


@dataclass(frozen=True)
class Side:
    """U or V, (length, r), with its mask (r, length) or None, its width codes (r,) and its scales (r,) or None.

    Those of a stack of matrices have one more axis in front.
    """

    part: torch.Tensor
    mask: torch.Tensor | None
    widths: np.ndarray
    scale: torch.Tensor | None

    @property
    def ranks(self) -> torch.Tensor | None:
        """Of a stack with absent components, how many each matrix has, (matrices,)."""
        return None

    def fitted(self, start: torch.Tensor | None = None) -> torch.Tensor:
        """Return scales that fit the part, looked for near `start` if that is given."""
        return fit_levels(self.part.t(), self.mask, self.widths, start).scale


@dataclass(frozen=True)
class QuantisedSides:
    """U and V quantised: that of the layer's outputs, `outer` (m, r), and that of its inputs, `inner` (r, n).

    Attributes:
        outer_scale, inner_scale: (r,), the scales of their levels.
        sigma: (r,), singular values times both scales, for U and V in levels.
    """

    outer: Quantised
    outer_scale: torch.Tensor
    inner: Quantised
    inner_scale: torch.Tensor
    sigma: torch.Tensor


def plane_mask(mask_seed: int, side: int, thresholds: np.ndarray, part: torch.Tensor) -> torch.Tensor | None:
    """Return the mask (r, length) of U or V, (length, r); None if it keeps all."""
    if (thresholds == MAX_THRESHOLD).all():
        return None
    return keep_mask(mask_seed, side, thresholds, len(part), part.device)


def quantise_sides(
    u: Side,
    v: Side,
    sigma: torch.Tensor,
    hessian: torch.Tensor | None,
    factor: Factor | None,
    delta: torch.Tensor | None,
) -> QuantisedSides:
    """Quantise V, to which the layer's inputs belong, and then U, or those of a stack of matrices; as `quantised`.

    Args:
        sigma: (r,), singular values times the 1/q^2 of both masks.
        factor: `inverse_factor` of the Hessian.
    """
    scale_v = v.fitted() if v.scale is None else v.scale
    quant_v = quantise(v.part.mT, v.mask, hessian, Grid(scale_v[..., None], v.widths), factor)
    image = quant_v.values if hessian is None else quant_v.values @ hessian
    gram = None if hessian is None and delta is None else image @ quant_v.values.mT
    sigma = sigma * bias_correction(v.part.mT, quant_v.values, v.mask, hessian)
    if delta is not None and gram is not None:
        u = replace(u, part=_best_u(delta, u.part, image, gram, u.ranks))
        u = replace(u, scale=u.fitted(u.scale))
    scale_u = u.fitted() if u.scale is None else u.scale
    # U's inputs are the outputs of the quantised V, each times its sigma.
    hessian_u = None if hessian is None or gram is None else gram * sigma[..., None] * sigma[..., None, :]
    factor_u = None if hessian_u is None else inverse_factor(hessian_u, ranks=u.ranks)
    mask_u = None if u.mask is None else u.mask.mT
    quant_u = quantise(u.part, mask_u, hessian_u, Grid(scale_u[..., None, :], u.widths), factor_u)
    sigma = sigma * bias_correction(u.part.mT, quant_u.values.mT, u.mask) * scale_u * scale_v
    return QuantisedSides(quant_u, scale_u, quant_v, scale_v, sigma)


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
        damping = DAMPING * mean_diagonal(hessian) + torch.finfo(plane.dtype).tiny
        image = kept @ hessian + damping[..., None, None] * kept
    factors = (image * kept).sum(-1) / (image * quantised).sum(-1).clamp_min(torch.finfo(plane.dtype).tiny)
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


def _solved(gram: torch.Tensor, right: torch.Tensor, damping: float, ranks: torch.Tensor | None = None) -> torch.Tensor:
    """Return the X, (r, m), for which (gram + damping) X is `right`; damping is in units of the mean diagonal."""
    damped = gram.clone()
    unit = mean_diagonal(gram, ranks)
    damped.diagonal(dim1=-2, dim2=-1).add_((damping * unit + torch.finfo(gram.dtype).tiny)[..., None])
    lower, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed.any()):  # rounding can make the Gram matrix of rows that are nearly dependent indefinite
        if gram.dim() == 3:
            raise StackError("a Gram matrix is not positive definite")
        return torch.linalg.solve(damped, right)
    return torch.cholesky_solve(right, lower)


def _best_u(
    delta: torch.Tensor, u: torch.Tensor, image: torch.Tensor, gram: torch.Tensor, ranks: torch.Tensor | None
) -> torch.Tensor:
    """Return the U for which U diag(...) times the quantised V^T (r, n) is nearest to delta, in the output.

    Least squares shrinks U by as much as V's error. Each column is therefore scaled so that its component along the
    exact column is right.

    Args:
        image: (r, n), the quantised V^T times the Hessian, if there is one.
        gram: (r, r), `image` times the quantised V.
    """
    fitted = _solved(gram, image @ delta.mT, DAMPING, ranks).mT
    along = (fitted * u).sum(-2, keepdim=True)
    # A column that is not along the exact one is useless: take the exact one.
    least = _LEAST_COSINE * torch.linalg.vector_norm(fitted, dim=-2, keepdim=True)
    return torch.where(along > least, fitted / along, u)
