"""Cross-entropy and KL against their definitions in float64, in one chunk and in many."""

from __future__ import annotations

import pytest
import torch

from impart_hf.common import token_losses
from impart_hf.common.token_losses import cross_entropy, kl_divergence


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 5, 11, generator=generator), torch.randn(3, 5, 11, generator=generator)


def chunks_of_two_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_losses, "CHUNK_ENTRIES", 2 * 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values(logits: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, found = (tensor.to(dtype) for tensor in logits)
    logs = [tensor.double().log_softmax(-1) for tensor in (wanted, found)]
    divergence = (logs[0].exp() * (logs[0] - logs[1])).sum()
    targets = torch.arange(15) % 11
    entropy = -logs[1].flatten(0, 1)[torch.arange(15), targets].sum()
    for _ in range(2):
        assert kl_divergence(wanted, found).item() == pytest.approx(divergence.item(), rel=1e-5)
        assert cross_entropy(found.flatten(0, 1), targets).item() == pytest.approx(entropy.item(), rel=1e-5)
        assert kl_divergence(found, found).item() == 0
        chunks_of_two_tokens(monkeypatch)


def test_chunks_do_not_change_gradients(
    logits: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = []
    for _ in range(2):
        found = logits[1].clone().requires_grad_()
        kl_divergence(logits[0], found).backward()
        gradients.append(found.grad)
        chunks_of_two_tokens(monkeypatch)
    assert gradients[0] is not None and gradients[1] is not None and torch.equal(*gradients)
