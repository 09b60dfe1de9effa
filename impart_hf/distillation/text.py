"""Token sequences for distillation, and the losses that compare two models on them."""

import torch
from torch import Tensor

from ..common.token_losses import kl_divergence


def check_tokens(tokens: Tensor, vocabulary: int | None) -> None:
    """Check that distillation can use token sequences.

    Args:
        tokens: int64 (sequences, length).
        vocabulary: number of tokens in the vocabulary; None if it is unknown.

    Raises:
        ValueError: if the shape or dtype is wrong, there are fewer than two sequences, or a token is not in the
            vocabulary.
    """
    shape = tuple(tokens.shape)
    if tokens.dtype != torch.int64 or len(shape) != 2 or shape[1] < 1:
        raise ValueError(f"distillation: tokens must be int64 (sequences, length), got {tokens.dtype} {shape}")
    if shape[0] < 2:
        raise ValueError(
            f"distillation needs at least two sequences, one of them held out, got {shape[0]}: "
            "give more text, shorter sequences or more samples"
        )
    if vocabulary is not None and (tokens.min() < 0 or tokens.max() >= vocabulary):
        raise ValueError(
            f"distillation: tokens must be from 0 to {vocabulary - 1}, got {int(tokens.min())} to {int(tokens.max())}"
        )


def split(sequences: int, validation_share: float) -> tuple[range, range]:
    """Split sequences into those for training and those held out; return the indices of both."""
    held_out = min(sequences - 1, max(1, round(sequences * validation_share)))
    return range(sequences - held_out), range(sequences - held_out, sequences)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) of logits (sequences, length, vocabulary), the mean over all tokens, in nats."""
    return kl_divergence(teacher, student) / (teacher.shape[0] * teacher.shape[1])


def relative_error(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the squared error of hidden states (sequences, length, size) over the teacher's square, mean of tokens."""
    error, size = (student.float() - teacher.float()).square().sum(-1), teacher.float().square().sum(-1)
    return (error / size.clamp_min(torch.finfo(torch.float32).tiny)).mean()
