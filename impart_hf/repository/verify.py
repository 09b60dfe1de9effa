"""Checking that a delta repository decodes against its base."""

import torch

from ..common.progress import Progress
from ..modeling.checkpoints import all_finite
from ..modeling.delta_record import DeltaFormatError
from ..modeling.delta_repository import DeltaRepository


def verify(
    repository: DeltaRepository, progress: Progress | None = None, *, device: str | torch.device = "cpu"
) -> None:
    """Decode every tensor: all checksums of delta and base hold, every record fits, every value is finite.

    Args:
        repository: with its base.
        progress: shows a bar over the tensors.
        device: where tensors are decoded.

    Raises:
        DeltaFormatError: naming the first damaged tensor.
        WrongBaseError: naming the first tensor in which the base differs.
    """
    for name in (progress or Progress(False)).track(repository.names(), "Verifying"):
        tensor = repository.tensor(name, device)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise DeltaFormatError(f"{name} decodes to NaN or infinity")
