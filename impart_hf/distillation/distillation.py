"""The function `distill`, which trains a compression's records."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..common.progress import Progress
from ..modeling.checkpoints import text_config
from ..modeling.tensors import Model, Tensors
from .blocks import check_blocks, distill_blocks
from .end_to_end import distill_end_to_end
from .settings import DistillReport, DistillSettings
from .student import empty_model, trainable
from .text import check_tokens
from .trainer import arguments_for


def distill(
    base: Tensors,
    finetuned: Model,
    records: Mapping[str, bytes | np.ndarray],
    tokens: Tensor,
    settings: DistillSettings | None = None,
    *,
    device: str | torch.device = "cpu",
    checkpoints: Path | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, bytes], DistillReport]:
    """Train the column scales of all records, and their kept values.

    The last sequences are held out, and the step with the lowest loss on them is kept. If the numbers of that step,
    rounded as they are stored, are no better there than before, the records are returned unchanged. On a CPU, the same
    inputs give the same bytes.

    Records of these tensors are not trained: tensors with added rows, tensors that are shared by modules other than
    embeddings and linear layers, tensors that transformers combines in other ways than experts in a stack, and tensors
    that text does not need (an image encoder).

    Memory on `device`: the fine-tuned and the compressed model, both whole, in float32, or in bfloat16 with bf16, the
    default on CUDA; for every kept value of a trained record, 8 bytes for the value and its gradient, 8 for Adam's
    moments (2 with 8 bits), and with a mask 4 for its position; and what a step needs, see `memory.DistillationMemory`.
    How many sequences are run at a time, and whether layers are recomputed, is chosen by what fits, unless the settings
    say it. A matrix that is not the weight of an nn.Linear or nn.Embedding takes its size twice more, for its sum with
    the base and for the gradient of that, while its layer runs.

    With `settings.blocks`, both models are in float32, but only their embeddings and that many layers are loaded, and
    only the records of these layers have optimizer states; CPU memory holds about four float32 hidden states for every
    token. The embeddings are not trained then, and the report's steps are the sums over all groups of layers.

    Args:
        base: the base model.
        finetuned: the fine-tuned model.
        records: by tensor name: the tensor's record, or its stack's records concatenated (uint8).
        tokens: int64 (sequences, length), without padding; at least two sequences.
        settings: `DistillSettings()` if None.
        device: where both models run.
        checkpoints: folder for training checkpoints, from which the same call resumes after an interruption.
        progress: shows a bar over the steps.

    Returns:
        All records, with their lengths unchanged, and a report.

    Raises:
        ValueError: if tokens are too few, of another shape or dtype, or outside the vocabulary, or if the loss is not
            finite, or not even one sequence fits in the memory of the device.
        ModuleNotFoundError: if the optimizer needs a package that is not installed.
        CheckpointError: if the fine-tune lacks tensors of its architecture.
    """
    settings = settings or DistillSettings()
    with arguments_for(settings, torch.device(device), checkpoints) as arguments:
        run = distill_end_to_end if settings.blocks is None else distill_blocks
        data = {name: np.frombuffer(record, np.uint8) for name, record in records.items()}
        return run(base, finetuned, data, tokens, settings, arguments, progress or Progress(False))


def check_distillation(
    base: Tensors, finetuned: Model, tokens: Tensor, settings: DistillSettings, device: str | torch.device
) -> frozenset[str]:
    """Check that a model can be distilled with these settings, before any work is done.

    Returns:
        The names of the tensors that are trained, if they have records.

    Raises:
        ValueError: if tokens or the Trainer's fields are invalid, or the model's architecture is not supported.
    """
    check_tokens(tokens, getattr(text_config(finetuned.config), "vocab_size", None))
    with arguments_for(settings, torch.device(device), None):
        pass
    if settings.blocks is not None:
        return check_blocks(base, finetuned, tokens, device)
    return frozenset(trainable(empty_model(finetuned), base, finetuned))
