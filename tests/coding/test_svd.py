"""`leading_svd` against matrices whose singular value decomposition is known, in float64."""

import numpy as np
import pytest
import torch

from impart_hf.coding import svd
from impart_hf.coding.svd import leading_svd

SIDE = 1024  # the least at which the Krylov space is tried


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


@pytest.fixture(scope="module")
def rotations() -> tuple[torch.Tensor, torch.Tensor]:
    return orthonormal(SIDE + 76, SIDE, 1), orthonormal(SIDE, SIDE, 2)


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    """The spectrum of a random matrix, from about 1 down."""
    generator = torch.Generator().manual_seed(3)
    return torch.linalg.svdvals(torch.randn(SIDE, SIDE, generator=generator).double()) / (2 * SIDE**0.5)


K = torch.arange(1, SIDE + 1).double()
SPECTRA = {
    "power law": lambda noise: K**-0.5,
    "steep power law": lambda noise: K**-2.0,
    "power law with a noise floor": lambda noise: (1 / K + (0.1 * noise) ** 2).sqrt(),
    "exponential": lambda noise: torch.exp(-K / 20),
    "noise": lambda noise: noise,
    "line": lambda noise: 1 - K / (SIDE + 1),
    "flat": lambda noise: torch.ones(SIDE).double(),
    "almost flat": lambda noise: 1 - K * 1e-6,
    "clusters": lambda noise: torch.tensor([4.0, 2.0, 1.0, 0.5]).double().repeat_interleave(SIDE // 4),
    "cluster above noise": lambda noise: torch.cat([2 + 0.001 * K[:200].flip(0) / 200, noise[200:]]),
    "low rank and noise": lambda noise: torch.cat([3 - K[:16] / 8, 0.01 * noise[16:]]),
    "one value 100 times the rest": lambda noise: torch.cat([100 * K[:1], noise[1:]]),
    "one value 10000 times the rest": lambda noise: torch.cat([10000 * K[:1], noise[1:]]),
    "tiny": lambda noise: 1e-18 * K**-0.5,
    "huge": lambda noise: 1e18 * K**-0.5,
}


def check(matrix: torch.Tensor, sigma: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> None:
    u, found, v = parts
    rank = len(found)
    assert u.shape == (matrix.shape[0], rank) and v.shape == (matrix.shape[1], rank) and u.dtype == torch.float32
    assert torch.equal(found, found.sort(descending=True).values)
    assert ((found.double() - sigma[:rank]).abs() <= 1e-3 * sigma[:rank]).all()
    remains = (matrix.double() - u.double() * found.double() @ v.double().t()).norm()
    assert remains <= 1.001 * sigma[rank:].norm() + 2e-6 * sigma.norm()
    for vectors in (u, v):
        assert (vectors.t() @ vectors - torch.eye(rank)).abs().max() < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 16, 80, 300])
@pytest.mark.parametrize("name", SPECTRA)
def test_leading_part(name, rank, rotations, noise):
    sigma = SPECTRA[name](noise)
    if sigma[rank - 1] < 1e-4 * sigma[0]:
        pytest.skip("beyond what is asked for")
    u, v = rotations
    matrix = (u * sigma @ v.t()).float()
    check(matrix, sigma, leading_svd(matrix, rank))
    if rank == 16 and name in ("power law", "noise"):
        check(matrix.t(), sigma, leading_svd(matrix.t(), rank))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 3), (64, 64), (3000, 40), (40, 3000), (1000, 1000)])
def test_small_matrices(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.linalg.svdvals(matrix.double())
    for rank in {1, min(shape) // 2 or 1, min(shape)}:
        check(matrix, sigma, leading_svd(matrix, rank))


@pytest.mark.parametrize("shape", [(8192, 1024), (1024, 8192)])
def test_krylov_space_of_long_matrices(shape, monkeypatch):
    monkeypatch.setattr(svd, "all_vectors", lambda *_: pytest.fail("the Krylov space was not used"))
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    leading = torch.randn(shape[0], 48, generator=generator) @ torch.randn(48, shape[1], generator=generator)
    matrix += leading * torch.linspace(0.2, 1, shape[1])
    gram = matrix.double() @ matrix.double().t() if shape[0] < shape[1] else matrix.double().t() @ matrix.double()
    sigma = torch.linalg.eigvalsh(gram).flip(0).sqrt()
    check(matrix, sigma, leading_svd(matrix, 24))


@pytest.mark.parametrize("rank", [4, 16, 60, 200])
@pytest.mark.parametrize("true_rank", [1, 4, 16, 100])
def test_exactly_low_rank(true_rank, rank, rotations):
    u, v = rotations
    sigma = torch.zeros(SIDE).double()
    sigma[:true_rank] = torch.linspace(2, 1, true_rank)
    matrix = (u * sigma @ v.t()).float()
    u, found, v = leading_svd(matrix, rank)
    held = min(rank, true_rank)
    check(matrix, sigma, (u[:, :held], found[:held], v[:, :held]))
    assert (found[held:] < 1e-5).all() if rank > true_rank else True
    assert all(torch.isfinite(part).all() for part in (u, found, v))
    assert (v.t() @ v - torch.eye(rank)).abs().max() < 1e-3


def test_zero_matrix():
    u, sigma, v = leading_svd(torch.zeros(6, 4), 2)
    assert torch.equal(sigma, torch.zeros(2)) and torch.isfinite(u).all() and torch.isfinite(v).all()


def test_same_on_every_call(rotations, noise):
    u, v = rotations
    matrix = (u * SPECTRA["power law with a noise floor"](noise) @ v.t()).float()
    state = torch.get_rng_state()
    for a, b in zip(leading_svd(matrix, 20), leading_svd(matrix, 20), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", ["power law", "low rank and noise", "noise", "one value 100 times the rest"])
def test_rank_that_follows_from_the_values(name, energy, rotations, noise):
    """As many components as hold a share of the sum of all squares: known only once enough of them are."""
    sigma = SPECTRA[name](noise)
    u, v = rotations
    matrix = (u * sigma @ v.t()).float()
    goal = energy * float(sigma.square().sum())

    def wanted(spectrum: np.ndarray) -> int:
        return int(np.searchsorted(np.cumsum(spectrum**2), goal)) + 1

    rank = wanted(sigma.numpy())
    parts = leading_svd(matrix, wanted)
    assert abs(len(parts[1]) - rank) <= 1 + rank // 100
    check(matrix, sigma, parts)
