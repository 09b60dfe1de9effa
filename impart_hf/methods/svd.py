"""The leading part of a delta's singular value decomposition, which is all that any method uses.

Methods need a small part of the spectrum: at ratio 32 a square matrix has room for 1/64 of its singular vectors, and
ImPart spreads that over a few times as many. So the leading vectors are sought in a growing block Krylov space, and
the whole Gram matrix is only decomposed where that is small, or where so many components are wanted that it is no
slower (scripts/benchmark_compress.py prints times and accuracy).
"""

from collections.abc import Callable

import numpy as np
import torch

Wanted = Callable[[np.ndarray], int]

_SMALL = 1024  # a shorter side under this is decomposed whole: faster than any iteration
_BLOCK = 64  # vectors multiplied at a time: fewer need fewer of them in all, more use the processor better
_MOST_WANTED = 1 / 12  # of the shorter side; where more is wanted, the whole decomposition takes no longer
_LARGEST_SPACE = 1 / 2  # of the shorter side
_GROWTH = 1.3  # of the Krylov space from one test of convergence to the next
# Residuals ||A^T A v - theta v||, relative to theta. The error of theta is of second order in them: singular values
# come out 1e-4 under the exact ones or nearer, the reconstruction error a few millionths above the optimum.
_RESIDUAL = 0.02
_NOISE = 1e-6  # eigenvalues under this share of the largest are rounding errors, which never converge


def leading_svd(matrix: torch.Tensor, rank: int | Wanted) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values of a matrix and their vectors.

    Args:
        matrix: float32 of shape (m, n), on any device.
        rank: how many; at most min(m, n). Where the number follows from the values themselves, a function that takes
            the leading singular values (float64, falling; as yet a little too small, or only a few of them) and
            returns how many are wanted, or more than it was given if it has to see more of them.

    Returns:
        U of shape (m, rank), sigma of shape (rank,) in falling order, V of shape (n, rank). The same on every call.
    """
    if matrix.shape[0] < matrix.shape[1]:
        u, sigma, v = leading_svd(matrix.t(), rank)
        return v, sigma, u
    side = matrix.shape[1]
    v = None
    if side >= _SMALL and (callable(rank) or rank <= _MOST_WANTED * side):
        v = _krylov_vectors(matrix, rank if callable(rank) else lambda _: rank)
    if v is None:
        v = _all_vectors(matrix, rank if callable(rank) else lambda _: rank)
    return _components(matrix, v)


def _components(matrix: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular components of the matrix within the space of the orthonormal columns of `v`."""
    projected = matrix @ v
    if v.shape[1] <= matrix.shape[1] // 2:
        # Turning the vectors so that U becomes orthogonal takes out what squaring the matrix cost in accuracy.
        _, turn = torch.linalg.eigh((projected.t() @ projected).double())
        turn = turn.flip(1).to(v.dtype)
        projected, v = projected @ turn, v @ turn
    sigma = projected.norm(dim=0)
    # Rounding can leave neighbours of nearly equal size in the wrong order
    order = torch.argsort(sigma, descending=True, stable=True)
    sigma, v, projected = sigma[order], v[:, order], projected[:, order]
    return projected / sigma.clamp_min(torch.finfo(sigma.dtype).tiny), sigma, v


def _roots(eigenvalues: torch.Tensor) -> np.ndarray:
    """Singular values, float64 and falling, of the rising eigenvalues of a Gram matrix."""
    return eigenvalues.flip(0).clamp_min(0).double().sqrt().cpu().numpy()


def _all_vectors(matrix: torch.Tensor, wanted: Wanted) -> torch.Tensor:
    """Leading right singular vectors, (n, r), from the whole Gram matrix of the shorter side."""
    side = matrix.shape[1]
    gram = torch.zeros(side, side, dtype=matrix.dtype, device=matrix.device)
    step = max(1, side // 8)
    for start in range(0, side, step):  # eigh reads the lower triangle alone
        torch.mm(matrix[:, start:].t(), matrix[:, start : start + step], out=gram[start:, start : start + step])
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1)[:, : min(side, wanted(_roots(eigenvalues)))]


def _krylov_vectors(matrix: torch.Tensor, wanted: Wanted) -> torch.Tensor | None:
    """Leading right singular vectors, (n, r), by block Lanczos with full orthogonalisation; None if it is too slow.

    The space grows by A^T A times its newest block, until the residuals of all wanted Ritz vectors are small.
    """
    side = matrix.shape[1]
    largest, test_at = int(_LARGEST_SPACE * side) // _BLOCK * _BLOCK, 4 * _BLOCK
    basis = torch.empty(side, largest, dtype=matrix.dtype, device=matrix.device)
    ritz = torch.zeros(largest, largest, dtype=torch.float64, device=matrix.device)  # basis^T A^T A basis
    generator = torch.Generator().manual_seed(0)
    block = _orthonormal(torch.randn(side, _BLOCK, generator=generator, dtype=matrix.dtype).to(matrix.device))
    for size in range(_BLOCK, largest + 1, _BLOCK):
        space = basis[:, :size]
        space[:, -_BLOCK:] = block
        image = matrix.t() @ (matrix @ block)
        inside = space.t() @ image
        ritz[:size, size - _BLOCK : size] = inside
        ritz[size - _BLOCK : size, :size] = inside.t()
        image -= space @ inside
        if size >= test_at:
            values, vectors = torch.linalg.eigh(ritz[:size, :size].to(matrix.dtype))
            values, vectors = values.flip(0), vectors.flip(1)
            # All of the space but its newest block is mapped into the space: the residual comes from there alone
            residuals = (image @ vectors[-_BLOCK:]).norm(dim=0)
            converged = residuals <= _RESIDUAL * values.clamp_min(_NOISE * values[0])
            known = int(converged.logical_not().nonzero()[0]) if not converged.all() else size
            sigma = _roots(values.flip(0))
            count = min(side, wanted(sigma))
            if count <= known:
                return space @ vectors[:, :count]
            # No fewer will be wanted than if all that are not known yet were as large as they can be
            ceiling = np.concatenate([sigma[:known], np.full(side - known, sigma[max(0, known - 1)])])
            if wanted(ceiling) > _MOST_WANTED * side:
                return None
            test_at = _GROWTH * size
        block = _orthonormal(image, space)
    return None


def _orthonormal(block: torch.Tensor, space: torch.Tensor | None = None) -> torch.Tensor:
    """An orthonormal basis of the block's columns, orthogonal to those of `space` too.

    By the eigenvectors of the block's own small Gram matrix (Stathopoulos and Wu, SIAM J. Sci. Comput. 23, 2002):
    matrix products where Householder's QR would take most of the time. Twice, because rounding spoils the first.
    """
    for _ in range(2):
        # Directions that are exhausted, as in a matrix of low rank, are filled up with rounding errors
        block = block / block.norm(dim=0).clamp_min(torch.finfo(block.dtype).tiny)
        values, vectors = torch.linalg.eigh((block.t() @ block).double())
        block = block @ (vectors * values.clamp_min(1e-7 * values[-1]).rsqrt()).to(block.dtype)
        if space is not None:
            block = block - space @ (space.t() @ block)
    return block
