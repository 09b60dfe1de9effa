"""Records of tiny models, their distillation, and how far what they stand for is from the fine-tune."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from impart_hf.distillation import DistillReport, DistillSettings
from impart_hf.distillation.distillation import distill as distill_records
from impart_hf.methods import MethodConfig
from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.modeling.delta_decode import decode_record
from impart_hf.modeling.delta_record import pack_record, parse_stack
from impart_hf.modeling.model_files import HubOptions
from support.tiny_models import Pair, edit_tensors, load_tensors

TOKENS = torch.randint(4, 320, (16, 24), generator=torch.Generator().manual_seed(0))
HELD_OUT = TOKENS[-2:]
SETTINGS = DistillSettings(steps=16, trains="scales", batch_size=4)


def encode(pair: Pair, method: MethodConfig, ratio: float) -> dict[str, bytes]:
    """Records of all matrices and stacks that are not too small for it, each of 16-bit size over `ratio`."""
    before, after = load_tensors(pair.base), load_tensors(pair.finetuned)
    records = {}
    for name, old in before.items():
        budget = int(np.prod(old.shape[-2:]) * 2 / ratio)
        if old.dim() >= 2 and budget >= method.least_bytes(*old.shape[-2:]):
            delta = (after[name][: len(old)].float() - old.float()).view(-1, *old.shape[-2:])
            records[name] = b"".join(method.encode(matrix, budget, 7).data for matrix in delta)
    return records


def parsed(records: dict[str, bytes]) -> dict[str, list[Any]]:
    return {name: parse_stack(np.frombuffer(data, np.uint8), name) for name, data in records.items()}


def spoiled(records: dict[str, bytes]) -> dict[str, bytes]:
    """The records with a scale that is half again too large, so that there is something to learn."""
    return {
        name: b"".join(pack_record(dataclasses.replace(record, scale=1.5 * record.scale)) for record in stack)
        for name, stack in parsed(records).items()
    }


def checkpoints(pair: Pair) -> tuple[Checkpoint, Checkpoint]:
    return Checkpoint(str(pair.base), HubOptions()), Checkpoint(str(pair.finetuned), HubOptions())


def distill(
    pair: Pair, records: dict[str, bytes], settings: DistillSettings = SETTINGS, tokens: torch.Tensor = TOKENS
) -> tuple[dict[str, bytes], DistillReport]:
    return distill_records(*checkpoints(pair), records, tokens, settings)


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of logits, in nats a token."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@torch.no_grad()
def held_out_divergence(pair: Pair, records: dict[str, bytes], folder: Path) -> float:
    """The same of the dense checkpoint that the records stand for, on the sequences that are held out."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pair.finetuned, folder)

    def put_records(tensors: dict[str, torch.Tensor]) -> None:
        before = load_tensors(pair.base)
        for name, stack in parsed(records).items():
            delta = torch.stack([decode_record(record, name) for record in stack])
            rows = len(before[name])
            tensors[name] = tensors[name].float()
            tensors[name][:rows] = before[name].float() + delta.view(before[name].shape)

    edit_tensors(folder, put_records)
    return divergence(load(pair.finetuned)(HELD_OUT).logits, load(folder)(HELD_OUT).logits).item()
