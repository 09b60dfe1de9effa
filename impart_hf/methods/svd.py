"""The leading part of a delta's singular value decomposition, which is all that any method uses."""

import torch


def leading_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `rank` largest singular values of a matrix and their vectors.

    By eigendecomposition of the Gram matrix of the smaller side, in the matrix's own precision. Squaring costs
    accuracy only for singular values under about 3e-4 of the largest (float32), which ImPart prunes anyway; the
    reconstruction error of the leading part equals that of `torch.linalg.svd` to six digits (docs/benchmarks.md).

    Args:
        matrix: float32 of shape (m, n).
        rank: how many; at most min(m, n).

    Returns:
        U of shape (m, rank), sigma of shape (rank,) in falling order, V of shape (n, rank).
    """
    if matrix.shape[0] < matrix.shape[1]:
        u, sigma, v = leading_svd(matrix.t(), rank)
        return v, sigma, u
    _, vectors = torch.linalg.eigh(matrix.t() @ matrix)
    v = vectors.flip(1)[:, :rank]
    projected = matrix @ v
    sigma = projected.norm(dim=0)
    # Rounding can leave neighbours of nearly equal size in the wrong order
    order = torch.argsort(sigma, descending=True, stable=True)
    sigma, v, projected = sigma[order], v[:, order], projected[:, order]
    return projected / sigma.clamp_min(torch.finfo(sigma.dtype).tiny), sigma, v
