"""Distillation with the fine-tuned and the compressed model side by side."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parametrize
from transformers import TrainingArguments

from ..modeling.checkpoints import Checkpoint
from ..progress import Progress
from .loop import Pupil, mean_loss, train
from .settings import DistillReport, DistillSettings
from .student import attach, exact_delta, load_model, owners_of, packed, student_tensors, trainable
from .text import check_tokens, divergence, split


def distill_end_to_end(
    base: Checkpoint,
    finetuned: Checkpoint,
    records: Mapping[str, np.ndarray],
    tokens: Tensor,
    settings: DistillSettings,
    arguments: TrainingArguments,
    progress: Progress,
) -> tuple[dict[str, bytes], DistillReport]:
    """`distill`, by the divergence of the logits."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    teacher = load_model(finetuned, {name: finetuned.tensor(name) for name in finetuned.names()}, dtype)
    check_tokens(tokens, teacher.get_input_embeddings().num_embeddings)
    names, owners = trainable(teacher, base, finetuned, records), owners_of(teacher)
    student = load_model(finetuned, student_tensors(base, finetuned, records, names), dtype)
    teacher, student = teacher.to(arguments.device), student.to(arguments.device)

    def loss(rows: Tensor) -> Tensor:
        batch = tokens[rows.cpu()].to(arguments.device)
        with torch.no_grad():
            wanted = teacher(input_ids=batch, use_cache=False).logits
        with parametrize.cached():  # some layers read a stack once for each of its matrices
            return divergence(wanted, student(input_ids=batch, use_cache=False).logits)

    deltas = {}
    for name in names:
        exact = exact_delta(base, finetuned, name) if settings.trains == "codes" else None
        deltas[name] = attach(student, name, records[name], exact, owners[name])
    pupil = Pupil(deltas.values(), loss)
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
    unchanged = {name: record.tobytes() for name, record in records.items()}
    if not after < before:
        return unchanged, DistillReport(steps, 0, before, before, untrained)
    changed = {name: packed(stack, exact_delta(base, finetuned, name), name) for name, stack in stored.items()}
    return unchanged | changed, DistillReport(steps, best_step, before, after, untrained)
