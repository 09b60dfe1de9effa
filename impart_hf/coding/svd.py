"""The leading singular values and vectors of a delta.

Methods need a small part of the spectrum: at ratio 32 a square matrix has room for 1/64 of its singular vectors, and
ImPart spreads that over a few times as many. The leading vectors are therefore computed in a growing block Krylov
space. The whole Gram matrix is decomposed only if it is small, or if so many components are needed that it takes no
longer (scripts/benchmark_compress.py prints times and accuracy).
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..modeling.precision import full_float32

RankRule = Callable[[np.ndarray], int]
SvdStack = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Svd(Protocol):
    """A function that returns leading singular components as `spectrum.decomposed` does, with its arguments."""

    def __call__(
        self, matrix: torch.Tensor, rank: int | RankRule, sigma: np.ndarray | None = None, /
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


_SMALL = 1024  # with a shorter side below this, the whole decomposition is faster than any iteration
_BLOCK = 64  # vectors multiplied at a time: fewer need a smaller space, more use the processor better
_MOST_RANK = 1 / 8  # of the shorter side; for more components, the whole decomposition takes no longer
_LARGEST_SPACE = 0.45  # of the shorter side
_GROWTH = 1.3  # growth of the Krylov space from one test of convergence to the next
# Residuals ||A^T A v - theta v||, relative to theta. The error of theta is of second order in them: singular values
# are at most 2e-4 below the exact ones, the reconstruction error is 1e-5 above the optimum (relative).
_RESIDUAL = 0.01
# Squaring the matrix makes singular values below this share of the largest inexact. They are computed from the matrix
# minus the larger components, unless that remainder is no more than rounding errors of the second size.
TRUSTED = 1e-2
ROUNDING = 1e-5
_PROBES, _PROBE_STEPS = 16, 5


@full_float32()
def leading_svd(matrix: torch.Tensor, rank: int | RankRule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the largest singular values of a matrix and their vectors.

    Args:
        matrix: float32 of shape (m, n), finite, on any device.
        rank: the number of components, 1 to min(m, n). If it depends on the singular values, a function that takes
            leading ones (float64, falling; possibly slightly too small or incomplete) and returns the number, or any
            number above that of its argument if it needs more of them. For larger values it must not return more.

    Returns:
        U of shape (m, r), sigma of shape (r,) in falling order, V of shape (n, r). The result is deterministic.
    """
    rank_rule = rank if callable(rank) else lambda _: rank
    scale = float(torch.linalg.vector_norm(matrix, torch.inf))
    if 0 < scale < 1e-8 or scale > 1e8:  # squares would leave the range of float32
        u, sigma, v = leading_svd(matrix / scale, lambda s: rank_rule(s * scale))
        return u, sigma * scale, v
    if matrix.shape[0] < matrix.shape[1]:
        v, sigma, u = _tall_svd(matrix.t(), rank_rule, np.empty(0))
    else:
        u, sigma, v = _tall_svd(matrix, rank_rule, np.empty(0))
    return u, sigma, v


