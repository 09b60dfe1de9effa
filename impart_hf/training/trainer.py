"""Training with transformers' Trainer, in one process or several: its settings, checks and progress bar."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

import torch
from huggingface_hub.dataclasses import type_validator
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..common.devices import usable_device
from ..common.progress import Progress
from ..common.validation import check_whole_number

# Fields of TrainingArguments that are arguments of these functions, or would interfere with what they do.
_RESERVED = {
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "seed",
    "output_dir",
    "do_train",
    "save_strategy",
    "eval_strategy",
    "logging_strategy",
    "logging_steps",
    "logging_nan_inf_filter",
    "load_best_model_at_end",
    "push_to_hub",
    "resume_from_checkpoint",
    "auto_find_batch_size",
    "disable_tqdm",
    "use_cpu",
    "deepspeed",
    "fsdp",
    "remove_unused_columns",
    "label_names",
}
# Modes that shard parameters or gradients over processes, so that no process has them whole.
_SHARDED = {"FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"}


@contextmanager
def training_arguments(
    device: str | torch.device | None,
    batch_size: int,
    defaults: Mapping[str, Any],
    training: Mapping[str, Any] | None,
    reserved: frozenset[str] = frozenset(),
    own: Mapping[str, Any] | None = None,
) -> Iterator[TrainingArguments]:
    """Within this context, give the Trainer's settings and a temporary output folder; connects the processes.

    Args:
        device: "cpu", "cuda", …; None for the Trainer's choice.
        batch_size: sequences per step, over all processes and accumulated gradients.
        defaults: fields of TrainingArguments.
        training: more fields, which override the defaults.
        reserved: fields that `training` may not contain, in addition to those that are always reserved.
        own: fields that override all others, and that `training` may not contain.

    Raises:
        ValueError: if there is no such device or field, or a field's value is invalid.
    """
    fields = _checked_fields(training, reserved | _RESERVED | (own or {}).keys())
    use_cpu = False
    if device is not None:
        usable = usable_device(device)
        use_cpu = usable.type == "cpu"
        if usable.index:
            raise ValueError(f"device '{usable}': the Trainer uses the first one; choose with CUDA_VISIBLE_DEVICES")
    elif not torch.cuda.is_available():
        use_cpu = not torch.backends.mps.is_available()
    on_cuda = not use_cpu and torch.cuda.is_available()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        settings = {
            "dataloader_pin_memory": on_cuda,
            "bf16": on_cuda and torch.cuda.is_bf16_supported(),
            "report_to": "none",
            "ddp_find_unused_parameters": False,
            **defaults,
            **fields,
            "output_dir": folder,
            "save_strategy": "no",
            "logging_strategy": "steps",
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "disable_tqdm": True,
            "use_cpu": use_cpu,
            **(own or {}),
        }
        try:
            arguments = TrainingArguments(**settings)
        except (TypeError, ValueError, ImportError, RuntimeError, AttributeError) as error:
            raise ValueError(f"training: {' '.join(str(error).split())}") from error
        # With several devices in one process the Trainer would use DataParallel, which multiplies the batch size.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        if arguments.distributed_state.distributed_type.name in _SHARDED:
            raise ValueError(
                f"training cannot use {arguments.distributed_state.distributed_type.name}, which shards weights over "
                "processes (as FSDP and DeepSpeed do): use DDP or one process"
            )
        check_whole_number(1, gradient_accumulation_steps=arguments.gradient_accumulation_steps)
        parts = arguments.world_size * arguments.gradient_accumulation_steps
        if batch_size % parts:
            raise ValueError(
                f"batch_size {batch_size} cannot be divided evenly among {arguments.world_size} processes with "
                f"gradient_accumulation_steps {arguments.gradient_accumulation_steps}: give a multiple of {parts}"
            )
        arguments.per_device_train_batch_size = batch_size // parts
        if arguments.data_seed is None:
            arguments.data_seed = arguments.seed
        yield arguments


def _checked_fields(training: Mapping[str, Any] | None, reserved: frozenset[str]) -> dict[str, Any]:
    if training is None:
        return {}
    if not isinstance(training, Mapping):
        raise ValueError(f"training must be a mapping of TrainingArguments' fields, got {training!r:.80}")
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    types = get_type_hints(TrainingArguments)
    for name, value in training.items():
        if name not in known:
            raise ValueError(f"training: TrainingArguments has no field '{name}': check its spelling")
        if name in reserved:
            raise ValueError(
                f"training: '{name}' cannot be set here, leave it out: steps, batch size, learning rates, seed and "
                "checkpoints have their own settings, and other fields are refused because they would interfere"
            )
        takes_float = float in (types[name], *get_args(types[name]))
        try:
            type_validator(name, value, types[name] | int if takes_float else types[name])
        except TypeError as error:
            raise ValueError(f"training: {error}") from error
    return dict(training)


def train(
    model: Any,
    tokens: torch.Tensor,
    arguments: TrainingArguments,
    callback: TrainerCallback | None = None,
    *,
    title: str,
    progress: Progress,
) -> list[float]:
    """Train a model in place.

    Args:
        model: a transformers or PEFT model; its parameters that require a gradient are trained.
        tokens: int64, (sequences, length), drawn in random order, each once per epoch.
        arguments: from `training_arguments`.
        callback: an additional callback.
        title: title of the bar.
        progress: shows a bar over the steps.

    Returns:
        The loss of every step, in nats per token, the mean over all processes.

    Raises:
        ValueError: if a loss is not finite, or the Trainer cannot work with its settings.
    """
    use_cache, callbacks = model.config.use_cache, [] if callback is None else [callback]
    try:
        _, losses = run_trainer(Trainer, model, _Sequences(tokens), arguments, callbacks, title, progress)
    finally:
        model.config.use_cache = use_cache  # the Trainer switches it off, which would be saved with the model
    model.eval()
    return losses


def run_trainer(
    kind: type[Trainer],
    model: Any,
    examples: Any,
    arguments: TrainingArguments,
    callbacks: Sequence[TrainerCallback],
    title: str,
    progress: Progress,
    checkpoint: str | None = None,
    **more: Any,
) -> tuple[Trainer, list[float]]:
    """Train with a progress bar, and return the Trainer and the loss of every step.

    Args:
        kind: class of the Trainer.
        model: the module whose parameters that require a gradient are trained.
        examples: the data set.
        arguments: from `training_arguments`.
        callbacks: called before the bar moves.
        title: title of the bar.
        progress: shows the bar.
        checkpoint: folder of the checkpoint to resume from.
        more: additional arguments of the Trainer.

    Raises:
        ValueError: if a loss is not finite, or the Trainer cannot work with a setting.
    """
    # An epoch's last batch is dropped if it is smaller, because its gradient is noisier; a text that does not fill one
    # batch is used as a small batch.
    arguments.dataloader_drop_last = len(examples) >= arguments.per_device_train_batch_size * arguments.world_size
    watch = StepWatch(title, progress)
    try:
        trainer = kind(model=model, args=arguments, train_dataset=examples, callbacks=[*callbacks, watch], **more)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=checkpoint)
    except (ImportError, TypeError, AttributeError, KeyError) as error:  # a setting that only fails in use
        raise ValueError(f"training: {' '.join(str(error).split())}") from error
    finally:
        watch.close()
    return trainer, watch.losses


class _Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Data set of token sequences, int64 (sequences, length), as inputs and labels; the model shifts the labels."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class StepWatch(TrainerCallback):
    """Callback that records the losses, ends a run whose loss is not finite, and moves a progress bar.

    Attributes:
        losses: the losses of the steps so far.
    """

    def __init__(self, title: str, progress: Progress):
        self.losses: list[float] = []
        self._title, self._progress = title, progress
        self._bar: Any = None
        self._held_out = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Steps were taken before if the run is resumed.
        self._bar = self._progress.bar(state.max_steps, self._title, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.finish()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:  # the summary at the end of training has none
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss of step {state.global_step} is {loss}: check the model's weights, or lower the learning rate"
            )
        self.losses.append(loss)
        self._bar.show(f"loss {loss:.4f}{self._held_out}")
        self._bar.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self._held_out = f", held out {metrics['eval_loss']:.4f}"
        self._bar.show(f"loss {self.losses[-1]:.4f}{self._held_out}")

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
