"""The tensors of a base that a fine-tune's tensors rest on."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoints import all_finite
from .delta_chain import BaseModel
from .model_files import HubOptions
from .transfer import to_device


class BaseTensors:
    """A base by the names of a fine-tune's tensors: what is added to each delta.

    Usually that is the base's tensor of the same name. A fine-tune may lack tensors of the base that no model reads,
    have fewer rows of a vocabulary, and have an output projection of its own where the base uses its embeddings.

    Attributes:
        checkpoint: the base: a checkpoint, or a delta repository.
        absent: the base's tensors that the fine-tune does not have, sorted.
        row_counts: by name, how many of the base tensor's first rows the fine-tune has, where it does not have all.
        others: by name, the base's tensor that a tensor rests on, where it has another name.
    """

    def __init__(
        self,
        checkpoint: BaseModel,
        absent: Iterable[str] = (),
        row_counts: Mapping[str, int] | None = None,
        others: Mapping[str, str] | None = None,
    ):
        """Choose among a checkpoint's tensors.

        Args:
            absent: names of the base's tensors that the fine-tune does not have; those that the base lacks, too, are
                passed over.
        """
        self.checkpoint, self.absent = checkpoint, sorted(absent)
        self.row_counts, self.others = dict(row_counts or {}), dict(others or {})
        self._names = sorted((set(checkpoint.names()) - set(self.absent)) | self.others.keys())

    @property
    def source(self) -> str:
        return self.checkpoint.source

    @property
    def options(self) -> HubOptions:
        return self.checkpoint.options

    @property
    def config(self) -> dict[str, Any]:
        """The content of the base's config.json."""
        return self.checkpoint.config

    @property
    def folder(self) -> Path:
        """The folder that holds the base's files."""
        return self.checkpoint.folder

    def names(self) -> list[str]:
        """Return the names of the fine-tuned tensors, sorted."""
        return list(self._names)

    def stored_name(self, name: str) -> str:
        """Return the name of the base's tensor that a fine-tuned one rests on."""
        return self.others.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the part that base and fine-tune share."""
        shape, rows = self.checkpoint.shape(self.stored_name(name)), self.row_counts.get(name)
        return shape if rows is None else (rows, *shape[1:])

    def dtype(self, name: str) -> torch.dtype:
        return self.checkpoint.dtype(self.stored_name(name))

    def size(self, name: str) -> int:
        """Return the size of that part, in bytes."""
        return torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the part that base and fine-tune share, on a device."""
        return to_device(self.shared(name, self.checkpoint.tensor(self.stored_name(name))), device)

    def whole_and_checksum(self, name: str) -> tuple[torch.Tensor, int]:
        """Return the base's whole tensor, on the CPU, and its checksum."""
        return self.checkpoint.tensor_and_checksum(self.stored_name(name))

    def shared(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """Return the part of the base's tensor that the fine-tune has."""
        return whole if self.row_counts.get(name) is None else whole[: self.row_counts[name]]


def finite_where_base_is(tensor: torch.Tensor, base: torch.Tensor) -> bool:
    """Return whether a fine-tuned tensor holds NaN or infinity only where its base does, as in rows of padding.

    Args:
        tensor: of the base's shape, or with rows added to it.
    """
    if all_finite(tensor):
        return True
    shared, added = (
        (tensor, tensor.new_empty(0)) if tensor.shape == base.shape else (tensor[: len(base)], tensor[len(base) :])
    )
    return all_finite(shared[base.isfinite().to(tensor.device)]) and all_finite(added)
