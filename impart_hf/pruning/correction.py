"""Least-squares correction: the columns that stay take over what they can of those that are removed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..calibration.layer_stream import stream_layers
from ..calibration.streamed_model import streamed_model
from ..calibration.text import CalibrationSource, model_tokens
from ..common.progress import Progress
from ..modeling.checkpoints import Checkpoint

# Of the mean diagonal of the inputs' second moment, as in GPTQ: with little text the correction stays small.
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
    """Weights without some of their columns, corrected on text; every layer behind the pruned ones before it.

    Args:
        checkpoint: the model before its widths are pruned.
        columns: for the weights that lose columns, int64 indices of those that stay.
        calibration: the text.
        samples, length: sequences of it at most, and their tokens.
        device: where it is computed.
        folder: where the corrected weights are put, so that memory holds one layer.
        progress: for a bar over the layers.

    Returns:
        Safetensors files of the corrected weights, each under "weight", in the checkpoint's dtypes.

    Raises:
        ValueError: if there is no text, or the model's activations on it are not finite.
        ModuleNotFoundError: if accelerate is missing.
    """
    tokens = model_tokens(checkpoint, calibration, samples, length)
    model = streamed_model(checkpoint, tokens, device)
    files: dict[str, Path] = {}

    def corrected(name: str, hessian: Tensor | None) -> Tensor:
        weight = checkpoint.tensor(name)
        stay = columns.get(name)
        if stay is None or len(stay) == weight.shape[1]:
            return weight
        assert hessian is not None
        cut = least_squares(weight.to(hessian), hessian, stay.to(hessian.device)).to("cpu", weight.dtype)
        files[name] = folder / f"{len(files)}.safetensors"
        save_file({"weight": cut.contiguous()}, files[name])
        # Nothing but these columns reads what was removed: with zeros there, the layer is the pruned one.
        whole = torch.zeros_like(weight)
        whole[:, stay] = cut
        return whole

    stream_layers(model, tokens, corrected, progress=progress)
    return files


def least_squares(weight: Tensor, hessian: Tensor, stay: Tensor) -> Tensor:
    """The columns that stay, changed so that the output comes nearest to that of the whole matrix.

    With x an input, R the columns removed and S those that stay, W_S + Δ minimises the mean of
    ‖W_R x_R - Δ x_S‖² + d ‖Δ‖², d being a hundredth of the mean diagonal of E[x xᵀ].

    Args:
        weight: (out, in), floating point.
        hessian: (in, in), E[x xᵀ], on the same device.
        stay: int64, sorted indices of columns.

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
