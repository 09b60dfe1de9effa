"""Importance scores from the first gradients of LoRA training: GradPruner's IGIA, and the sum of gradient norms.

LoRA trains W + s * B A instead of W. G = ∇B ∇A has W's shape and is used in place of W's own gradient. It is read
before every step of the optimiser and never clipped. Two scores are computed from the G of all steps:

    IGIA: F is the mean of G² over the steps, entry by entry; a layer's score is the sum of F over its matrices
    gradient norm: the sum of ‖G‖_F over steps and matrices

Heads, KV groups and channels get the same scores from their rows and columns. The scores do not need G itself: the
squared entries of a row of B A add up to the sum of that row of (B (A Aᵀ)) * B, and likewise for columns. Only the
masks need G, for one matrix at a time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging

from ..calibration.text import CalibrationSource, text_name
from ..common.progress import Progress
from ..common.validation import check_positive, check_seed, check_whole_number
from ..storage.checkpoint_writer import new_folder
from ..storage.output import check_output
from ..training.trainer import train, training_arguments
from .checks import open_decoder, weights_fingerprint
from .choices import SCORES
from .decoder_shape import GROUPS, HEADS, UNITS, DecoderShape, layer_prefix
from .gradient_sums import MatrixSums
from .importance_plot import draw
from .importance_report import Importance
from .lora import add_lora, load_model, require_training, training_tokens

logger = logging.get_logger(__name__)

# Clipping, the loss scaling that float16 needs, and another loss would change the scores.
_RESERVED = frozenset({"max_grad_norm", "fp16", "label_smoothing_factor", "neftune_noise_alpha"})


def compute_importance(
    model: str | os.PathLike,
    output_dir: str | Path,
    data: CalibrationSource,
    *,
    steps: int = 40,
    batch_size: int = 4,
    learning_rate: float = 1e-4,
    rank: int = 8,
    alpha: int = 32,
    length: int = 512,
    seed: int = 0,
    top_percent: float = 20.0,
    masks: bool = True,
    training: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> Importance:
    """Score the layers, heads, KV groups and channels of a model on text, and write a report.

    The model is trained for a few steps with LoRA on all linear layers of every decoder layer, at a constant
    learning rate; the checkpoint itself is not changed. Memory holds the model, in float32 on a CPU and in bfloat16 on
    a GPU. With masks, the CPU's memory also holds the gradient factors of every matrix, or one float32 number per
    entry where that is less.

    Under `accelerate launch` every process takes its share of a batch, and the first one writes.

    Args:
        model: local folder or Hub id; pruned or not.
        output_dir: folder to make, for importance.json, importance.safetensors, masks.safetensors and, if matplotlib
            is installed, importance.png.
        data: text, as for `calibration.text.calibration_tokens`; repeated if it is too short for all steps.
        steps: optimiser steps, at least 2. Each gives one gradient; the first is zero because LoRA's B starts at zero.
        batch_size: sequences per step, over all processes and accumulated gradients.
        learning_rate: of AdamW.
        rank, alpha: of LoRA; B A is scaled by alpha / rank.
        length: tokens per sequence, at most the model's number of positions.
        seed: for LoRA's first weights and the order of the sequences.
        top_percent: percentage of every matrix's entries that its mask marks, those with the largest F.
        masks: whether to make the masks, which `prune_layers` needs to merge; one bit per weight on disk.
        training: more fields of transformers' TrainingArguments, except those that are arguments here and clipping.
        device: "cpu", "cuda", …; None for a GPU if there is one.
        revision: branch, tag or commit on the Hub.
        progress: show a bar over the steps.

    Raises:
        ValueError: for invalid settings, a model that cannot be pruned, too little text, and losses or gradients
            that are not finite.
        CheckpointError: if the model cannot be read.
        FileNotFoundError: if the text does not exist.
        OutputError: if the output folder is not free.
        ModuleNotFoundError: if peft is not installed.
    """
    require_training()
    with importance_arguments(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, rank=rank, alpha=alpha, length=length,
        seed=seed, top_percent=top_percent, training=training, device=device,
    ) as arguments:  # fmt: skip
        is_first = arguments.process_index == 0
        if is_first:
            check_output(output_dir)
        checkpoint, shape = open_decoder(os.fspath(model), revision)
        tokens = training_tokens(data, checkpoint, shape, samples=steps * batch_size, length=length, seed=seed)
        with new_folder(output_dir) if is_first else contextlib.nullcontext() as folder:
            on_cuda = arguments.device.type == "cuda"
            whole = load_model(checkpoint, torch.bfloat16 if on_cuda else torch.float32)
            lora = add_lora(whole, shape, rank, alpha, seed)
            gradients = _Gradients(lora, shape, keep=masks and is_first)
            losses = train(lora, tokens, arguments, gradients, title="Scoring", progress=Progress(progress))
            if folder is not None:
                settings = {
                    "data": text_name(data),
                    "steps": steps,
                    "batch_size": batch_size,
                    "length": tokens.shape[1],
                    "learning_rate": learning_rate,
                    "rank": rank,
                    "alpha": alpha,
                    "seed": seed,
                }
                if training:
                    settings["training"] = dict(training)
                source = checkpoint.source
                report = Importance(
                    model=Path(os.path.abspath(source)).name if os.path.isdir(source) else source,
                    fingerprint=weights_fingerprint(checkpoint),
                    settings=settings,
                    top_percent=top_percent,
                    losses=losses,
                    **gradients.scores(top_percent),
                )
                report.save(folder)
                if not draw(report, folder / "importance.png"):
                    logger.warning(
                        "importance.png was not drawn, because matplotlib is missing: pip install 'impart-hf[plot]'"
                    )
        arguments.distributed_state.wait_for_everyone()
    return Importance.load(output_dir)


def importance_arguments(
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    rank: int,
    alpha: int,
    length: int,
    seed: int,
    top_percent: float,
    training: Mapping[str, Any] | None,
    device: str | torch.device | None,
) -> contextlib.AbstractContextManager[TrainingArguments]:
    """Check the settings of `compute_importance`, and return the context of the Trainer's (`training_arguments`).

    Raises:
        ValueError: if a setting is invalid; for those that the Trainer has, when the context is entered.
    """
    check_whole_number(2, steps=steps)  # in the first step LoRA's B is zero, and so is the gradient of A
    check_whole_number(1, batch_size=batch_size, rank=rank, alpha=alpha)
    check_whole_number(2, length=length)
    check_positive(learning_rate=learning_rate, top_percent=top_percent)
    check_seed(seed)
    if top_percent > 100:
        raise ValueError(f"top_percent must be at most 100, got {top_percent}")
    defaults = {
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "seed": seed,
    }
    return training_arguments(device, batch_size, defaults, training, _RESERVED)


class _Gradients(TrainerCallback):
    """A callback that sums the gradients of a model's LoRA weights before every step of the optimiser."""

    def __init__(self, model: Any, shape: DecoderShape, keep: bool):
        """Find the LoRA modules.

        Args:
            model: a PEFT model.
            shape: the model's shape.
            keep: whether masks will be made.
        """
        self._shape = shape
        self._sums = {}
        modules = dict(model.get_base_model().named_modules())
        for layer, width in enumerate(shape.layers):
            for linear in shape.linears:
                units = sum(map(width.count, linear.units))
                module = modules[layer_prefix(layer) + linear.name]
                self._sums[layer, linear.name] = module, MatrixSums(units, bool(linear.rows), keep)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for (layer, name), (module, sums) in self._sums.items():
            a, b = (weights["default"].weight.grad for weights in (module.lora_A, module.lora_B))
            a, b = a.detach().float().cpu(), b.detach().float().cpu()
            if not sums.add(a, b):
                raise ValueError(
                    f"step {state.global_step + 1}: the gradient of {layer_prefix(layer)}{name} is not finite; "
                    "check the model's weights, or lower the learning rate"
                )

    def scores(self, top_percent: float) -> dict[str, Any]:
        """Return the arguments of `Importance` that come from the gradients, and free the sums for the masks."""
        layers: dict[str, list[float]] = {score: [] for score in SCORES}
        units: dict[str, dict[str, list[torch.Tensor]]] = {unit: {score: [] for score in SCORES} for unit in UNITS}
        for layer, width in enumerate(self._shape.layers):
            sums = [(linear.units, self._sums[layer, linear.name][1]) for linear in self._shape.linears]
            for score in SCORES:
                layers[score].append(sum(matrix.total(score) for _, matrix in sums))
                found = {unit: torch.zeros(width.count(unit), dtype=torch.float64) for unit in UNITS}
                for kinds, matrix in sums:
                    parts = matrix.units(score).split([width.count(unit) for unit in kinds])
                    for unit, part in zip(kinds, parts, strict=True):
                        found[unit] += part
                found[GROUPS] += found[HEADS].view(width.count(GROUPS), -1).sum(1)
                for unit, values in found.items():
                    units[unit][score].append(values.float())
        masks = {
            layer_prefix(layer) + name: packed
            for (layer, name), (_, matrix) in self._sums.items()
            if (packed := matrix.mask(top_percent)) is not None
        }
        return {
            "shape": self._shape,
            "layers": {score: torch.tensor(values, dtype=torch.float64) for score, values in layers.items()},
            **units,
            "masks": masks.__getitem__ if masks else None,
        }
