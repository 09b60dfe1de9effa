"""The size of a model's tensors, without reading them."""

import torch

from ..modeling.tensors import Tensors


def weight_bytes(tensors: Tensors) -> int:
    """Return the bytes of all tensors of a model."""
    return sum(torch.Size(tensors.shape(n)).numel() * tensors.dtype(n).itemsize for n in tensors.names())
