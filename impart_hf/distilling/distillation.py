"""Distillation end to end: the fine-tuned and the compressed model side by side."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import parametrize

from ..modeling.checkpoints import Checkpoint
from ..modeling.delta_decode import decode_record
from ..modeling.delta_record import Record, pack_record
from ..progress import Progress
from .loop import Pupil, arguments_for, mean_loss, train
from .settings import DistillReport, DistillSettings
from .student import attach, load_model, owners_of, student_tensors, trainable


def distill(
    base: Checkpoint,
    finetuned: Checkpoint,
    records: Mapping[str, bytes | np.ndarray],
    tokens: Tensor,
    settings: DistillSettings | None = None,
    *,
    device: str | torch.device = "cpu",
    checkpoints: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, bytes], DistillReport]:
    """Train the sizes of all records, and their kept values.

    The last sequences are held out. They choose the step whose numbers are kept; if these, rounded as they are stored,
    are no better there than before, the records come back as they were. Same inputs, same bytes (on a CPU).

    Left alone are records of tensors that have rows added, that are shared by other modules than embeddings and linear
    layers, and of those that transformers renames or fuses when it loads them (Mixtral's experts). The others learn to
    live with them.

    Held in memory, on `device`: the fine-tuned and the compressed model, both whole; for every kept value of a trained
    record 16 bytes, for it, its gradient and Adam's moments; a batch's activations and about five times its logits. A
    matrix that is no weight of nn.Linear or nn.Embedding takes as much again when its sum with the base is formed, and
    so does its gradient. All is in float32, unless the settings ask for bf16: the models are in bfloat16 then.

    Args:
        base: the base model.
        finetuned: the fine-tuned model.
        records: by tensor name: the tensor's record, or its stack's records one after the other (uint8).
        tokens: int64 (sequences, length), without padding; at least two sequences.
        settings: `DistillSettings()` if None.
        device: where both models run.
        checkpoints: folder for the state of training, from which the same call goes on if it was interrupted.
        progress: shows a bar over the steps.

    Returns:
        All records, each as long as it was; and a report.

    Raises:
        ValueError: if tokens are too few, of another shape or dtype, or outside the vocabulary, or if the loss is not
            finite.
        CheckpointError: if the fine-tune lacks tensors of its architecture.
        ModuleNotFoundError: if accelerate is not installed.
    """
    settings, progress = settings or DistillSettings(), progress or Progress(False)
    with arguments_for(settings, torch.device(device), checkpoints) as arguments:
        dtype = torch.bfloat16 if arguments.bf16 else torch.float32
        unchanged = {name: bytes(record) for name, record in records.items()}
        data = {name: np.frombuffer(record, np.uint8) for name, record in unchanged.items()}
        teacher = load_model(finetuned, {name: finetuned.tensor(name) for name in finetuned.names()}, dtype)
        check_tokens(tokens, teacher.get_input_embeddings().num_embeddings)
        names, owners = trainable(teacher, base, finetuned, data), owners_of(teacher)
        student = load_model(finetuned, student_tensors(base, finetuned, data, names), dtype)
        models = teacher.to(arguments.device), student.to(arguments.device)
        deltas = {}
        for name in names:
            exact = exact_delta(base, finetuned, name) if settings.trains == "codes" else None
            deltas[name] = attach(student, name, data[name], exact, owners[name])
        pupil = Pupil(deltas.values(), lambda rows: _divergence(*models, tokens[rows.cpu()].to(arguments.device)))
        training, validation = split(len(tokens), settings.validation_share)
        before = mean_loss(pupil, validation, arguments)
        if not math.isfinite(before):
            raise ValueError("distillation: the logits of the fine-tuned or of the compressed model are not finite")
        steps, best_step = 0, 0
        if deltas:
            steps, best_step = train(pupil, training, validation, before, settings, arguments, progress, "Distilling")
        stored = {name: delta.fold() for name, delta in deltas.items()}
        after = mean_loss(pupil, validation, arguments)
    untrained = tuple(sorted(records.keys() - deltas.keys()))
    if not after < before:
        return unchanged, DistillReport(steps, 0, before, before, untrained)
    changed = {name: packed(stack, exact_delta(base, finetuned, name), name) for name, stack in stored.items()}
    return unchanged | changed, DistillReport(steps, best_step, before, after, untrained)


def check_tokens(tokens: Tensor, vocabulary: int | None) -> None:
    """See that token sequences can be trained on.

    Raises:
        ValueError: if there are fewer than two of them, or a token is not in the vocabulary (None: of unknown size).
    """
    shape = tuple(tokens.shape)
    if tokens.dtype != torch.int64 or len(shape) != 2 or shape[0] < 2 or shape[1] < 1:
        raise ValueError(
            "distillation needs two or more sequences, one of them to be held out: tokens must be int64 "
            f"(sequences, length), got {tokens.dtype} {shape}"
        )
    if vocabulary is not None and (tokens.min() < 0 or tokens.max() >= vocabulary):
        raise ValueError(
            f"distillation: tokens must be from 0 to {vocabulary - 1}, got {int(tokens.min())} to {int(tokens.max())}"
        )


def split(sequences: int, validation_share: float) -> tuple[range, range]:
    """The sequences that are trained on, and those that are held out."""
    held_out = min(sequences - 1, max(1, round(sequences * validation_share)))
    return range(sequences - held_out), range(sequences - held_out, sequences)


def exact_delta(base: Checkpoint, finetuned: Checkpoint, name: str) -> Tensor:
    """The delta that a tensor's records stand for: float32 (matrices, m, n)."""
    before, after = base.tensor(name), finetuned.tensor(name)
    return (after[: len(before)].float() - before.float()).reshape(-1, *before.shape[-2:])


def packed(stack: list[Record], exact: Tensor, name: str) -> bytes:
    """A tensor's records with the errors that they have now."""
    for record, delta in zip(stack, exact, strict=True):
        # A matrix of a stack may be equal to the base's: then there is no error to be relative to it
        if (size := delta.norm()) > 0:
            record.relative_error = float((decode_record(record, name) - delta).norm() / size)
    return b"".join(map(pack_record, stack))


def _divergence(teacher: Any, student: Any, tokens: Tensor) -> Tensor:
    """KL(teacher || student), the mean over all tokens, in nats."""
    with torch.no_grad():
        wanted = teacher(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)
    with parametrize.cached():  # some layers read a stack once for each of its matrices
        found = student(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)
    return functional.kl_div(found, wanted, log_target=True, reduction="sum") / tokens.numel()
