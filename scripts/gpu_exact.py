"""What gpu_check.py checks and measures of exact records."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from gpu_material import Notes, expect

from impart_hf.coding.exact_encoder import encode_exact
from impart_hf.modeling.exact_record import DENSE, SPARSE, restore


def _pair(rows: int, columns: int, step: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A base and its fine-tune, bfloat16, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(rows, columns, generator=generator)
    return base.bfloat16(), (
        base.bfloat16().float() + step * torch.randn(rows, columns, generator=generator)
    ).bfloat16()


def check_exact(notes: Notes) -> None:
    """Dense and sparse records give the fine-tune's bits on the device."""
    base, finetuned = _pair(96, 80, 1e-4) if notes.small else _pair(700, 530, 1e-4)
    for coding in (DENSE, SPARSE):
        data = np.frombuffer(encode_exact(base, finetuned, coding), np.uint8)
        restored = restore(base.to(notes.device), data, "the tensor", base.dtype)
        expect(torch.equal(restored.cpu(), finetuned), f"an exact record, coding {coding}, gives other bits")


def time_exact(notes: Notes) -> None:
    """How fast matrices of LLaMA-7B's shapes are decoded."""
    for name, step in (("all changed", 1e-4), ("few changed", 1e-6)):
        m, n = (192, 128) if notes.small else (11008, 4096)
        base, finetuned = _pair(m, n, step)
        data = np.frombuffer(encode_exact(base, finetuned), np.uint8)
        took = notes.milliseconds(partial(restore, base.to(notes.device), data, "the tensor", base.dtype), 3)
        rate = None if took is None else base.nbytes / 1e6 / took
        notes.row("exact", rows=m, columns=n, changes=name, bits=8 * len(data) / base.numel(), GB_per_second=rate)
        notes.goal(f"exact decode of {m}x{n}, {name}, GB/s", rate, least=10)
