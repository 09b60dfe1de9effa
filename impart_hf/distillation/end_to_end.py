"""Distillation with both whole models in memory."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainingArguments

from ..common.progress import Progress
from ..modeling.delta_record import parse_stack
from ..modeling.tensors import Model, Tensors
from .fit import fit
from .memory import DeltaSize
from .recomputation import recompute_layers
from .record_trainer import RecordTrainer
from .settings import DistillReport, DistillSettings
from .student import empty_model, finetuned_tensors, load_model, student_tensors, trainable
from .text import check_tokens, whole_model_loss


def distill_end_to_end(
    base: Tensors,
    finetuned: Model,
    records: Mapping[str, np.ndarray],
    tokens: Tensor,
    settings: DistillSettings,
    arguments: TrainingArguments,
    progress: Progress,
) -> tuple[dict[str, bytes], DistillReport]:
    """Distil as `distill` does, with the KL divergence of the logits as the loss."""
    empty: Any = empty_model(finetuned)
    check_tokens(tokens, empty.get_input_embeddings().num_embeddings)
    deltas_of: dict[str, list[DeltaSize]] = {}  # by parameter: of experts, those of all its tensors
    for name, place in trainable(empty, base, finetuned).items():
        if name in records:
            deltas_of.setdefault(place.names[0], []).extend(map(DeltaSize.of, parse_stack(records[name], name)))
    how = fit(empty.config, deltas_of, settings, arguments, (len(tokens), tokens.shape[1]))
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    teacher = load_model(finetuned, finetuned_tensors(finetuned), dtype, arguments.device)
    places = trainable(teacher, base, finetuned)
    names = [name for name in records if name in places]
    student = load_model(finetuned, student_tensors(base, finetuned, records, names), dtype, arguments.device)

    record_trainer = RecordTrainer(base, finetuned, len(tokens), settings, arguments, how.micro_batch_size)
    deltas = record_trainer.attach(student, names, records, places)
    if how.recomputes:
        recompute_layers(student)
    of_batch = whole_model_loss(teacher, student, how.recomputes)

    def loss(rows: Tensor) -> Tensor:
        return of_batch(tokens[rows.cpu()].to(arguments.device))

    outcome = record_trainer.train(deltas, loss, "logits", progress)
    untrained = tuple(sorted(records.keys() - deltas.keys()))
    report = DistillReport(outcome.steps, outcome.best_step, outcome.before, outcome.after, untrained)
    return {name: record.tobytes() for name, record in {**records, **outcome.records}.items()}, report
