"""Singular values alone, and then the components of a matrix whose singular values are known.

Sharing bytes out among the matrices of a model needs all their singular values, which take a fraction of the time of
the vectors. Once the bytes are shared out, it is known how many components of a matrix are stored.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch

from ..modeling.precision import full_float32
from .svd import (
    ROUNDING,
    TRUSTED,
    RankRule,
    SvdStack,
    components,
    eigh,
    eigvalsh,
    filled,
    leading_svd,
    leading_svds,
    lower_gram,
    of_vectors,
    roots,
)

_SMALL = 256  # with a shorter side below this, the whole decomposition is faster
_OVERSAMPLING = 1.2  # vectors in the block for each that is wanted
_MOST_VECTORS = 0.4  # of the shorter side; for a larger block, the whole decomposition is faster
# What the polynomial multiplies the last wanted vector by, relative to those that are not wanted; and at most the
# first one between two orthogonalisations, because float32 has seven digits.
_GAIN, _MOST_GAIN = 20.0, 1e6
_TILE = 512
_MOST_DEGREE = 8


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


@full_float32()
def leading_components(
    matrix: torch.Tensor, rank: int, sigma: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the leading components of a matrix whose singular values are known, as `leading_svd` does but faster.

    A random block of somewhat more vectors than are wanted is multiplied by a Chebyshev polynomial of the Gram matrix
    that is small for all values below the block's last (Zhou, Saad, Tiago and Chelikowsky, Phys. Rev. E 74, 2006). Its
    squared error is at most 2 % above that of the best approximation (0.3 % on real deltas), or 1e-6 of the matrix's
    squared norm. The vectors are the best ones within the block: where values are nearly equal, they need not be near
    the exact ones.

    Args:
        matrix: float32 (m, n), finite, on any device.
        rank: the number of components, 1 to min(m, n).
        sigma: float64 (min(m, n),), from `singular_values`.

    Returns:
        U (m, r), sigma (r,) in falling order, V (n, r). The result is deterministic.
    """
    if _is_steep(rank, sigma):
        return leading_svd(matrix, rank)
    scale = float(torch.linalg.vector_norm(matrix, torch.inf))
    if not 1e-8 <= scale <= 1e8:  # squares would leave the range of float32
        u, found, v = leading_components(matrix / scale, rank, sigma / scale)
        return u, found * scale, v
    if matrix.shape[0] < matrix.shape[1]:
        v, found, u = leading_components(matrix.t(), rank, sigma)
    elif size := _block_size(rank, sigma):
        u, found, v = components(matrix, _filtered(matrix, [rank], size, [sigma]), rank)
    else:
        u, found, v = _decomposed(matrix, rank)
    return u, found, v


