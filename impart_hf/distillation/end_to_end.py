"""Distillation with both whole models in memory."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parametrize
from transformers import TrainingArguments

from ..common.progress import Progress
from ..modeling.tensors import Model, Tensors
from .record_trainer import RecordTrainer
from .settings import DistillReport, DistillSettings
from .student import finetuned_tensors, load_model, student_tensors, trainable
from .text import check_tokens, divergence


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
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    teacher = load_model(finetuned, finetuned_tensors(finetuned), dtype, arguments.device)
    check_tokens(tokens, teacher.get_input_embeddings().num_embeddings)
    places = trainable(teacher, base, finetuned)
    names = [name for name in records if name in places]
    student = load_model(finetuned, student_tensors(base, finetuned, records, names), dtype, arguments.device)

    def loss(rows: Tensor) -> Tensor:
        batch = tokens[rows.cpu()].to(arguments.device)
        with torch.no_grad():
            logits = teacher(input_ids=batch, use_cache=False).logits
        with parametrize.cached():  # some layers read a stack once for each of its matrices
            return divergence(logits, student(input_ids=batch, use_cache=False).logits)

    record_trainer = RecordTrainer(base, finetuned, len(tokens), settings, arguments, progress)
    deltas = record_trainer.attach(student, names, records, places)
    outcome = record_trainer.train(deltas, loss, "Distilling", "logits")
    untrained = tuple(sorted(records.keys() - deltas.keys()))
    report = DistillReport(outcome.steps, outcome.best_step, outcome.before, outcome.after, untrained)
    return {name: record.tobytes() for name, record in {**records, **outcome.records}.items()}, report
