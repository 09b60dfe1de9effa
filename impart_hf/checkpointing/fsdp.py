"""The second copy of the weights that the Trainer writes under FSDP, from which alone it resumes there."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.utils import logging

from ..common.files import sync_path
from ..modeling.checkpoints import Checkpoint, same_values
from ..modeling.model_files import HubOptions

logger = logging.get_logger(__name__)

FSDP_WEIGHTS = "pytorch_model_fsdp.bin"


def same_tensors(checkpoint: Path) -> dict[str, str] | None:
    """Return which of a checkpoint's dense tensors each tensor of FSDP's copy is.

    Returns:
        The dense tensors' names by FSDP's, which has tied ones twice; None if there is no such copy, or if it holds
        something else, which is logged: it then has to stay.
    """
    path = checkpoint / FSDP_WEIGHTS
    if not path.is_file():
        return None
    copies = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    dense = Checkpoint(str(checkpoint), HubOptions())
    found: dict[str, str] = {}
    for name, copy in copies.items():
        own = _same(name, copy, dense)
        if own is None:
            logger.warning(f"{path} holds {name}, which the model's weights do not: it stays beside the delta")
            return None
        found[name] = own
    return found


def _same(name: str, tensor: torch.Tensor, dense: Checkpoint) -> str | None:
    """Return the name of a dense tensor with the same values: its own, or that of one that it is tied to."""
    stored = dense.stored_names()
    for other in [name] if name in stored else stored:
        alike = dense.shape(other) == tuple(tensor.shape) and dense.dtype(other) == tensor.dtype
        if alike and same_values(dense.tensor(other), tensor):
            return other
    return None


def write_fsdp_weights(folder: Path, names: Mapping[str, str]) -> None:
    """Write FSDP's copy of the dense weights in a folder.

    Args:
        names: from `same_tensors`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        tensors |= load_file(path)
    torch.save({name: tensors[own] for name, own in names.items()}, folder / FSDP_WEIGHTS)
    sync_path(folder / FSDP_WEIGHTS)
