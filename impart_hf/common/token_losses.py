"""Cross-entropy and KL divergence of logits, over the tokens of a text."""

import torch
from torch import Tensor
from torch.nn import functional

# Logits that are converted to float32 at a time: 128 MiB.
CHUNK_ENTRIES = 1 << 25


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over tokens of -log p(target), in nats: float32, a scalar.

    Args:
        logits: (tokens, vocabulary), of any floating-point dtype.
        targets: int64 (tokens,).
    """
    sums = [
        functional.cross_entropy(part.float(), target, reduction="sum")
        for part, target in zip(_chunks(logits, logits), _chunks(targets, logits), strict=True)
    ]
    return torch.stack(sums).sum()


def kl_divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """The sum over tokens of KL(wanted || found), in nats: float32, a scalar that gradients flow through.

    Args:
        wanted, found: logits (..., vocabulary) of one shape, of any floating-point dtype.
    """
    wanted, found = wanted.flatten(0, -2), found.flatten(0, -2)
    sums = []
    for part, other in zip(_chunks(found, wanted), _chunks(wanted, wanted), strict=True):
        logs = part.float().log_softmax(-1), other.float().log_softmax(-1)
        sums.append(functional.kl_div(*logs, log_target=True, reduction="sum"))
    return torch.stack(sums).sum()


def _chunks(tensor: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    """A tensor in parts of as many tokens as bound the float32 copy of the logits."""
    return tensor.split(max(1, CHUNK_ENTRIES // logits.shape[-1]))
