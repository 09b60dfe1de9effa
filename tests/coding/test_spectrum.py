"""Singular values alone, and the components of matrices whose singular values are known."""

import numpy as np
import pytest
import torch

from impart_hf.coding import spectrum
from impart_hf.coding.spectrum import leading_components, singular_values

SIDE, LONG = 320, 400
K = torch.arange(1, SIDE + 1).double()
NOISE = 1 - K / (SIDE + 1)
SPECTRA = {
    "line": NOISE,
    "power law with a noise floor": (1 / K + (0.1 * NOISE) ** 2).sqrt(),
    "exponential": torch.exp(-K / 60),
    "flat": torch.ones(SIDE).double(),
    "almost flat": 1 - K * 1e-6,
    "clusters": torch.tensor([4.0, 2.0, 1.0, 0.5]).double().repeat_interleave(SIDE // 4),
    "tiny": 1e-18 * K**-0.5,
    "huge": 1e18 * K**-0.5,
}
STEEP = {
    "steep power law": K**-2.0,
    "one value 10000 times the rest": torch.cat([10000 * K[:1], NOISE[1:]]),
    "low rank": torch.cat([3 - K[:16] / 8, 0 * K[16:]]),
}


@pytest.fixture(scope="module")
def rotations() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    planes = (torch.randn(size, SIDE, generator=generator, dtype=torch.float64) for size in (LONG, SIDE))
    u, v = (torch.linalg.qr(plane)[0] for plane in planes)
    return u, v


@pytest.mark.parametrize("name", [*SPECTRA, *STEEP])
def test_values(name: str, rotations: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Exact to 1e-4 down to a hundredth of the largest, in steep spectra down to ten times the rounding errors."""
    sigma = {**SPECTRA, **STEEP}[name].numpy()
    matrix = ((rotations[0] * torch.from_numpy(sigma)) @ rotations[1].t()).float()
    found = singular_values(matrix)
    assert found.dtype == np.float64 and found.shape == (SIDE,) and (np.diff(found) <= 0).all()
    clear = sigma >= (1e-2 if name in SPECTRA else 1e-5) * sigma[0]
    np.testing.assert_allclose(found[clear], sigma[clear], rtol=1e-3)
    assert (found[~clear] <= 2e-2 * sigma[0]).all()
    np.testing.assert_allclose(singular_values(matrix.t())[clear], found[clear], rtol=1e-3)


def test_values_of_a_stack() -> None:
    stack = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    stack[1, 1] *= 1e-15
    stack[0, 2] = 0
    found = singular_values(stack)
    assert found.shape == (2, 3, 24) and not found[0, 2].any()
    for place in np.ndindex(2, 3):
        np.testing.assert_allclose(found[place], singular_values(stack[place]), rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 20, 60, 100])
@pytest.mark.parametrize("name", SPECTRA)
def test_components(name: str, rank: int, rotations: tuple[torch.Tensor, torch.Tensor], monkeypatch) -> None:
    """Together they leave hardly more than the best approximation, and they are orthonormal."""
    sigma = SPECTRA[name]
    matrix = ((rotations[0] * sigma) @ rotations[1].t()).float()
    if float(sigma[rank - 1]) > 0.02 * float(sigma[0]):
        monkeypatch.setattr(spectrum, "leading_svd", lambda *_: pytest.fail("the values were not used"))
    for given in (matrix, matrix.t()):
        u, found, v = leading_components(given, rank, singular_values(matrix))
        assert u.shape == (given.shape[0], rank) and v.shape == (given.shape[1], rank)
        assert torch.equal(found, found.sort(descending=True).values)
        remains = float((given.double() - u.double() * found.double() @ v.double().t()).norm())
        # What the block leaves out: half a percent of the error, and for few of almost equal ones little of their own.
        assert remains**2 <= float((1.006 * sigma[rank:].square()).sum() + 0.1 * sigma[:rank].square().sum() / rank)
        for vectors in (u, v):
            assert (vectors.t() @ vectors - torch.eye(rank)).abs().max() < 1e-3


def test_same_on_every_call(rotations: tuple[torch.Tensor, torch.Tensor]) -> None:
    matrix = ((rotations[0] * NOISE) @ rotations[1].t()).float()
    state, values = torch.get_rng_state(), singular_values(matrix)
    for a, b in zip(leading_components(matrix, 50, values), leading_components(matrix, 50, values), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", STEEP)
def test_components_too_small_for_squares(name: str, rotations: tuple[torch.Tensor, torch.Tensor]) -> None:
    matrix = ((rotations[0] * STEEP[name]) @ rotations[1].t()).float()
    u, found, v = leading_components(matrix, 16, singular_values(matrix))
    np.testing.assert_allclose(found.double().numpy(), STEEP[name][:16].numpy(), rtol=1e-3)
    best = STEEP[name][16:].norm()
    assert float((matrix - (u * found) @ v.t()).norm()) <= 1.003 * best + 1e-3 * STEEP[name].norm()
