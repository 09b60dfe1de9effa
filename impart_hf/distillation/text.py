"""Text to be trained on, and how far two models are apart on it."""

import torch
from torch import Tensor

from ..common.token_losses import kl_divergence


def check_tokens(tokens: Tensor, vocabulary: int | None) -> None:
    """See that token sequences can be trained on.

    Raises:
        ValueError: if there are fewer than two of them, or a token is not in the vocabulary (None: of unknown size).
    """
    shape = tuple(tokens.shape)
    if tokens.dtype != torch.int64 or len(shape) != 2 or shape[1] < 1:
        raise ValueError(f"distillation: tokens must be int64 (sequences, length), got {tokens.dtype} {shape}")
    if shape[0] < 2:
        raise ValueError(
            f"distillation needs two or more sequences, one of them to be held out, got {shape[0]}: "
            "give more text, shorter sequences or more samples"
        )
    if vocabulary is not None and (tokens.min() < 0 or tokens.max() >= vocabulary):
        raise ValueError(
            f"distillation: tokens must be from 0 to {vocabulary - 1}, got {int(tokens.min())} to {int(tokens.max())}"
        )


def split(sequences: int, validation_share: float) -> tuple[range, range]:
    """The sequences that are trained on, and those that are held out."""
    held_out = min(sequences - 1, max(1, round(sequences * validation_share)))
    return range(sequences - held_out), range(sequences - held_out, sequences)


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(wanted || found) of logits (sequences, length, vocabulary), the mean over all tokens, in nats."""
    return kl_divergence(wanted, found) / (wanted.shape[0] * wanted.shape[1])


def relative_error(wanted: Tensor, found: Tensor) -> Tensor:
    """Squared error of hidden states (sequences, length, size) over their own square, the mean over all tokens."""
    error, size = (found.float() - wanted.float()).square().sum(-1), wanted.float().square().sum(-1)
    return (error / size.clamp_min(torch.finfo(torch.float32).tiny)).mean()
