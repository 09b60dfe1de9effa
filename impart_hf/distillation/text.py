"""Token sequences for distillation, and the losses that compare two models on them."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..common.partial_logits import Logits, LogitsOf, kl_of_parts
from .student import head_delta
from .trained_delta import TrainedDelta


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


def divergence(teacher: Logits, student: Logits, head: TrainedDelta | None = None) -> Tensor:
    """Return KL(teacher || student), the mean over all tokens, in nats.

    Args:
        head: the trained delta of the student's output projection; its factors are made once for all parts of logits.
    """
    if head is None or student.are_whole:
        return kl_of_parts(teacher, student) / teacher.tokens
    deltas = head.deltas()
    return kl_of_parts(teacher, student, partial(head.using, deltas)) / teacher.tokens


def whole_model_loss(teacher: Any, student: Any, recomputes: bool) -> Callable[[Tensor], Tensor]:
    """Return the function that gives the divergence of a student from its teacher on tokens, (sequences, length).

    Args:
        teacher, student: the whole models; deltas may be attached to the student.
        recomputes: whether `recomputation.recompute_layers` has been called for the student.
    """
    of_teacher = LogitsOf(teacher)
    of_student, head = LogitsOf(student, like=of_teacher), head_delta(student)

    def loss(batch: Tensor) -> Tensor:
        with torch.no_grad():
            expected = of_teacher(batch)
        # Some layers read a stack once for each of its matrices; layers that are recomputed have their own cache.
        with nullcontext() if recomputes else parametrize.cached():
            return divergence(expected, of_student(batch), head)

    return loss


def relative_error(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the squared error of hidden states (sequences, length, size) over the teacher's square, mean of tokens."""
    error, size = (student.float() - teacher.float()).square().sum(-1), teacher.float().square().sum(-1)
    return (error / size.clamp_min(torch.finfo(torch.float32).tiny)).mean()
