"""Models as tensors that are found by name and made one at a time."""

from typing import Any, Protocol

import torch

from .checkpoints import DTYPE_NAMES


class Tensors(Protocol):
    """A model's tensors by name: of a checkpoint, decoded from a delta repository, or merged."""

    @property
    def source(self) -> str:
        """The model's name, for messages: a folder, a Hub id, or what it is made of."""

    def names(self) -> list[str]:
        """The tensors' names, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; no weights are read."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor; no weights are read."""

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """The tensor, made on a device or put there."""


class LazyTensor:
    """One tensor with the interface of a safetensors slice, which transformers materialises when it loads it."""

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
