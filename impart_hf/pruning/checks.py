"""Checks that every pruning command makes on its model before it begins."""

from __future__ import annotations

import hashlib

import torch

from ..adapters.adapter_files import refuse_adapter
from ..modeling.checkpoints import Checkpoint
from ..modeling.checksums import tensor_bytes
from ..modeling.model_files import CheckpointError, HubOptions, pinned
from .decoder_shape import DecoderShape

_SAMPLES = 256  # entries of each tensor that go into a model's fingerprint


def open_decoder(source: str, revision: str | None = None) -> tuple[Checkpoint, DecoderShape]:
    """Open a checkpoint of a family that can be pruned, and check its tensors against its config.json.

    Args:
        source: local folder or Hub id.
        revision: branch, tag or commit on the Hub.

    Returns:
        The checkpoint and its shape.

    Raises:
        CheckpointError: if it is missing or cannot be read, or its tensors do not match its config.json.
        ValueError: if it is of another family, or its config.json is not valid.
    """
    options = pinned(source, HubOptions(revision))
    checkpoint = Checkpoint(source, options)
    refuse_adapter(source, options)
    try:
        shape = DecoderShape.of(checkpoint.config)
    except ValueError as error:
        raise ValueError(f"'{source}' cannot be pruned: {error}") from error
    expected, stored = shape.tensors(), set(checkpoint.names())
    if missing := expected.keys() - stored:
        raise CheckpointError(f"'{source}' lacks {min(missing)}, which its config.json requires")
    if unknown := stored - expected.keys():
        raise CheckpointError(f"'{source}' holds {min(unknown)}, which a model with its config.json does not have")
    for name, size in expected.items():
        if checkpoint.shape(name) != size:
            raise CheckpointError(
                f"'{source}': {name} has shape {list(checkpoint.shape(name))}, but config.json requires {list(size)}"
            )
        if not checkpoint.dtype(name).is_floating_point:
            raise CheckpointError(f"'{source}': {name} is {checkpoint.dtype(name)}; only float weights can be pruned")
    return checkpoint, shape


def weights_fingerprint(checkpoint: Checkpoint) -> str:
    """Return a hash of every tensor's name, shape and sampled entries; it identifies a model's weights."""
    digest = hashlib.sha256()
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        flat = tensor.reshape(-1)
        samples = flat[:: max(1, flat.numel() // _SAMPLES)].to(torch.float32)
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(samples).tobytes())
    return digest.hexdigest()
