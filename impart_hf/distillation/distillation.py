"""Distillation of a compression's records."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..calibration.streamed_model import streamed_model
from ..common.progress import Progress
from ..modeling.checkpoints import Checkpoint
from .blocks import PURPOSE, distill_blocks
from .end_to_end import distill_end_to_end
from .settings import DistillReport, DistillSettings
from .text import check_tokens
from .trainer import arguments_for


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

    Held in memory, on `device`: the fine-tuned and the compressed model, both whole, in float32, or in bfloat16 with
    bf16, which is the default on CUDA; for every kept value of a trained record 16 bytes, for it, its gradient and
    Adam's moments, 4 for the stored value, and under a mask 8 for its position; a batch's activations and about five
    times its logits. A matrix that is no weight of nn.Linear or nn.Embedding takes as much again when its sum with the
    base is formed, and so does its gradient.

    With `settings.blocks`, both models in float32, but of each only the embeddings and so many layers, for whose
    records alone there is a state of training; in the computer's memory about four times a float32 hidden state for
    every token. Embeddings are not trained then, and the steps of a report are the sums over all groups of layers.

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
    """
    settings = settings or DistillSettings()
    with arguments_for(settings, torch.device(device), checkpoints) as arguments:
        run = distill_end_to_end if settings.blocks is None else distill_blocks
        data = {name: np.frombuffer(record, np.uint8) for name, record in records.items()}
        return run(base, finetuned, data, tokens, settings, arguments, progress or Progress(False))


def check_distillation(
    finetuned: Checkpoint, tokens: Tensor, settings: DistillSettings, device: str | torch.device
) -> None:
    """See that a model can be distilled so, before any work is done.

    Raises:
        ValueError: if tokens, the Trainer's fields or the model's architecture will not do.
    """
    check_tokens(tokens, finetuned.config.get("vocab_size"))
    with arguments_for(settings, torch.device(device), None):
        pass
    if settings.blocks is not None:
        streamed_model(finetuned, tokens, device, PURPOSE).check_output()
