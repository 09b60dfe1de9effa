"""The interface of a model's tensors, which are found by name and made one at a time."""

from typing import Any, Protocol

import torch

from .checkpoints import DTYPE_NAMES


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

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensors.tensor(self._name, self._device)[index]
