"""The interface of a model's tensors, which are found by name and made one at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from .checkpoints import DTYPE_NAMES, HubOptions


class Tensors(Protocol):
    """A model's tensors by name: of a checkpoint, decoded from a delta repository, or merged."""

    @property
    def source(self) -> str:
        """The model's name for messages: a folder, a Hub id, or the names of merged models."""

    def names(self) -> list[str]:
        """Return the tensors' names, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading weights."""

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype without reading weights."""

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the tensor on a device."""


class Model(Tensors, Protocol):
    """A dense model's tensors with its configuration: a checkpoint, or one under other names."""

    @property
    def options(self) -> HubOptions:
        """How its files are found on the Hub."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of its config.json."""

    @property
    def folder(self) -> Path:
        """The folder that holds its files."""

    @property
    def tied(self) -> bool:
        """Whether the output projection shares the input embeddings."""

    @property
    def weight_bytes(self) -> int:
        """Size of its weight files, in bytes."""


class StoredModel(Model, Protocol):
    """A `Model` under the names of its own files, as which transformers reads it."""

    def stored_names(self) -> list[str]:
        """Return the names of all tensors that it holds, sorted: also of those that `names` leaves out."""


class LazyTensor:
    """A tensor with the interface of a safetensors slice: transformers makes it when it loads it."""

    def __init__(self, tensors: Tensors, name: str, device: torch.device | str):
        self._tensors, self._name, self._device = tensors, name, device

    def get_shape(self) -> list[int]:
        return list(self._tensors.shape(self._name))

    def get_dtype(self) -> str:
        return DTYPE_NAMES[self._tensors.dtype(self._name)]

    @property
    def dtype(self) -> torch.dtype:
        return self._tensors.dtype(self._name)

    def is_floating_point(self) -> bool:
        """Return whether its dtype is; transformers asks if no configuration says in which dtype to load."""
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensors.tensor(self._name, self._device)[index]
