"""Training of deltas by transformers' Trainer: in one process or many, with checkpoints, and looks at held-out text."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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

# The optimizer and its rates are this module's, and held-out text is looked at in batches like those of training
_OF_OPTIMIZERS = frozenset(
    field.name
    for field in dataclasses.fields(TrainingArguments)
    if field.name.startswith(("adafactor", "adam_", "lr_", "optim", "warmup_"))
) | {"weight_decay", "per_device_eval_batch_size"}


class TrainableDeltas(nn.Module):
    """Deltas in training, as the Trainer sees them: nothing else is a parameter of it, or saved.

    Attributes:
        deltas: to be trained.
    """

    def __init__(self, deltas: Iterable[TrainedDelta], loss: Callable[[Tensor], Tensor]):
        """Args:
        deltas: to be trained; parts of the models that the loss runs.
        loss: of the examples with these numbers, int64 (batch,): the mean over them.
        """
        super().__init__()
        self.deltas: Any = nn.ModuleList(deltas)
        self._loss = loss

    def forward(self, rows: Tensor, return_loss: bool = True) -> dict[str, Tensor]:
        return {"loss": self._loss(rows)}


def _examples(rows: range) -> Any:
    return [{"rows": row} for row in rows]


@contextmanager
def arguments_for(
    settings: DistillSettings, device: torch.device, checkpoints: Path | None
) -> Iterator[TrainingArguments]:
    """The Trainer's settings for a distillation. Connects the processes, if many.

    Args:
        checkpoints: folder for these; None for one that is removed.

    Raises:
        ValueError: if `settings.training` holds what it must not, or a device cannot be used.
    """
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
        # Of language models, which deltas are not
        "gradient_checkpointing": False,
        "neftune_noise_alpha": None,
        "label_smoothing_factor": 0.0,
        "use_liger_kernel": False,
        "remove_unused_columns": False,
        "seed": settings.seed,
        # A layer's experts need not all be reached by a batch
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
    """Ends training that does harm: once held-out text is matched worse at every check than at the one before, so many
    times in a row, after all rates have come up.

    That it is matched worse than at the start says nothing yet: values that are trained by high rates come to rest as
    these fall.
    """

    def __init__(self, settings: DistillSettings):
        self._patience = settings.patience
        self._warm = (settings.scale_share + settings.warm_up) * settings.steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate |= state.global_step == state.max_steps

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # From the log, which a checkpoint holds: a resumed run counts on
        checks = [e["eval_loss"] for e in state.log_history if "eval_loss" in e and e["step"] >= self._warm]
        rises = [after > before for before, after in pairwise(checks)]
        if len(rises) >= self._patience and all(rises[-self._patience :]):
            control.should_training_stop = True
            control.should_save = False  # from a checkpoint of the last step, a resumed run would go on


class _Trainer(Trainer):
    """Drops the rest of an epoch that fills no batch, but nothing that is held out."""

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
    title: str,
) -> tuple[int, int]:
    """Train, leave the numbers of the best check in place, and return the steps taken and the best one.

    Continues from a checkpoint if the arguments' folder holds one.

    Args:
        training, validation: the examples.
        arguments: from `arguments_for`.
        title: of the bar.

    Raises:
        ValueError: if a loss is not finite.
    """
    folder = Path(str(arguments.output_dir))
    checkpoint = _last_checkpoint(folder)
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step >= settings.steps:  # killed after the last step: the Trainer would take one more
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
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
    trainer, _ = run_trainer(
        _Trainer,
        trainable,
        _examples(training),
        arguments,
        [_Stopping(settings)],
        title,
        progress,
        None if checkpoint is None else str(checkpoint),
        eval_dataset=_examples(validation),
        optimizers=(optimizer, schedule),
    )
    return trainer.state.global_step, trainer.state.best_global_step or 0


def _rate(settings: DistillSettings, start: float, step: int) -> float:
    """Share of a learning rate that is in force at a step, for what is trained from a share of the steps on."""
    progress = (step + 0.5) / settings.steps  # in the middle of the step: none is without any effect
    # Adam's first steps move all values at once, by as much as their rate: a step into the blue
    return min(max(0.0, progress - start) / settings.warm_up, 1 - progress)


def _last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end."""
    states = filter(_is_whole, folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}"))
    found = {int(path.parent.name.rpartition("-")[2]): path.parent for path in states}
    return found[max(found)] if found else None


def _is_whole(state: Path) -> bool:
    """Whether this file, which the Trainer writes last, has been written to its end."""
    try:
        json.loads(state.read_text("utf-8"))
    except ValueError:
        return False
    return True


@torch.no_grad()
def mean_loss(trainable: TrainableDeltas, rows: range, arguments: TrainingArguments) -> float:
    """The loss of examples, the mean over all of them, computed as in training."""
    size, total = arguments.per_device_eval_batch_size, 0.0
    with torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
        for part in torch.tensor(rows).split(size):
            total += trainable(part)["loss"].item() * len(part)
    return total / len(rows)
