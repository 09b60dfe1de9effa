"""What everything shares that trains: settings and checks, and transformers' Trainer, in one process or in many."""

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
from ..common.validation import check_whole

# Fields of TrainingArguments that are arguments of these functions, or would take from them what they are there for.
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
# What spreads parameters, or gradients, over processes: there no process has them whole.
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
    """The Trainer's settings, with a folder to itself that nothing is left of. Connects the processes, if many.

    Args:
        device: "cpu", "cuda", …; None for what the Trainer finds.
        batch_size: sequences a step, over all processes and accumulated gradients.
        defaults: fields of TrainingArguments.
        training: more such fields, which go before the defaults.
        reserved: fields that `training` may not hold, beside those that it never may.
        own: fields that go before all others, and that `training` may not hold either.

    Raises:
        ValueError: if there is no such device or field, or a field's value is none it can have.
    """
    fields = _checked_fields(training, reserved | _RESERVED | (own or {}).keys())
    use_cpu = False
    if device is not None:
        wanted = usable_device(device)
        use_cpu = wanted.type == "cpu"
        if wanted.index:
            raise ValueError(f"device '{wanted}': the Trainer takes the first; choose with CUDA_VISIBLE_DEVICES")
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
        # Several devices in one process would be torch's DataParallel, which multiplies the batch by their number
        arguments._n_gpu = min(arguments.n_gpu, 1)
        if arguments.distributed_state.distributed_type.name in _SHARDED:
            raise ValueError(
                "training is spread over processes with DDP, or not at all; FSDP and DeepSpeed cut weights"
            )
        check_whole(1, gradient_accumulation_steps=arguments.gradient_accumulation_steps)
        parts = arguments.world_size * arguments.gradient_accumulation_steps
        if batch_size % parts:
            raise ValueError(
                f"batch_size {batch_size} cannot be shared evenly by {arguments.world_size} processes with "
                f"{arguments.gradient_accumulation_steps} gradients accumulated in each"
            )
        arguments.per_device_train_batch_size = batch_size // parts
        if arguments.data_seed is None:
            arguments.data_seed = arguments.seed
        yield arguments


def _checked_fields(training: Mapping[str, Any] | None, reserved: frozenset[str]) -> dict[str, Any]:
    if training is None:
        return {}
    if not isinstance(training, Mapping):
        raise ValueError(f"training must be a mapping of TrainingArguments' fields, not {training!r:.80}")
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    types = get_type_hints(TrainingArguments)
    for name, value in training.items():
        if name not in known:
            raise ValueError(f"training: TrainingArguments has no field '{name}'")
        if name in reserved:
            raise ValueError(
                f"training: '{name}' cannot be set here: steps, batch size, learning rates, seed and checkpoints are "
                "settings of their own, and what else is refused would be of no use"
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
        model: a transformers or PEFT model; what of it requires a gradient is trained.
        tokens: int64, (sequences, length), drawn in random order, each once an epoch.
        arguments: from `training_arguments`.
        callback: one more.
        title: of the bar.
        progress: shows a bar over the steps, in the first process.

    Returns:
        The loss of every step, in nats per token, the mean over all processes.

    Raises:
        ValueError: if a loss is not finite, or the Trainer cannot do with its settings.
    """
    use_cache, callbacks = model.config.use_cache, [] if callback is None else [callback]
    try:
        _, losses = run_trainer(Trainer, model, _Sequences(tokens), arguments, callbacks, title, progress)
    finally:
        model.config.use_cache = use_cache  # the Trainer switches it off, and it would be saved so
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
    """Train under a bar, and return the Trainer and the loss of every step.

    Args:
        kind: of Trainer.
        model: what of it requires a gradient is trained.
        examples: a data set.
        arguments: from `training_arguments`.
        callbacks: called before the bar moves.
        checkpoint: folder to go on from.
        more: further arguments of the Trainer.

    Raises:
        ValueError: if a loss is not finite, or the Trainer cannot do with a setting.
    """
    # An epoch's last batch would else be smaller, and its gradient noisier; too little text is one small batch
    arguments.dataloader_drop_last = len(examples) >= arguments.per_device_train_batch_size * arguments.world_size
    watch = StepWatch(title, Progress(progress.enabled and arguments.process_index == 0))
    try:
        trainer = kind(model=model, args=arguments, train_dataset=examples, callbacks=[*callbacks, watch], **more)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=checkpoint)
    except (ImportError, TypeError, AttributeError, KeyError) as error:  # a setting that does not work out
        raise ValueError(f"training: {' '.join(str(error).split())}") from error
    finally:
        watch.close()
    return trainer, watch.losses


class _Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of int64 (sequences, length) as the model's inputs and labels; the model shifts the labels itself."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class StepWatch(TrainerCallback):
    """Keeps the losses, ends a run whose loss is not finite, and moves a bar.

    Attributes:
        losses: of the steps so far.
    """

    def __init__(self, title: str, progress: Progress):
        self.losses: list[float] = []
        self._title, self._progress = title, progress
        self._bar: Any = None
        self._held_out = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar = self._progress.bar(state.max_steps, self._title)
        self._bar.update(state.global_step)  # not from the first step on, if it is resumed

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:  # the summary at the end
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss of step {state.global_step} is {loss}: see that the model's weights are sound, "
                "or lower the learning rate"
            )
        self.losses.append(loss)
        self._bar.set_postfix_str(f"loss {loss:.4f}{self._held_out}", refresh=False)
        self._bar.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self._held_out = f", held out {metrics['eval_loss']:.4f}"
        self._bar.set_postfix_str(f"loss {self.losses[-1]:.4f}{self._held_out}")

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
