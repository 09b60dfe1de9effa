"""Singular values alone, and then the components of a matrix whose singular values are known.

Sharing bytes out among the matrices of a model needs all their singular values, which take a fraction of the time of
the vectors. Once the bytes are shared out, it is known how many components of a matrix are stored.
"""

import numpy as np
import torch

from ..modeling.precision import full_float32
from .svd import ROUNDING, TRUSTED, eigvalsh, leading_svd, lower_gram, roots


@full_float32()
def singular_values(matrix: torch.Tensor) -> np.ndarray:
    """Return all singular values of matrices of one shape.

    They are the roots of the eigenvalues of the Gram matrix of the shorter side. If most of them are too small to be
    exact there, they are computed from what is left without the components that are large enough.

    Args:
        matrix: float32 (..., m, n), finite, on any device.

    Returns:
        float64 (..., min(m, n)), falling; values below 1e-5 of the largest may be 0.
    """
    tall = matrix if matrix.shape[-2] >= matrix.shape[-1] else matrix.mT
    scale = tall.abs().amax((-2, -1), keepdim=True)
    if bool(((scale > 0) & (scale < 1e-8) | (scale > 1e8)).any()):  # squares would leave the range of float32
        tall = tall / torch.where(scale > 0, scale, 1.0)
    else:
        scale = torch.ones_like(scale)
    values = roots(eigvalsh(lower_gram(tall)).flip(-1))
    side, flat = values.shape[-1], values.reshape(-1, values.shape[-1])
    for one, sigma in zip(tall.reshape(-1, *tall.shape[-2:]), flat, strict=True):
        _refine(one, sigma, ROUNDING * sigma[0])
    return flat.reshape(*matrix.shape[:-2], side) * scale[..., 0].double().cpu().numpy()


def _refine(matrix: torch.Tensor, sigma: np.ndarray, least: float) -> None:
    """Replace the inexact values of a tall matrix, if most are: by 0 if all they belong to has a norm below `least`."""
    clear = int((sigma >= TRUSTED * sigma[0]).sum())
    if 2 * clear >= len(sigma):
        return
    u, exact, v = leading_svd(matrix, clear)
    rest = torch.addmm(matrix, u * exact, v.t(), alpha=-1)
    if float(rest.norm()) <= least:
        sigma[clear:] = 0
        return
    # Of the rest, whose shorter side is the same, as many values are 0 as have been subtracted.
    values = roots(eigvalsh(lower_gram(rest)).flip(0))[: len(sigma) - clear]
    _refine(rest, values, least)
    sigma[clear:] = np.minimum(values, sigma[clear - 1])


def leading_components(
    matrix: torch.Tensor, rank: int, sigma: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the leading components of a matrix whose singular values are known, as `leading_svd` does.

    Args:
        matrix: float32 (m, n), finite, on any device.
        rank: the number of components, 1 to min(m, n).
        sigma: float64 (min(m, n),), from `singular_values`.
    """
    return leading_svd(matrix, rank)
