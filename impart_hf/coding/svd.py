"""The leading part of a delta's singular value decomposition, which is all that any method uses.

Methods need a small part of the spectrum: at ratio 32 a square matrix has room for 1/64 of its singular vectors, and
ImPart spreads that over a few times as many. So the leading vectors are sought in a growing block Krylov space, and
the whole Gram matrix is decomposed only where that is small, or where so many components are wanted that it takes no
longer (scripts/benchmark_compress.py prints times and accuracy).
"""

from collections.abc import Callable

import numpy as np
import torch

RankRule = Callable[[np.ndarray], int]
Svd = Callable[[torch.Tensor, RankRule], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

_SMALL = 1024  # a shorter side under this is decomposed whole: faster than any iteration
_BLOCK = 64  # vectors multiplied at a time: fewer need a smaller space, more use the processor better
_MOST_WANTED = 1 / 8  # of the shorter side; where more is wanted, the whole decomposition takes no longer
_LARGEST_SPACE = 0.45  # of the shorter side
_GROWTH = 1.3  # of the Krylov space from one test of convergence to the next
# Residuals ||A^T A v - theta v||, relative to theta. The error of theta is of second order in them: singular values
# come out 2e-4 under the exact ones at most, the reconstruction error 1e-5 above the optimum (relative).
_RESIDUAL = 0.01
# Squaring the matrix blurs singular values under this share of the largest: those are sought in what the larger leave.
_TRUSTED = 1e-2
_ROUNDING = 1e-5  # ... unless what they leave is no more than rounding errors of this size
_PROBES, _PROBE_STEPS = 16, 5


def leading_svd(matrix: torch.Tensor, rank: int | RankRule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values of a matrix and their vectors.

    Args:
        matrix: float32 of shape (m, n), finite, on any device.
        rank: how many; 1 to min(m, n). Where the number follows from the values themselves, a function that takes
            the leading singular values (float64, falling; as yet a little too small, or only a few of them) and
            returns how many are wanted, or more than it was given if it has to see more of them. It must not want
            more when the values it is given are larger.

    Returns:
        U of shape (m, r), sigma of shape (r,) in falling order, V of shape (n, r). The same on every call.
    """
    wanted = rank if callable(rank) else lambda _: rank
    scale = float(torch.linalg.vector_norm(matrix, torch.inf))
    if 0 < scale < 1e-8 or scale > 1e8:  # squares would leave the range of float32
        u, sigma, v = leading_svd(matrix / scale, lambda s: wanted(s * scale))
        return u, sigma * scale, v
    if matrix.shape[0] < matrix.shape[1]:
        v, sigma, u = _tall_svd(matrix.t(), wanted, np.empty(0))
    else:
        u, sigma, v = _tall_svd(matrix, wanted, np.empty(0))
    return u, sigma, v


def _tall_svd(
    matrix: torch.Tensor, wanted: RankRule, above: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`leading_svd` of what is left of a matrix (m, n), m >= n, when its singular values `above` are taken out."""
    side = matrix.shape[1] - len(above)

    def count(sigma: np.ndarray) -> int:
        return max(1, min(side, wanted(np.concatenate([above, sigma])) - len(above)))

    v = _krylov_vectors(matrix, count) if matrix.shape[1] >= _SMALL else None
    u, sigma, v = _components(matrix, all_vectors(matrix, count) if v is None else v)
    clear = int((sigma >= _TRUSTED * sigma[0]).sum())
    if clear == len(sigma) or len(sigma) > side // 2:
        return u, sigma, v
    rest = torch.addmm(matrix, u[:, :clear] * sigma[:clear], v[:, :clear].t(), alpha=-1)
    found = np.concatenate([above, sigma[:clear].double().cpu().numpy()])
    if float(rest.norm()) <= _ROUNDING * found[0]:
        return u, sigma, v
    parts = _tall_svd(rest, wanted, found)
    u, sigma, v = (torch.cat([a[..., :clear], b], -1) for a, b in zip((u, sigma, v), parts, strict=True))
    return u, sigma, v


def _components(matrix: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular components of the matrix within the space of the orthonormal columns of `v`."""
    projected = matrix @ v
    if v.shape[1] <= max(matrix.shape[1] // 2, _SMALL):
        # Turned so that U's columns become orthogonal too, which is more exact than the vectors' order was;
        # for most vectors of a large matrix it would take too long
        _, turn = torch.linalg.eigh((projected.t() @ projected).double())
        turn = turn.flip(1).to(v.dtype)
        projected, v = projected @ turn, v @ turn
    sigma = projected.norm(dim=0)
    # Rounding can leave neighbours of nearly equal size in the wrong order
    order = torch.argsort(sigma, descending=True, stable=True)
    sigma, v, projected = sigma[order], v[:, order], projected[:, order]
    return projected / sigma.clamp_min(torch.finfo(sigma.dtype).tiny), sigma, v


def _roots(eigenvalues: torch.Tensor) -> np.ndarray:
    """The singular values, float64, that belong to eigenvalues of a Gram matrix."""
    return eigenvalues.clamp_min(0).double().sqrt().cpu().numpy()


def all_vectors(matrix: torch.Tensor, count: RankRule) -> torch.Tensor:
    """Leading right singular vectors, (n, r), from the whole Gram matrix."""
    side = matrix.shape[1]
    gram = torch.zeros(side, side, dtype=matrix.dtype, device=matrix.device)
    step = -(-side // 8)
    for start in range(0, side, step):  # eigh reads the lower triangle alone
        gram[start:, start : start + step] = matrix[:, start:].t() @ matrix[:, start : start + step]
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1)[:, : count(_roots(eigenvalues.flip(0)))]


def _krylov_vectors(matrix: torch.Tensor, count: RankRule) -> torch.Tensor | None:
    """Leading right singular vectors, (n, r), by block Lanczos with full orthogonalisation; None if it is too slow.

    The space grows by A^T A times its newest block, until the residuals of all wanted Ritz vectors are small.
    """
    side = matrix.shape[1]
    # No fewer are wanted than if all that are not known were as large as they can be
    if count(np.ones(side)) > _MOST_WANTED * side:
        return None
    largest, test_at = int(_LARGEST_SPACE * side) // _BLOCK * _BLOCK, 4.0 * _BLOCK
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(side, _BLOCK + _PROBES, generator=generator).to(matrix.device, matrix.dtype)
    block, probes = _orthonormal(start[:, :_BLOCK]), start[:, _BLOCK:]
    basis = torch.empty(side, largest, dtype=matrix.dtype, device=matrix.device)
    ritz = torch.zeros(largest, largest, dtype=matrix.dtype, device=matrix.device)  # basis^T A^T A basis
    for size in range(_BLOCK, largest + 1, _BLOCK):
        space = basis[:, :size]
        space[:, -_BLOCK:] = block
        image = matrix.t() @ (matrix @ block)
        inside = space.t() @ image
        ritz[:size, size - _BLOCK : size] = inside
        ritz[size - _BLOCK : size, :size] = inside.t()
        image -= space @ inside
        if size >= test_at:
            values, vectors = (t.flip(-1) for t in torch.linalg.eigh(ritz[:size, :size]))
            floor = values.clamp_min(_TRUSTED**2 * values[0])
            # A^T A maps all but the newest block into the space: what leads out of it comes from that block alone
            residuals = (image @ vectors[-_BLOCK:]).norm(dim=0)
            known = int((residuals <= _RESIDUAL * floor).cummin(0).values.sum())
            sigma = _roots(values)
            enough = count(sigma)
            if enough <= known:
                found = space @ vectors[:, :enough]
                return None if _misses(matrix, found, floor[enough - 1], probes) else found
            ceiling = np.concatenate([sigma[:known], np.full(side - known, sigma[max(0, known - 1)])])
            if count(ceiling) > _MOST_WANTED * side:
                return None
            test_at = _GROWTH * size
        block = _orthonormal(image, space)
    return None


def _misses(matrix: torch.Tensor, found: torch.Tensor, least: torch.Tensor, probes: torch.Tensor) -> bool:
    """Whether A^T A has directions outside those found (n, r) that it stretches by clearly more than `least`.

    A Krylov space can pass over a direction whose eigenvalue is almost equal to that of as many others as a block has
    vectors. A few power steps from vectors that had no part in it would come upon such directions.
    """
    for _ in range(_PROBE_STEPS):
        probes = probes - found @ (found.t() @ probes)
        probes = probes / probes.norm(dim=0)
        image = matrix @ probes
        probes = matrix.t() @ image
    return bool((image.square().sum(0) > 1.01 * least).any())


def _orthonormal(block: torch.Tensor, space: torch.Tensor | None = None) -> torch.Tensor:
    """An orthonormal basis of the block's columns, which are orthogonal to those of `space` up to rounding.

    By the eigenvectors of the block's own small Gram matrix (Stathopoulos and Wu, SIAM J. Sci. Comput. 23, 2002):
    matrix products, where Householder's QR would take most of the time.
    """
    for _ in range(8):  # mostly two; more where directions are exhausted and rounding errors take their place
        block = block / block.norm(dim=0).clamp_min(torch.finfo(block.dtype).tiny)
        values, vectors = torch.linalg.eigh((block.t() @ block).double())
        if values[0] > 1 - 1e-5:
            break
        block = block @ (vectors * values.clamp_min(1e-7 * values[-1]).rsqrt()).to(block.dtype)
        if space is not None:
            block = block - space @ (space.t() @ block)
    return block
