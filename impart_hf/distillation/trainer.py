"""Training of deltas with transformers' Trainer, with checkpoints and evaluation on held-out sequences."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from ..common.progress import Progress
from ..training.trainer import run_trainer, training_arguments
from .settings import DistillSettings
from .trained_delta import TrainedDelta

# Fields that users cannot set: this module sets the optimizer, its rates and the batch size of evaluation.
_OF_OPTIMIZERS = frozenset(
    field.name
    for field in dataclasses.fields(TrainingArguments)
    if field.name.startswith(("adafactor", "adam_", "lr_", "optim", "warmup_"))
) | {"weight_decay", "per_device_eval_batch_size"}


class TrainableDeltas(nn.Module):
    """The module that the Trainer trains and saves: its only parameters are those of deltas.

    Attributes:
        deltas: the deltas to train.
        micro_batch_size: sequences that are run at a time.
    """

    def __init__(self, deltas: Iterable[TrainedDelta], loss: Callable[[Tensor], Tensor], micro_batch_size: int):
        """Args:
        deltas: the deltas to train; parts of the models that the loss runs.
        loss: gives the mean loss of the sequences with these indices, int64 (batch,).
        micro_batch_size: sequences that are run at a time.
        """
        super().__init__()
        self.deltas: Any = nn.ModuleList(deltas)
        self.micro_batch_size = micro_batch_size
        self._loss = loss

    def forward(self, rows: Tensor, return_loss: bool = True) -> dict[str, Tensor]:
        parts = rows.split(self.micro_batch_size)
        losses = [self._loss(part) * (len(part) / len(rows)) for part in parts]
        return {"loss": torch.stack(losses).sum() if len(losses) > 1 else losses[0]}


def _examples(rows: range) -> Any:
    return [{"rows": row} for row in rows]


@contextmanager
def arguments_for(
    settings: DistillSettings, device: torch.device, checkpoints: Path | None
) -> Iterator[TrainingArguments]:
    """Within this context, give the Trainer's settings for a distillation; connects the processes.

    Args:
        checkpoints: folder for checkpoints; None for a temporary one.

    Raises:
        ValueError: if `settings.training` contains an invalid or reserved field, or the device cannot be used.
        ModuleNotFoundError: if the optimizer needs a package that is not installed.
    """
    optimizer_class(settings.optim)
    interval = max(1, settings.steps // settings.checks)
    own = {
        "max_steps": settings.steps,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": interval,
        "eval_steps": interval,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "save_only_model": False,
        "eval_on_start": False,
        # These apply to language models, and `TrainableDeltas` is not one; the student has a setting of ours.
        "gradient_checkpointing": False,
        "neftune_noise_alpha": None,
        "label_smoothing_factor": 0.0,
        "use_liger_kernel": False,
        "remove_unused_columns": False,
        "seed": settings.seed,
        # A batch may leave some of a layer's experts unused.
        "ddp_find_unused_parameters": True,
        **({} if checkpoints is None else {"output_dir": str(checkpoints)}),
    }
    defaults = {"max_grad_norm": 0.0}
    with training_arguments(
        str(device), settings.batch_size, defaults, settings.training, _OF_OPTIMIZERS, own
    ) as arguments:
        arguments.per_device_eval_batch_size = arguments.per_device_train_batch_size
        yield arguments


class _Stopping(TrainerCallback):
    """Callback that stops training after `patience` successive checks, each with a higher held-out loss than before.

    Only checks after the warm-up of all learning rates count. A loss above the initial one is no reason to stop,
    because values that are trained with high rates settle as the rates fall.
    """

    def __init__(self, settings: DistillSettings):
        self._patience = settings.patience
        self._warm = (settings.scale_share + settings.warm_up) * settings.steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate |= state.global_step == state.max_steps

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The log is part of a checkpoint, so that a resumed run counts earlier checks too.
        checks = [e["eval_loss"] for e in state.log_history if "eval_loss" in e and e["step"] >= self._warm]
        rises = [after > before for before, after in pairwise(checks)]
        if len(rises) >= self._patience and all(rises[-self._patience :]):
            control.should_training_stop = True
            control.should_save = False  # a run resumed from a checkpoint of this step would continue training


class _Trainer(Trainer):
    """Trainer that runs a few sequences of a batch at a time.

    Its own means, accumulated gradients, would end epochs at other steps. It drops an incomplete last batch in
    training, but not in evaluation.
    """

    _share = 1.0  # of a batch's sequences that are in the micro-batch

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        rows, losses = inputs["rows"], []
        parts = rows.split(self.model.micro_batch_size)  # type: ignore[union-attr]
        for number, part in enumerate(parts, 1):
            self._share = len(part) / len(rows)
            # Processes exchange gradients once, after the last part.
            with nullcontext() if number == len(parts) else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, {"rows": part}, num_items_in_batch))
        self._share = 1.0
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        loss: Any = super().compute_loss(*arguments, **named)
        return loss if self._share == 1 else loss * self._share

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last


@torch.enable_grad()
def train(
    trainable: TrainableDeltas,
    training: range,
    validation: range,
    settings: DistillSettings,
    arguments: TrainingArguments,
    progress: Progress,
) -> tuple[int, int]:
    """Train, restore the numbers of the best check, and return the number of steps and the best step.

    Resumes from a checkpoint if the arguments' folder has one.

    Args:
        training, validation: indices of the sequences.
        arguments: from `arguments_for`.
        progress: shows a bar over the steps.

    Raises:
        ValueError: if a loss is not finite.
    """
    folder = Path(str(arguments.output_dir))
    checkpoint = _last_checkpoint(folder)
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step >= settings.steps:  # killed after the last step; the Trainer would take one more step
            best = state.best_global_step or state.global_step
            load_model(trainable, folder / f"{PREFIX_CHECKPOINT_DIR}-{best}" / SAFE_WEIGHTS_NAME)
            return state.global_step, best
    latents = [values for delta in trainable.deltas for values in delta.latents()]
    factors = [factor for delta in trainable.deltas for factor in delta.log_factors]
    groups: list[dict[str, Any]] = [{"params": factors, "lr": settings.scale_rate}]
    rates: list[Callable[[int], float]] = [partial(_rate, settings, 0.0)]
    if latents:
        groups.append({"params": latents, "lr": settings.code_rate})
        rates.append(partial(_rate, settings, settings.scale_share))
    # On CUDA the other implementations make copies of a moment, which are as large as all trained numbers.
    fused = {"fused": True} if settings.optim == "adamw_torch" and arguments.device.type == "cuda" else {}
    optimizer = optimizer_class(settings.optim)(groups, **fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
    trainer, _ = run_trainer(
        _Trainer,
        trainable,
        _examples(training),
        arguments,
        [_Stopping(settings)],
        "Distilling",
        progress,
        None if checkpoint is None else str(checkpoint),
        eval_dataset=_examples(validation),
        optimizers=(optimizer, schedule),
    )
    return trainer.state.global_step, trainer.state.best_global_step or 0


def optimizer_class(name: str) -> Any:
    """Return the optimizer of a name in `settings.OPTIMIZERS`.

    Raises:
        ModuleNotFoundError: if it needs bitsandbytes, which is not installed.
    """
    if name == "adamw_torch":
        return torch.optim.Adam
    try:
        from bitsandbytes.optim import Adam8bit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"optim '{name}' needs bitsandbytes: pip install bitsandbytes") from error
    return Adam8bit


def _rate(settings: DistillSettings, start: float, step: int) -> float:
    """Return the factor on a learning rate at a step, for parameters trained from the share `start` of the steps on."""
    progress = (step + 0.5) / settings.steps  # the middle of the step, so that no step has rate 0
    # The rate rises slowly because Adam's first steps change all values by the full rate, whatever their gradients.
    return min(max(0.0, progress - start) / settings.warm_up, 1 - progress)


def _last_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint."""
    states = filter(_is_whole, folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}"))
    checkpoints = {int(path.parent.name.rpartition("-")[2]): path.parent for path in states}
    return checkpoints[max(checkpoints)] if checkpoints else None


def _is_whole(state: Path) -> bool:
    """Return whether this file, which the Trainer writes last in a checkpoint, is complete."""
    try:
        json.loads(state.read_text("utf-8"))
    except ValueError:
        return False
    return True


@torch.no_grad()
def mean_loss(trainable: TrainableDeltas, rows: range, arguments: TrainingArguments) -> float:
    """Return the mean loss of sequences, computed as in training."""
    size, total = arguments.per_device_eval_batch_size, 0.0
    with autocast(arguments):
        for part in torch.tensor(rows).split(size):
            total += trainable(part)["loss"].item() * len(part)
    return total / len(rows)


def autocast(arguments: TrainingArguments) -> torch.autocast:
    """Return the context in which the Trainer computes losses."""
    return torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16)
