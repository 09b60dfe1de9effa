"""Importance from the first gradients of a LoRA fine-tuning: GradPruner's IGIA, and the sum of gradient norms.

With LoRA, W + s * B A is trained in W's place. G = ∇B ∇A, of W's shape, stands for W's own gradient; it is read before
every step of the optimiser and never clipped. Of the steps' G come

    F = mean over the steps of G², entry by entry (IGIA): a layer's score is the sum over its seven matrices
    gradient norm: the sum of ‖G‖_F over steps and matrices

and the same for the rows and columns that belong to a head, a KV group or a channel. None of these needs G itself:
the squares of a row of B A sum to the row of (B (A Aᵀ)) * B, of a column alike. The masks do, one matrix at a time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..calibration.text import CalibrationSource
from ..common.names import text_name
from ..common.progress import Progress
from ..common.validation import check_positive, check_seed, check_whole
from ..storage.checkpoint_writer import new_folder
from ..storage.output import check_output
from ..training.trainer import train, training_arguments
from .checks import open_llama, weights_fingerprint
from .choices import SCORES
from .gradient_sums import MatrixSums
from .importance_plot import draw
from .importance_report import Importance
from .llama_shape import LINEAR, LlamaShape, layer_prefix
from .lora import add_lora, load_model, require_training, training_tokens

logger = logging.get_logger(__name__)

# Clipped gradients would be other scores; so would scaled ones, as float16 needs them, and those of another loss.
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
    """Score the layers, heads, KV groups and channels of a LLaMA-shaped model on text, and write a report.

    The model is trained for a few steps with LoRA on the seven linear layers of every decoder layer, at a constant
    learning rate; it is left as it was. In memory are the model, on a CPU in float32, on a GPU in bfloat16; and, with
    masks, on the CPU for every matrix its gradients' factors or, where that is less, a float32 number an entry.

    Under `accelerate launch` every process takes its share of a batch, and the first one writes.

    Args:
        model: local folder or Hub id; pruned or not.
        output_dir: folder to make, for importance.json, importance.safetensors, masks.safetensors and importance.png,
            the last only where matplotlib is installed.
        data: text, as for `calibration_text.calibration_tokens`. What it has too little of is used more than once.
        steps: of the optimiser, at least 2, each a gradient to score; the first one's is zero, as LoRA's B is.
        batch_size: sequences a step, over all processes and accumulated gradients.
        learning_rate: of AdamW.
        rank, alpha: of LoRA; B A is scaled by alpha / rank.
        length: of a sequence, in tokens; at most as many as the model has positions.
        seed: of LoRA's first weights and of the order of the sequences.
        top_percent: share of every matrix's entries that its mask marks, those of the largest F.
        masks: whether to make the masks, which `prune_layers` merges by; a bit for every weight on the disk.
        training: more fields of transformers' TrainingArguments, none of those that are arguments here; no clipping.
        device: "cpu", "cuda", …; None for a GPU if there is one.
        revision: branch, tag or commit on the Hub.
        progress: shows a bar over the steps.

    Raises:
        ValueError: for settings that cannot be, a model that is not LLaMA-shaped, too little text, and losses or
            gradients that are not finite.
        CheckpointError: if the model cannot be read.
        FileNotFoundError: if the text is not there.
        OutputError: if the output folder is not free.
        ModuleNotFoundError: if peft or accelerate is not installed.
    """
    require_training()
    check_whole(2, steps=steps)  # at the first one LoRA's B is zero, and so is the gradient of A
    check_whole(1, batch_size=batch_size, rank=rank, alpha=alpha)
    check_whole(2, length=length)
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
    with training_arguments(device, batch_size, defaults, training, _RESERVED) as arguments:
        is_first = arguments.process_index == 0
        if is_first:
            check_output(output_dir)
        checkpoint, shape = open_llama(os.fspath(model), revision)
        tokens = training_tokens(data, checkpoint, shape, samples=steps * batch_size, length=length, seed=seed)
        with new_folder(output_dir) if is_first else contextlib.nullcontext() as folder:
            on_cuda = arguments.device.type == "cuda"
            lora = add_lora(load_model(checkpoint, torch.bfloat16 if on_cuda else torch.float32), rank, alpha, seed)
            gradients = _Gradients(lora, shape, keep=masks and is_first)
            losses = train(lora, tokens, arguments, gradients, title="Importance", progress=Progress(progress))
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
                    logger.warning("no importance.png: charts need matplotlib, pip install 'impart-hf[plot]'")
        arguments.distributed_state.wait_for_everyone()
    return Importance.load(output_dir)


class _Gradients(TrainerCallback):
    """Adds up the gradients of a model's LoRA weights before every step of the optimiser."""

    def __init__(self, model: Any, shape: LlamaShape, keep: bool):
        """Find LoRA's modules.

        Args:
            model: PEFT's.
            shape: of the model.
            keep: whether there will be masks.
        """
        self._shape = shape
        self._sums = {}
        modules = dict(model.get_base_model().named_modules())
        for layer, width in enumerate(shape.layers):
            blocks = (width.num_attention_heads, *[width.num_key_value_heads] * 2, width.num_attention_heads)
            for name, units in zip(LINEAR, blocks + (width.intermediate_size,) * 3, strict=True):
                module = modules[layer_prefix(layer) + name]
                by_rows = name not in ("self_attn.o_proj", "mlp.down_proj")
                self._sums[layer, name] = module, MatrixSums(units, by_rows, keep)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for (layer, name), (module, sums) in self._sums.items():
            a, b = (weights["default"].weight.grad for weights in (module.lora_A, module.lora_B))
            a, b = a.detach().float().cpu(), b.detach().float().cpu()
            if not sums.add(a, b):
                raise ValueError(
                    f"step {state.global_step + 1}: the gradient of {layer_prefix(layer)}{name} is not finite; "
                    "see that the model's weights are sound, or lower the learning rate"
                )

    def scores(self, top_percent: float) -> dict[str, Any]:
        """What `Importance` is made of; what the masks were made of is given up."""
        layers: dict[str, list[float]] = {score: [] for score in SCORES}
        units: dict[str, dict[str, list[torch.Tensor]]] = {
            name: {score: [] for score in SCORES} for name in ("heads", "groups", "channels")
        }
        for layer, width in enumerate(self._shape.layers):
            sums = [self._sums[layer, name][1] for name in LINEAR]
            for score in SCORES:
                layers[score].append(sum(matrix.total(score) for matrix in sums))
                query, key, value, output, gate, up, down = (matrix.units(score) for matrix in sums)
                heads = query + output
                group = key + value + heads.view(width.num_key_value_heads, -1).sum(1)
                for name, values in (("heads", heads), ("groups", group), ("channels", gate + up + down)):
                    units[name][score].append(values.float())
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
