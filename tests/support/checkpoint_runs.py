"""Trainings of tiny models with transformers' Trainer, of which every step is a function of seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.open import open_repository


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sixteen sequences of twelve tokens."""

    def __init__(self) -> None:
        self.tokens = torch.randint(4, 300, (16, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def load_start(base: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model that a training starts from."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def make_trainer(
    model: PreTrainedModel, output: Path, callbacks: list[TrainerCallback], kind: Any = Trainer, **settings: Any
) -> Trainer:
    """A Trainer of six steps that saves after every second one."""
    defaults: dict[str, Any] = {
        "max_steps": 6,
        "save_steps": 2,
        "save_strategy": "steps",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(output_dir=str(output), **{**defaults, **settings})
    return kind(model=model, args=args, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=callbacks)


def decoded(checkpoint: Path, base: str | None = None) -> dict[str, torch.Tensor]:
    """What a delta checkpoint stands for."""
    return dict(open_repository(str(checkpoint), HubOptions(), base).tensors())


def dense(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The dense weights of a checkpoint."""
    return load_file(checkpoint / "model.safetensors")


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype
        and one[n].shape == other[n].shape
        and torch.equal(one[n].view(torch.uint8), other[n].view(torch.uint8))
        for n in one
    )
