"""Least-squares correction: kept columns are changed to compensate for the removed ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..calibration.layer_stream import Moments, stream_layers
from ..calibration.streamed_model import streamed_model
from ..calibration.text import CalibrationSource, model_tokens
from ..common.progress import Progress
from ..modeling.checkpoints import Checkpoint

# Share of the mean diagonal of the inputs' second moment, as in GPTQ. It keeps the correction small if there is little
# text.
_DAMPING = 0.01


def corrected_weights(
    checkpoint: Checkpoint,
    columns: Mapping[str, Tensor],
    calibration: CalibrationSource,
    samples: int,
    length: int,
    device: str | torch.device,
    folder: Path,
    progress: Progress,
) -> dict[str, Path]:
    """Remove columns of weights and correct the kept ones on calibration text.

    The inputs of every layer are computed with the layers before it already pruned.

    Args:
        checkpoint: the model before its widths are pruned.
        columns: int64 indices of the kept columns, by the name of each weight that loses columns.
        calibration: the calibration text.
        samples, length: the largest number of sequences, and tokens per sequence.
        device: where the correction is computed.
        folder: where the corrected weights are written, so that memory holds one layer only.
        progress: for a bar over the layers.

    Returns:
        By name, a safetensors file of each corrected weight, stored as "weight" in the checkpoint's dtype.

    Raises:
        ValueError: if the text is empty, or the model's activations on it are not finite.
    """
    tokens = model_tokens(checkpoint, calibration, samples, length)
    model = streamed_model(checkpoint, tokens, device)
    files: dict[str, Path] = {}

    def corrected(name: str, hessian: Moments) -> Tensor:
        weight = checkpoint.tensor(name)
        stay = columns.get(name)
        if stay is None or len(stay) == weight.shape[1]:
            return weight
        assert isinstance(hessian, Tensor)
        cut = least_squares(weight.to(hessian), hessian, stay.to(hessian.device)).to("cpu", weight.dtype)
        files[name] = folder / f"{len(files)}.safetensors"
        save_file({"weight": cut.contiguous()}, files[name])
        # Only the removed columns read the removed heads and channels, so zeros there make the layer the pruned one.
        whole = torch.zeros_like(weight)
        whole[:, stay] = cut
        return whole

    stream_layers(model, tokens, corrected, folder / "states", progress=progress)
    return files


def least_squares(weight: Tensor, hessian: Tensor, stay: Tensor) -> Tensor:
    """Return the kept columns, changed so that the output is as near as possible to that of the whole matrix.

    For inputs x, removed columns R and kept columns S, the result is W_S + Δ. Δ minimises the mean of
    ‖W_R x_R - Δ x_S‖² + d ‖Δ‖², where d is a hundredth of the mean diagonal of E[x xᵀ].

    Args:
        weight: (out, in), floating point.
        hessian: (in, in), E[x xᵀ], on the same device.
        stay: int64, sorted indices of the kept columns.

    Returns:
        (out, len(stay)), in the weight's dtype.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[stay] = False
    moment = hessian.double()
    inner = moment[stay][:, stay]
    damping = _DAMPING * moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    inner.diagonal().add_(damping)
    target = weight.double()[:, gone] @ moment[gone][:, stay]
    change = torch.cholesky_solve(target.T, torch.linalg.cholesky(inner)).T
    return (weight.double()[:, stay] + change).to(weight.dtype)
