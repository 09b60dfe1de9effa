"""Verification of a delta repository against its base."""

import torch

from ..common.progress import Progress
from ..modeling.base_tensors import finite_where_base_is
from ..modeling.checkpoints import all_finite
from ..modeling.delta_record import DeltaFormatError
from ..modeling.delta_repository import DeltaRepository
from .open import warn_of_adapter_beside


def verify(
    repository: DeltaRepository, progress: Progress | None = None, *, device: torch.device | str = "cpu"
) -> None:
    """Decode every tensor, and check all checksums of delta and base, every record, and that all values are finite.

    An adapter in the repository is not checked, which a warning says.

    Args:
        repository: from `open_repository`.
        progress: shows a bar over the tensors.
        device: where tensors are decoded.

    Raises:
        DeltaFormatError: naming the first damaged tensor.
        WrongBaseError: naming the first tensor in which the base differs.
    """
    warn_of_adapter_beside(repository.source, repository.options)
    names = (progress or Progress(False)).track(repository.names(), "Verifying")
    for _, (name, tensor) in zip(names, repository.tensors(device), strict=True):
        if (
            tensor.is_floating_point()
            and not repository.parts[name].exact  # whose checksum says that they are the fine-tune's
            and not all_finite(tensor)
            and not finite_where_base_is(tensor, repository.base_tensor(name))
        ):
            raise DeltaFormatError(f"{name} decodes to NaN or infinity: its record is damaged")
