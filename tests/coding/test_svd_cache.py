"""Components on disk: the widest decomposition serves all that need fewer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from impart_hf.coding import svd_cache
from impart_hf.coding.spectrum import decomposed, leading_components, singular_values
from impart_hf.coding.svd_cache import SvdCache, uncached_svd

MATRIX = torch.randn(300, 270, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The numbers of components, or their rules, for which a matrix is decomposed."""
    asked: list[Any] = []
    monkeypatch.setattr(svd_cache, "decomposed", lambda *args: asked.append(args[1]) or decomposed(*args))
    return asked


def test_known_values(ranks: list[Any], tmp_path: Path) -> None:
    sigma = singular_values(MATRIX)
    wide = SvdCache(tmp_path).of("name", 3)(MATRIX, 20, sigma)
    for stored, direct in zip(wide, leading_components(MATRIX, 20, sigma), strict=True):
        assert torch.equal(stored, direct)
    svd = SvdCache(tmp_path).of("name", 3)  # as a resumed run makes it
    narrow = svd(MATRIX, 12, sigma)
    assert ranks == [20] and narrow[1].shape == (12,)
    assert torch.equal(narrow[0], wide[0][:, :12]) and torch.equal(narrow[2], wide[2][:, :12])
    assert svd(MATRIX, 30, sigma)[0].shape == (300, 30) and svd(MATRIX, 25, sigma)[2].shape == (270, 25)
    SvdCache(tmp_path).of("name", 4)(MATRIX, 5, sigma)
    assert ranks == [20, 30, 5]


def test_a_rule_is_asked_for_what_is_stored(ranks: list[Any], tmp_path: Path) -> None:
    svd = SvdCache(tmp_path).of("name", 0)
    u, sigma, v = svd(MATRIX, lambda values: min(len(values), 9))
    assert torch.allclose(u * sigma @ v.t(), _truncated(9), atol=1e-3)
    assert len(svd(MATRIX, lambda values: 4)[1]) == 4 and len(ranks) == 1
    assert len(uncached_svd("name", 0)(MATRIX, 4)[1]) == 4


def _truncated(rank: int) -> torch.Tensor:
    u, sigma, vt = torch.linalg.svd(MATRIX, full_matrices=False)
    return u[:, :rank] * sigma[:rank] @ vt[:rank]
