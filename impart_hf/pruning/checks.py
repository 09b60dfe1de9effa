"""What every pruning command looks at before it begins."""

from __future__ import annotations

import hashlib

import torch

from ..modeling.checkpoints import Checkpoint, CheckpointError, HubOptions, pinned
from ..modeling.checksums import tensor_bytes
from .llama_shape import LlamaShape

_SAMPLES = 256  # entries of a tensor that its model is recognised by


def open_llama(source: str, revision: str | None = None) -> tuple[Checkpoint, LlamaShape]:
    """A LLaMA-shaped checkpoint, opened, and its shape.

    Args:
        source: local folder or Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        CheckpointError: if it is missing or cannot be read, or its tensors are not those of its config.json.
        ValueError: if it is not LLaMA-shaped.
    """
    checkpoint = Checkpoint(source, pinned(source, HubOptions(revision)))
    try:
        shape = LlamaShape.of(checkpoint.config)
    except ValueError as error:
        raise ValueError(f"'{source}' cannot be pruned: {error}") from error
    wanted, found = shape.tensors(), set(checkpoint.names())
    if missing := wanted.keys() - found:
        raise CheckpointError(f"'{source}' lacks {min(missing)}, which its config.json speaks of")
    if unknown := found - wanted.keys():
        raise CheckpointError(f"'{source}' holds {min(unknown)}, which no LLaMA of its config.json has")
    for name, size in wanted.items():
        if checkpoint.shape(name) != size:
            raise CheckpointError(
                f"'{source}': {name} has shape {list(checkpoint.shape(name))}, by config.json it has {list(size)}"
            )
        if not checkpoint.dtype(name).is_floating_point:
            raise CheckpointError(f"'{source}': {name} is {checkpoint.dtype(name)}; only float weights can be pruned")
    return checkpoint, shape


def weights_fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of every tensor's name, shape and some of its entries: which model it is, without reading all of it."""
    found = hashlib.sha256()
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        flat = tensor.reshape(-1)
        samples = flat[:: max(1, flat.numel() // _SAMPLES)].to(torch.float32)
        found.update(f"{name} {list(tensor.shape)}\n".encode())
        found.update(tensor_bytes(samples).tobytes())
    return found.hexdigest()
