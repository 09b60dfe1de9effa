"""Recovery: training a pruned model, with LoRA or in full, to regain the quality that pruning lost."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..calibration.text import CalibrationSource, text_name
from ..common.files import write_json
from ..common.progress import Progress
from ..common.validation import check_positive, check_seed, check_whole_number
from ..common.weight_bytes import weight_bytes
from ..evaluation.metrics import perplexity
from ..modeling.checkpoints import Checkpoint, all_finite
from ..modeling.model_files import fetch_file
from ..modeling.pruned_card import pruned_model_card
from ..modeling.repository_kind import RepositoryKind, kind_of
from ..repository.cards import inherited_card_data
from ..repository.reader_files import with_pruned_reader
from ..repository.sidecar_files import copy_sidecar_files
from ..repository.tokenizer_class import keep_tokenizer_class
from ..storage.checkpoint_writer import DenseTensor, check_room, new_folder, write_weights
from ..storage.output import check_output
from ..training.trainer import train, training_arguments
from .checks import open_decoder
from .decoder_shape import DecoderShape
from .history import with_step
from .lora import add_lora, load_model, require_training, training_tokens

_LEARNING_RATES = {"lora": 1e-4, "full": 2e-5}
_WARM_UP = 0.03  # share of the steps
_ALL = 1 << 40  # more sequences than any text has
_EVALUATION_SEQUENCES = 64
_LOSSES = 10  # steps that the report's first and last loss are averaged over


@dataclass
class RecoveryReport:
    """The result of a recovery.

    Attributes:
        method: "lora" or "full".
        steps: optimiser steps.
        learning_rate: its highest value.
        first_loss, last_loss: mean of the first and of the last ten steps (or all, if fewer), in nats per token.
        perplexity_before, perplexity_after: perplexity on the held-out text, of the model before training and as it
            was stored; None without such a text.
        seconds: time taken.
    """

    method: str
    steps: int
    learning_rate: float
    first_loss: float
    last_loss: float
    perplexity_before: float | None
    perplexity_after: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return dataclasses.asdict(self)


def recover(
    model: str | os.PathLike,
    output_dir: str | Path,
    data: CalibrationSource,
    *,
    lora: bool = True,
    steps: int | None = None,
    epochs: float = 1.0,
    learning_rate: float | None = None,
    batch_size: int = 4,
    length: int = 512,
    rank: int = 8,
    alpha: int = 32,
    seed: int = 0,
    training: Mapping[str, Any] | None = None,
    eval_data: CalibrationSource | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> RecoveryReport:
    """Train a model, pruned or not, and write it as a checkpoint of the same kind and dtypes.

    The learning rate rises over 3 % of the steps and then follows a cosine to zero. LoRA's weights are trained in
    float32 and merged; full training takes 16 bytes per parameter. On a GPU both compute in bfloat16. Under
    `accelerate launch` every process takes its share of a batch, and the first one writes.

    Args:
        model: local folder or Hub id.
        output_dir: folder to make.
        data: text, as for `calibration.text.calibration_tokens`.
        lora: train LoRA on all linear layers of every decoder layer; otherwise train all weights.
        steps: optimiser steps; text that is too short is repeated. None to train for `epochs`.
        epochs: how often all of the text is used, if `steps` is None.
        learning_rate: of AdamW, its highest value; None for 1e-4 with LoRA and 2e-5 without.
        batch_size: sequences per step, over all processes and accumulated gradients.
        length: tokens per sequence, at most the model's number of positions.
        rank, alpha: of LoRA; B A is scaled by alpha / rank.
        seed: for LoRA's first weights and the order of the sequences.
        training: more fields of transformers' TrainingArguments, except those that are arguments here.
        eval_data: held-out text; perplexity is measured before and after on at most 64 sequences of it.
        device: "cpu", "cuda", …; None for a GPU if there is one.
        revision: branch, tag or commit on the Hub.
        progress: show a bar over the steps.

    Raises:
        ValueError: for invalid settings, a model that cannot be pruned, too little text, and losses or weights that
            are not finite; nothing is written then.
        CheckpointError: if the model cannot be read.
        FileNotFoundError: if the text does not exist.
        OutputError: if the output folder is not free.
        ModuleNotFoundError: if peft is not installed.
    """
    started = time.perf_counter()
    require_training()
    method = "lora" if lora else "full"
    rate = _LEARNING_RATES[method] if learning_rate is None else learning_rate
    with recovery_arguments(
        steps=steps, epochs=epochs, learning_rate=rate, batch_size=batch_size, length=length, rank=rank, alpha=alpha,
        seed=seed, training=training, device=device,
    ) as arguments:  # fmt: skip
        is_first = arguments.process_index == 0
        if is_first:
            check_output(output_dir)
        checkpoint, shape = open_decoder(os.fspath(model), revision)
        sequences = _ALL if steps is None else steps * batch_size
        tokens = training_tokens(data, checkpoint, shape, samples=sequences, length=length, seed=seed)
        held_out = None
        if eval_data is not None:
            held_out = training_tokens(
                eval_data, checkpoint, shape, samples=_EVALUATION_SEQUENCES, length=length, seed=seed
            )
        with new_folder(output_dir) if is_first else contextlib.nullcontext() as folder:
            card_data: dict[str, Any] = {}
            if folder is not None:  # before training, which a file that cannot be read or a full disk must not cost
                check_room(folder, weight_bytes(checkpoint))
                copy_sidecar_files(checkpoint.source, checkpoint.options, folder)
                card_data = inherited_card_data(fetch_file(checkpoint.source, "README.md", checkpoint.options))
            trained = load_model(checkpoint, _training_dtype(checkpoint, lora, arguments.device))
            before = _perplexity(trained, held_out, arguments)
            bar = Progress(progress)
            bar.plan(["Training", "Writing"])
            if lora:
                adapted = add_lora(trained, shape, rank, alpha, seed)
                losses = train(adapted, tokens, arguments, title="Training", progress=bar)
                trained = adapted.merge_and_unload()
            else:
                losses = train(trained, tokens, arguments, title="Training", progress=bar)
            _round(trained, checkpoint)
            after = _perplexity(trained, held_out, arguments)
            if folder is not None:
                step = {
                    "kind": "recovery",
                    "method": method,
                    "steps": len(losses),
                    "learning_rate": rate,
                    "data": text_name(data),
                }
                _write_config(folder, Path(os.path.abspath(output_dir)).name, checkpoint, shape, step, card_data)
                keep_tokenizer_class(checkpoint.source, checkpoint.options, folder)
                write_weights(folder, _tensors(trained, checkpoint), "5GB", bar, "Writing")
        arguments.distributed_state.wait_for_everyone()
        return RecoveryReport(
            method=method,
            steps=len(losses),
            learning_rate=rate,
            first_loss=_mean(losses[:_LOSSES]),
            last_loss=_mean(losses[-_LOSSES:]),
            perplexity_before=before,
            perplexity_after=after,
            seconds=time.perf_counter() - started,
        )


def recovery_arguments(
    *,
    steps: int | None,
    epochs: float,
    learning_rate: float | None,
    batch_size: int,
    length: int,
    rank: int,
    alpha: int,
    seed: int,
    training: Mapping[str, Any] | None,
    device: str | torch.device | None,
) -> contextlib.AbstractContextManager[TrainingArguments]:
    """Check the settings of `recover`, and return the context of the Trainer's (`training_arguments`).

    Raises:
        ValueError: if a setting is invalid; for those that the Trainer has, when the context is entered.
    """
    check_whole_number(1, batch_size=batch_size, rank=rank, alpha=alpha, **({} if steps is None else {"steps": steps}))
    check_whole_number(2, length=length)
    check_positive(epochs=epochs, **({} if learning_rate is None else {"learning_rate": learning_rate}))
    check_seed(seed)
    defaults: dict[str, Any] = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": _WARM_UP,
        "seed": seed,
        **({} if learning_rate is None else {"learning_rate": learning_rate}),
        **({"num_train_epochs": epochs} if steps is None else {"max_steps": steps}),
    }
    return training_arguments(device, batch_size, defaults, training)


def _training_dtype(checkpoint: Checkpoint, lora: bool, device: torch.device) -> torch.dtype:
    # LoRA's product is merged into these weights, so they need the checkpoint's precision. Weights that are trained
    # need float32, because a step is smaller than bfloat16 can represent.
    is_bfloat16 = {checkpoint.dtype(name) for name in checkpoint.names()} == {torch.bfloat16}
    return torch.bfloat16 if lora and is_bfloat16 and device.type == "cuda" else torch.float32


def _perplexity(model: Any, blocks: torch.Tensor | None, arguments: Any) -> float | None:
    if blocks is None:
        return None
    model.to(arguments.device).eval()
    return perplexity(model, blocks, arguments.per_device_train_batch_size)


@torch.no_grad()
def _round(model: Any, checkpoint: Checkpoint) -> None:
    """Round the weights to values that the checkpoint's dtypes can represent, but keep their present dtype.

    Raises:
        ValueError: if a rounded weight is not finite.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(parameter.to(checkpoint.dtype(name)))
        if not all_finite(parameter):
            raise ValueError(f"the weights of {name} are not finite after training: lower the learning rate")


def _write_config(
    folder: Path,
    name: str,
    checkpoint: Checkpoint,
    shape: DecoderShape,
    step: Mapping[str, Any],
    card_data: Mapping[str, Any],
) -> None:
    """Write the source's config.json; that of a pruned model with one more step, and with reader and card.

    Not `save_pretrained`: it refuses configurations that can be loaded, and would lose the training.
    """
    config = dict(checkpoint.config)
    if kind_of(config) is RepositoryKind.PRUNED:
        config["pruning"] = with_step(checkpoint, shape, step)
        config = with_pruned_reader(config, folder)
        card = pruned_model_card(config, name, shape.parameters, card_data)
        (folder / "README.md").write_text(card, "utf-8")
    write_json(folder / "config.json", config)


def _tensors(model: Any, checkpoint: Checkpoint) -> list[DenseTensor]:
    """Return the model's tensors in the checkpoint's dtypes."""

    def stored(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return parameter.detach().to("cpu", dtype)

    return [
        DenseTensor(name, tuple(parameter.shape), dtype, partial(stored, parameter, dtype))
        for name, parameter in model.named_parameters()
        for dtype in [checkpoint.dtype(name)]
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