@full_float32()
def leading_svds(matrices: torch.Tensor, rules: Sequence[RankRule]) -> tuple[SvdStack, list[int]]:
    """Return `leading_svd` of each matrix of a stack (b, m, n), together where they are small.

    Returns:
        U (b, m, r), sigma (b, r), V (b, n, r), with zeros behind a matrix's own components; and how many it has.
    """
    count, side = len(matrices), min(matrices.shape[1:])
    found: dict[int, SvdStack] = {}
    counts = [side + 1] * count
    whole = None
    if side < _SMALL:
        tall = matrices if matrices.shape[1] == max(matrices.shape[1:]) else matrices.mT
        values, vectors = eigh(lower_gram(tall))
        spectra = roots(values.flip(-1))
        counts = [max(1, min(side, rule(spectrum))) for rule, spectrum in zip(rules, spectra, strict=True)]
        u, sigma, v = components(tall, vectors.flip(-1)[..., : max(counts)])
        whole = (u, sigma, v) if tall is matrices else (v, sigma, u)
        clear = (sigma >= TRUSTED * sigma[:, :1]).cpu().numpy()
        # Squares leave the range of float32, or components are too small to be exact: see `_tall_svd`.
        in_range = (spectra[:, 0] >= 1e-8 * sum(matrices.shape[1:])) & (spectra[:, 0] <= 1e8)
        sound = [in_range[i] and (clear[i, :own].all() or own > side // 2) for i, own in enumerate(counts)]
    else:
        sound = [False] * count
    for i in (i for i in range(count) if not sound[i]):
        u, sigma, v = leading_svd(matrices[i], rules[i])
        found[i] = u[None], sigma[None], v[None]
        counts[i] = len(sigma)
    parts = [] if whole is None else [(list(range(count)), whole)]
    return filled(matrices, [*parts, *(([i], part) for i, part in found.items())], counts), counts


def filled(matrices: torch.Tensor, parts: list[tuple[list[int], SvdStack]], counts: list[int]) -> SvdStack:
    """Return the components of a stack (b, m, n), with zeros behind each matrix's own.

    Args:
        parts: components of some of the matrices, by their numbers, at least as many as their counts; later ones
            replace those before.
        counts: how many components each matrix has.
    """
    (count, rows, columns), most = matrices.shape, max(counts)
    present = torch.from_numpy(np.arange(most) < np.array(counts)[:, None]).to(matrices.device)
    filled = (
        matrices.new_zeros(count, rows, most),
        matrices.new_zeros(count, most),
        matrices.new_zeros(count, columns, most),
    )
    for numbers, part in parts:
        where: Any = slice(None) if len(numbers) == count else numbers
        for into, some in zip(filled, part, strict=True):
            into[where, ..., : some.shape[-1]] = some[..., :most]
    u, sigma, v = (torch.where(present if part.dim() == 2 else present[:, None], part, 0.0) for part in filled)
    return u, sigma, v


def _tall_svd(
    matrix: torch.Tensor, rank_rule: RankRule, above: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `leading_svd` of a matrix (m, n), m >= n, from which components `above` have been subtracted."""
    side = matrix.shape[1] - len(above)

    def count(sigma: np.ndarray) -> int:
        return max(1, min(side, rank_rule(np.concatenate([above, sigma])) - len(above)))

    v = _krylov_vectors(matrix, count) if matrix.shape[1] >= _SMALL else None
    u, sigma, v = components(matrix, all_vectors(matrix, count) if v is None else v)
    clear = int((sigma >= TRUSTED * sigma[0]).sum())
    if clear == len(sigma) or len(sigma) > side // 2:
        return u, sigma, v
    rest = torch.addmm(matrix, u[:, :clear] * sigma[:clear], v[:, :clear].t(), alpha=-1)
    exact = np.concatenate([above, sigma[:clear].double().cpu().numpy()])
    if float(rest.norm()) <= ROUNDING * exact[0]:
        return u, sigma, v
    parts = _tall_svd(rest, rank_rule, exact)
    u, sigma, v = (torch.cat([a[..., :clear], b], -1) for a, b in zip((u, sigma, v), parts, strict=True))
    return u, sigma, v


def components(
    matrix: torch.Tensor, v: torch.Tensor, rank: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the leading singular components, all or `rank`, in the space of the orthonormal columns of `v`.

    Args:
        matrix: (m, n), or a stack (b, m, n).
        v: (n, r), or (b, n, r).
    """
    projected = matrix @ v
    if rank is not None or v.shape[-1] <= max(matrix.shape[-1] // 2, _SMALL):
        # A rotation makes U's columns orthogonal too, which is more exact. With most vectors of a large matrix it would
        # take too long.
        _, rotation = eigh((projected.mT @ projected).double())
        rotation = rotation.flip(-1)[..., :rank].to(v.dtype)
        projected, v = projected @ rotation, v @ rotation
    return _of_projections(projected, v)


def of_vectors(matrix: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the singular components of the matrix whose right vectors are the columns of `v`."""
    return _of_projections(matrix @ v, v)


def _of_projections(projected: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sigma = projected.norm(dim=-2)
    # Rounding can put neighbours of nearly equal size in the wrong order.
    order = torch.argsort(sigma, dim=-1, descending=True, stable=True)
    sigma, v, projected = sigma.gather(-1, order), _columns(v, order), _columns(projected, order)
    return projected / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)[..., None, :], sigma, v


def _columns(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the columns of a matrix, or of each of a stack, in an order, int64 (..., columns)."""
    return matrix[:, order] if order.dim() == 1 else matrix.gather(2, order[:, None].expand_as(matrix))


def eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eigenvalues, rising, and eigenvectors of a symmetric matrix; only its lower triangle is read.

    The solver of an accelerator may fail to converge, mostly where many eigenvalues are equal. The matrix is then
    decomposed on the CPU in float64.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        values, vectors = torch.linalg.eigh(matrix.double().cpu())
    return values.to(matrix), vectors.to(matrix)


def eigvalsh(matrix: torch.Tensor) -> torch.Tensor:
    """Return the eigenvalues, rising, of symmetric matrices (..., n, n), as `eigh` does."""
    try:
        values = torch.linalg.eigvalsh(matrix)
    except torch.linalg.LinAlgError:
        values = torch.linalg.eigvalsh(matrix.double().cpu())
    return values.to(matrix)


def roots(eigenvalues: torch.Tensor) -> np.ndarray:
    """Return the singular values, float64, of the eigenvalues of a Gram matrix."""
    return eigenvalues.clamp_min(0).double().sqrt().cpu().numpy()


def lower_gram(matrix: torch.Tensor) -> torch.Tensor:
    """Return the lower triangle of A^T A, (..., n, n), of matrices (..., m, n); blocks of the other may be zero."""
    side = matrix.shape[-1]
    gram = matrix.new_zeros(*matrix.shape[:-2], side, side)
    step = -(-side // 8)
    for start in range(0, side, step):
        gram[..., start:, start : start + step] = matrix[..., start:].mT @ matrix[..., start : start + step]
    return gram


def all_vectors(matrix: torch.Tensor, count: RankRule) -> torch.Tensor:
    """Return the leading right singular vectors, (n, r), from the whole Gram matrix."""
    eigenvalues, vectors = eigh(lower_gram(matrix))
    return vectors.flip(1)[:, : count(roots(eigenvalues.flip(0)))]


def _krylov_vectors(matrix: torch.Tensor, count: RankRule) -> torch.Tensor | None:
    """Return the leading right singular vectors, (n, r), by block Lanczos with full orthogonalisation.

    The space grows by A^T A times its newest block, until the residuals of the leading r Ritz vectors are small. None
    if the whole decomposition would be faster.
    """
    side = matrix.shape[1]
    # The rank is at least the one for singular values that are as large as they can be.
    if count(np.ones(side)) > _MOST_RANK * side:
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
            values, vectors = (t.flip(-1) for t in eigh(ritz[:size, :size]))
            floor = values.clamp_min(TRUSTED**2 * values[0])
            # A^T A maps all but the newest block into the space, so the residuals come from that block alone.
            residuals = (image @ vectors[-_BLOCK:]).norm(dim=0)
            known = int((residuals <= _RESIDUAL * floor).cummin(0).values.sum())
            sigma = roots(values)
            enough = count(sigma)
            if enough <= known:
                leading = space @ vectors[:, :enough]
                return None if _misses(matrix, leading, floor[enough - 1], probes) else leading
            ceiling = np.concatenate([sigma[:known], np.full(side - known, sigma[max(0, known - 1)])])
            if count(ceiling) > _MOST_RANK * side:
                return None
            test_at = _GROWTH * size
        block = _orthonormal(image, space)
    return None


def _misses(matrix: torch.Tensor, leading: torch.Tensor, least: torch.Tensor, probes: torch.Tensor) -> bool:
    """Return whether A^T A has eigenvalues clearly above `least` outside the space of `leading` (n, r).

    A Krylov space can miss a direction if its eigenvalue is almost equal to those of as many others as a block has
    vectors. A few power steps from vectors that were not used for the space find such directions.
    """
    for _ in range(_PROBE_STEPS):
        probes = probes - leading @ (leading.t() @ probes)
        probes = probes / probes.norm(dim=0)
        image = matrix @ probes
        probes = matrix.t() @ image
    return bool((image.square().sum(0) > 1.01 * least).any())


def _orthonormal(block: torch.Tensor, space: torch.Tensor | None = None) -> torch.Tensor:
    """Return an orthonormal basis of the block's columns, which are orthogonal to those of `space` up to rounding.

    It is computed from the eigenvectors of the block's small Gram matrix (Stathopoulos and Wu, SIAM J. Sci. Comput. 23,
    2002): Householder's QR would take most of the time.
    """
    for _ in range(8):  # two are enough, unless the space is exhausted and the block holds rounding errors
        block = block / block.norm(dim=0).clamp_min(torch.finfo(block.dtype).tiny)
        values, vectors = eigh((block.t() @ block).double())
        if values[0] > 1 - 1e-5:
            break
        block = block @ (vectors * values.clamp_min(1e-7 * values[-1]).rsqrt()).to(block.dtype)
        if space is not None:
            block = block - space @ (space.t() @ block)
    return block