def decomposed(
    matrix: torch.Tensor, rank: int | RankRule, sigma: np.ndarray | None = None, /
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `leading_svd`, or, with all singular values and the number of components, `leading_components`."""
    return leading_svd(matrix, rank) if sigma is None or callable(rank) else leading_components(matrix, rank, sigma)


def _is_steep(rank: int, sigma: np.ndarray) -> bool:
    """Return whether the last of some components is too small to be exact in the Gram matrix."""
    return bool(sigma[rank - 1] < 2 * TRUSTED * sigma[0])


def _block_size(rank: int, sigma: np.ndarray) -> int:
    """Return how many vectors the block for some components has, 0 if the whole decomposition is faster."""
    size = max(int(_OVERSAMPLING * rank), rank + 8)
    return 0 if len(sigma) < _SMALL or size > _MOST_VECTORS * len(sigma) else size


def _decomposed(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the leading components of a tall matrix, or of each of a stack, from its whole Gram matrix."""
    return of_vectors(matrix, eigh(lower_gram(matrix))[1].flip(-1)[..., :rank])


@full_float32()
def leading_components_of_all(matrices: torch.Tensor, ranks: list[int], sigmas: list[np.ndarray]) -> SvdStack:
    """Return `leading_components` of each matrix of a stack (b, m, n), together where one way suits several.

    Returns:
        U (b, m, r), sigma (b, r), V (b, n, r), with zeros behind a matrix's own components.
    """
    least = 1e-8 * sum(matrices.shape[1:])  # outside this range and 1e8, squares leave the range of float32
    sizes = [_block_size(rank, sigma) for rank, sigma in zip(ranks, sigmas, strict=True)]
    ways: dict[str, list[int]] = {"filter": [], "whole": [], "alone": []}
    for i, (rank, sigma, size) in enumerate(zip(ranks, sigmas, sizes, strict=True)):
        together = least <= sigma[0] <= 1e8 and not _is_steep(rank, sigma)
        ways["alone" if not together else "filter" if size else "whole"].append(i)
    parts: list[tuple[list[int], SvdStack]] = []
    for way in ("filter", "whole"):
        if not (chosen := ways[way]):
            continue
        stack = matrices if len(chosen) == len(matrices) else matrices[chosen]
        own = [ranks[i] for i in chosen]
        tall = stack if stack.shape[1] >= stack.shape[2] else stack.mT
        if way == "filter":
            block = _filtered(tall, own, max(sizes[i] for i in chosen), [sigmas[i] for i in chosen])
            found = components(tall, block, max(own))
        else:
            found = _decomposed(tall, max(own))
        parts.append((chosen, found if tall is stack else found[::-1]))
    if chosen := ways["alone"]:
        rules = [functools.partial(_constant, ranks[i]) for i in chosen]
        parts.append((chosen, leading_svds(matrices[chosen], rules)[0]))
    return filled(matrices, parts, ranks)


def _constant(rank: int, _: np.ndarray) -> int:
    return rank


def _filtered(matrix: torch.Tensor, ranks: list[int], size: int, sigmas: list[np.ndarray]) -> torch.Tensor:
    """Return an orthonormal basis, (..., n, size), of a space that nearly holds the leading right singular vectors.

    Args:
        matrix: (m, n), or a stack (b, m, n), m >= n.
        ranks, sigmas: of each matrix.
    """
    cuts, degree, round_degree = [], 2, _MOST_DEGREE
    for rank, sigma in zip(ranks, sigmas, strict=True):
        # Where values are nearly equal, others than the leading ones serve as well, and all of them have some gain.
        near = 2 * sigma[rank - 1] ** 2 / (1 + math.cosh(math.acosh(_GAIN) / _MOST_DEGREE))
        cut = max(min(sigma[size] ** 2, near), (TRUSTED * sigma[0]) ** 2)
        # Arguments of the Chebyshev polynomial, which is at most 1 for what lies between 0 and the cut.
        last, first = (math.acosh(2 * sigma[i] ** 2 / cut - 1) for i in (rank - 1, 0))
        cuts.append(cut)
        degree = max(degree, math.ceil(math.acosh(_GAIN) / last - 1e-6))
        round_degree = min(round_degree, max(1, int(math.acosh(_MOST_GAIN) / first)))
    rounds = math.ceil(degree / round_degree)
    gram = lower_gram(matrix)
    side = gram.shape[-1]
    for start in range(0, side, _TILE):
        stop = start + _TILE
        gram[..., start:stop, stop:] = gram[..., stop:, start:stop].mT
        block = gram[..., start:stop, start:stop]
        gram[..., start:stop, start:stop] = block.tril() + block.tril(-1).mT
    # The start has one random sign in each row, so that the first product is only a sum of columns.
    places = torch.arange(side, device=gram.device)
    signs = torch.randint(0, 2, (side,), generator=torch.Generator().manual_seed(0)).to(gram) * 2 - 1
    block = gram.new_zeros(*gram.shape[:-1], size)
    block[..., places, places % size] = signs
    image = (gram[..., :size] * signs[:size]).contiguous()
    for start in range(size, side, size):
        more = slice(start, start + size)
        image[..., : len(places[more])] += gram[..., more] * signs[more]
    cut = cuts[0]
    add_product: Callable[..., torch.Tensor] = torch.addmm if gram.dim() == 2 else torch.baddbmm
    if gram.dim() == 3:  # each matrix has a cut of its own: the Gram matrices are scaled so that all are 4
        scale = torch.tensor([4 / cut for cut in cuts]).to(gram)[:, None, None]
        gram, image, cut = gram * scale, image * scale, 4.0
    for number in range(rounds):
        before, block = block, (image if number == 0 else gram @ block).mul_(2 / cut).sub_(block)
        for _ in range(degree * (number + 1) // rounds - degree * number // rounds - 1):
            before, block = block, add_product(before, gram, block, beta=-1, alpha=4 / cut).sub_(block, alpha=2)
        block = torch.linalg.qr(block)[0]
    return block
