"""Cross-entropy and KL divergence of logits, summed over the tokens of a text."""

import torch
from torch import Tensor
from torch.nn import functional

# Number of logits that are converted to float32 at a time: 128 MiB.
CHUNK_ENTRIES = 1 << 25


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum over tokens of -log p(target), in nats: float32, a scalar.

    Args:
        logits: (tokens, vocabulary), any floating-point dtype.
        targets: int64 (tokens,).
    """
    sums = [
        functional.cross_entropy(part.float(), target, reduction="sum")
        for part, target in zip(_chunks(logits, logits), _chunks(targets, logits), strict=True)
    ]
    return torch.stack(sums).sum()


def kl_divergence(reference: Tensor, candidate: Tensor) -> Tensor:
    """Return the sum over tokens of KL(reference || candidate), in nats: float32, a differentiable scalar.

    Args:
        reference, candidate: logits (..., vocabulary) of one shape, any floating-point dtype.
    """
    reference, candidate = reference.flatten(0, -2), candidate.flatten(0, -2)
    sums = []
    for candidate_part, reference_part in zip(
        _chunks(candidate, reference), _chunks(reference, reference), strict=True
    ):
        logs = candidate_part.float().log_softmax(-1), reference_part.float().log_softmax(-1)
        sums.append(functional.kl_div(*logs, log_target=True, reduction="sum"))
    return torch.stack(sums).sum()


def _chunks(tensor: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    """Split a tensor into parts of so many tokens that a float32 copy of their logits has a bounded size."""
    return tensor.split(max(1, CHUNK_ENTRIES // logits.shape[-1]))
