"""A model's tensors as the Trainer holds them in memory: what it reads back from a checkpoint.

The Trainer copies the tensors of a checkpoint's files into the model without transformers' conversions, and passes over
names that the model does not have. So what it is given has the model's own names: of files that lack a prefix, as those
of GPT-2 on the Hub do, or that have experts one by one, it would read nothing.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..common.checkpoint_layout import CheckpointLayout, TensorGroup, known_layout
from ..common.files import sync_path
from ..modeling.checkpoints import same_values
from ..modeling.model_files import CheckpointError
from ..modeling.tensors import Tensors
from ..storage.checkpoint_writer import DenseTensor

logger = logging.get_logger(__name__)

# Under FSDP the Trainer writes the model's tensors a second time, and reads only these.
FSDP_WEIGHTS = "pytorch_model_fsdp.bin"


class TrainedTensors:
    """The parameters and stored buffers of a model, made of a checkpoint's tensors.

    Attributes:
        tensors: by their names in the model; each is made when it is asked for.
    """

    def __init__(self, stored: Tensors, config: PreTrainedConfig):
        """Find out what the tensors become; none is read.

        Args:
            stored: of a checkpoint, or a delta repository.
            config: the model's configuration.

        Raises:
            CheckpointError: if transformers has no model for it.
        """
        layout: CheckpointLayout | None = known_layout(stored, config)
        if layout is None:
            raise CheckpointError(f"transformers has no language model for '{stored.source}'")
        self._tied = layout.tied
        self.tensors: dict[str, DenseTensor] = {}
        for group in layout.groups.values():
            for name, empty in group.parameters.items():
                make = partial(_made, stored, group, name)
                self.tensors[name] = DenseTensor(name, tuple(empty.shape), empty.dtype, make, checked=True)

    def stored_name(self, name: str) -> str | None:
        """Return the name of the tensor that holds a parameter's values, its own or that of one it is tied to."""
        while name not in self.tensors and name in self._tied:
            name = self._tied[name]
        return name if name in self.tensors else None


def _made(stored: Tensors, group: TensorGroup, name: str) -> torch.Tensor:
    return group.to_parameters({member.name: stored.tensor(member.name) for member in group.members})[name]


def fsdp_names(checkpoint: Path, trained: TrainedTensors) -> dict[str, str]:
    """Return which of a model's tensors each tensor is that the Trainer has written for FSDP.

    Args:
        checkpoint: the Trainer's folder.
        trained: the model's tensors.

    Returns:
        The stored tensors' names by FSDP's, which has tied ones twice. Nothing if there is no such file, or if it holds
        something else, which is logged: it then has to stay.
    """
    path = checkpoint / FSDP_WEIGHTS
    if not path.is_file():
        return {}
    found: dict[str, str] = {}
    for name, copy in torch.load(path, map_location="cpu", mmap=True, weights_only=True).items():
        own = trained.stored_name(name)
        tensor = None if own is None else trained.tensors[own].make()
        if own is None or tensor is None or tensor.dtype != copy.dtype or not same_values(tensor, copy):
            logger.warning(f"{path} holds {name}, which the model's weights do not: it stays beside the delta")
            return {}
        found[name] = own
    return found


def write_fsdp_weights(folder: Path, names: Mapping[str, str]) -> None:
    """Write FSDP's file beside the dense weights in a folder.

    Args:
        names: from `fsdp_names`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        tensors |= load_file(path)
    torch.save({name: tensors[own] for name, own in names.items()}, folder / FSDP_WEIGHTS)
    sync_path(folder / FSDP_WEIGHTS)
