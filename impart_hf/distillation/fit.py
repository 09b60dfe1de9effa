"""How many sequences a process runs at a time, and whether layers are recomputed: what fits in the memory."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedConfig, TrainingArguments
from transformers.utils import logging

from ..common.meta_model import meta_model
from .memory import DeltaSize, DistillationMemory, Forecast
from .settings import DistillSettings

logger = logging.get_logger(__name__)

# The most of the free memory that a forecast may take: allocators need some, and forecasts err.
_USABLE = 0.85


@dataclass(frozen=True)
class Fit:
    """How a step is run.

    Attributes:
        micro_batch_size: sequences that a process runs at a time.
        recomputes: whether layers are recomputed in the backward pass.
    """

    micro_batch_size: int
    recomputes: bool


def fit(
    config: PreTrainedConfig,
    deltas: Mapping[str, Sequence[DeltaSize]],
    settings: DistillSettings,
    arguments: TrainingArguments,
    tokens: tuple[int, int],
) -> Fit:
    """Choose what the settings leave open so that distillation fits in the memory that is free.

    Smaller micro-batches are preferred to recomputing layers, which takes longer. The results differ by rounding only.
    If nothing fits by the forecast, the least is taken, with a warning.

    Args:
        config, deltas, tokens: as for `DistillationMemory`.
        arguments: the Trainer's settings.
    """
    batch = settings.micro_batch_size or arguments.per_device_train_batch_size
    batch = min(batch, arguments.per_device_train_batch_size)
    sizes = [batch] if settings.micro_batch_size else [batch >> shift for shift in range(batch.bit_length())]
    choices = (False, True) if settings.gradient_checkpointing is None else (settings.gradient_checkpointing,)
    free = _free_bytes(arguments.device)
    if len(sizes) * len(choices) == 1 or free is None or _is_small(config, deltas, tokens[1] * batch, free):
        return Fit(batch, choices[0])
    memory = DistillationMemory(config, deltas, settings, bf16=arguments.bf16, tokens=tokens)
    least: Forecast | None = None
    for recomputes in choices:
        for size in sizes:
            try:
                least = memory.forecast(size, recomputes)
            except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
                logger.warning(
                    f"distillation: its memory cannot be forecast for this model ({error}): if it runs out, give "
                    "micro_batch_size=1, shorter sequences, or fewer layers at a time with blocks"
                )
                return Fit(batch, choices[-1])
            if least.device <= _USABLE * free:
                return Fit(size, recomputes)
    assert least is not None
    logger.warning(
        f"distillation needs about {_gigabytes(least.device)} of memory (weights {_gigabytes(least.weights)}, trained "
        f"numbers {_gigabytes(least.state)}, a step {_gigabytes(least.step)}), and {_gigabytes(free)} are free: "
        'if it fails, give optim="adamw_bnb_8bit", shorter sequences, or fewer layers at a time with blocks'
    )
    return Fit(sizes[-1], choices[-1])


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _free_bytes(device: torch.device) -> int | None:
    """Return a process's share of the memory that is free on a device; None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return None


def _is_small(config: PreTrainedConfig, deltas: Mapping[str, Sequence[DeltaSize]], tokens: int, free: int) -> bool:
    """Return whether distillation takes so little memory that a forecast is not worth its time.

    Args:
        tokens: tokens that are run at a time.
    """
    shapes = [tuple(parameter.shape) for parameter in meta_model(config).parameters()]
    weights = sum(torch.Size(shape).numel() for shape in shapes)
    values = sum(plane.columns * plane.rows for sizes in deltas.values() for size in sizes for plane in size.planes)
    activations = tokens * sum(sum(shape) for shape in shapes if len(shape) > 1)
    # Far more than the bytes of all of them: of float32 numbers, several for each activation.
    return 8 * weights + 40 * values + 64 * activations < free // 2
