"""Training and measuring the models of `train_pair`, on the CPU and in float32, with one line of output per stage."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_WARM_UP = 0.05  # share of the run
_FLOOR = 0.05  # share of the peak learning rate, at the start and at the end


def train(
    model: LlamaForCausalLM,
    blocks: torch.Tensor,
    name: str,
    *,
    labels: torch.Tensor | None = None,
    steps: int | None,
    minutes: float | None,
    lr: float,
    batch_size: int,
    seed: int,
) -> None:
    """Train every weight of `model` (float32) in place on `blocks`, int32 [blocks, tokens].

    Training lasts `steps` steps or `minutes` minutes of wall-clock time. `labels`, of the same shape, are the tokens to
    predict, with -100 for those that are only read; None for all tokens.
    """
    budget = _Budget(name, steps, minutes)
    # Only matrices have weight decay; norms are vectors.
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    with tempfile.TemporaryDirectory() as unused, _fast_products():
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=unused,  # a required argument; nothing is written there
                max_steps=steps or 10**9,
                per_device_train_batch_size=batch_size,
                dataloader_drop_last=True,
                dataloader_pin_memory=False,
                max_grad_norm=1.0,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,  # `_Budget` has its own bar, which also measures minutes
                use_cache=True,  # otherwise the saved configuration would turn the cache off for generation
                use_cpu=True,  # gives the same numbers with and without a GPU
                seed=seed,
                data_seed=seed,
            ),
            train_dataset=_Blocks(blocks, blocks if labels is None else labels),
            callbacks=[budget],
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, budget.rate)),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, blocks: torch.Tensor) -> float:
    """Return exp of the mean cross-entropy of all tokens but the first of `blocks`, int32 [blocks, tokens]."""
    model.eval()
    total = 0.0
    for rows in blocks.long().split(16):
        total += len(rows) * model(input_ids=rows, labels=rows).loss.item()
    return math.exp(total / len(blocks))


def delta_size(base: Mapping[str, torch.Tensor], finetuned: Mapping[str, torch.Tensor]) -> float:
    """Return the mean over the layers' matrices of ‖W_finetuned − W_base‖ / ‖W_base‖ (Frobenius)."""
    names = [key for key, weight in base.items() if ".layers." in key and weight.ndim == 2]
    return sum(((finetuned[key] - base[key]).norm() / base[key].norm()).item() for key in names) / len(names)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide messages, except errors, and progress bars of transformers."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


@contextmanager
def _fast_products() -> Iterator[None]:
    """Let PyTorch multiply float32 matrices in bfloat16, with float32 sums, if the processor has instructions for it.

    This takes 0.6 of the time with AMX and makes no difference without. Autocast would be slower without.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


class _Blocks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of int32 [blocks, tokens] as the model's `input_ids` and `labels` (the model shifts the labels itself)."""

    def __init__(self, blocks: torch.Tensor, labels: torch.Tensor) -> None:
        self.blocks, self.labels = blocks, labels

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index].long(), "labels": self.labels[index].long()}


class _Budget(TrainerCallback):
    """Ends a run after its steps or minutes, shows its progress, and computes the learning rate."""

    def __init__(self, name: str, steps: int | None, minutes: float | None) -> None:
        self.name, self.steps, self.seconds = name, steps, 60 * (minutes or 0)
        self.started = time.perf_counter()
        self.loss = math.nan  # nats per token, mean of ten steps
        # Without a terminal every redrawing of the bar is a new line, so it is drawn about once a minute.
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=100,
            desc=name,
            leave=False,
            mininterval=0.2 if terminal else 60,
            bar_format="{desc}: {percentage:3.0f} % |{bar:30}| {elapsed}<{remaining}{postfix}",
        )

    def fraction(self, step: int) -> float:
        """Return the share of the run that is done, 0 to 1."""
        return min(1.0, step / self.steps if self.steps else (time.perf_counter() - self.started) / self.seconds)

    def rate(self, step: int) -> float:
        """Return the factor of the learning rate: a linear rise to 1, then a cosine."""
        done = self.fraction(step)
        if done < _WARM_UP:
            return _FLOOR + (1 - _FLOOR) * done / _WARM_UP
        return _FLOOR + (1 - _FLOOR) * (0.5 + 0.5 * math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.perf_counter()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self.loss = float(logs["loss"])
            self.bar.set_postfix_str(f"loss {self.loss:.3f}", refresh=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        done = self.fraction(state.global_step)
        self.bar.update(100 * done - self.bar.n)
        if done >= 1.0:
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.close()
        seconds = time.perf_counter() - self.started
        # There is no loss before the tenth step.
        loss = "" if math.isnan(self.loss) else f", training loss {self.loss:.3f}"
        print(f"{self.name}: {state.global_step} steps in {seconds:.0f} s{loss}", flush=True)
