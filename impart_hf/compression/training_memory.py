"""The memory that a compression's distillation will take, before there are records."""

import psutil
import torch

from ..common.configs import model_config
from ..distillation.memory import VALUES_PER_BYTE, DeltaSize, DistillationMemory
from ..distillation.settings import DistillSettings
from ..methods import MethodConfig
from ..modeling.tensors import Model
from ..modeling.width_codes import BITS
from .plan import CompressionPlan

_ONE_BIT = next(width for width, bits in BITS.items() if bits == 1)
_MOST_VALUES = 8  # kept values for each byte of a record
# If the model's code does not run without values: bytes of a float32, and of all that a trained number needs.
_FLOAT, _TRAINED = 4, 24


def training_bytes(
    plan: CompressionPlan,
    method: MethodConfig,
    settings: DistillSettings,
    finetuned: Model,
    tokens: tuple[int, int],
    device: torch.device,
) -> int:
    """Return about how much memory distillation takes on the CPU, in bytes: what is on another device is not counted.

    Args:
        tokens: number of sequences of the text, and tokens of each.
    """
    density = VALUES_PER_BYTE.get(method.name, _MOST_VALUES)
    deltas = {
        t.name: [DeltaSize.factored((t.shape[-2], t.shape[-1]), density * t.max_bytes / t.matrices, _ONE_BIT)]
        * t.matrices
        for t in plan.encoded
    }
    on_cpu = device.type == "cpu"
    free = psutil.virtual_memory().available
    try:
        memory = DistillationMemory(
            model_config(finetuned.config), deltas, settings, bf16=device.type == "cuda", tokens=tokens
        )
        found = memory.forecast(settings.micro_batch_size or settings.batch_size, bool(settings.gradient_checkpointing))
        if on_cpu and found.device > free and settings.micro_batch_size is None:  # the run then takes what fits
            found = memory.forecast(1, settings.gradient_checkpointing is not False)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        numbers = sum(t.dense_bytes // t.dtype.itemsize for t in plan.tensors)
        trained = density * sum(t.max_bytes for t in plan.encoded)
        return round(2 * _FLOAT * numbers + _TRAINED * trained) if on_cpu else 0
    return found.host + (found.device if on_cpu else 0)
