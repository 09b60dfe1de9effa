"""Deltas as fine-tunes make them, and second moments of inputs."""

from __future__ import annotations

import torch

from impart_hf.coding.spectrum import decomposed
from impart_hf.methods import EncodingTask


def make_delta(rows: int, columns: int, seed: int = 0, decay: float = 0.5) -> torch.Tensor:
    """Singular values that fall as a power of their index, random singular vectors."""
    return delta_and_vectors(rows, columns, seed, decay)[0]


def delta_and_vectors(
    rows: int, columns: int, seed: int = 0, decay: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Such a delta and its singular vectors, U (m, r) and V (n, r)."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, rank, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(columns, rank, generator=generator))[0]
    return 0.01 * (u * torch.arange(1, rank + 1).float() ** -decay) @ v.T, u, v


def make_deltas(rows: int, columns: int, count: int) -> list[torch.Tensor]:
    """Deltas with different spectra, of which matrices of one budget store different numbers of components."""
    return [make_delta(rows, columns, seed, 0.3 + 0.6 * seed / count) for seed in range(count)]


def make_tasks(
    deltas: list[torch.Tensor], ratio: float, hessians: list[torch.Tensor] | None = None, transposed: bool = False
) -> list[EncodingTask]:
    """What encodes deltas into a share of their bytes in bfloat16."""
    known = hessians or [None] * len(deltas)
    return [
        EncodingTask(delta, int(2 * delta.numel() / ratio), seed, hessian, decomposed, None, None, False, transposed)
        for seed, (delta, hessian) in enumerate(zip(deltas, known, strict=True))
    ]


def make_hessian(size: int, seed: int = 0) -> torch.Tensor:
    """Second moments of inputs of which few directions carry most of the power, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) * torch.arange(1, size + 1).float() ** -0.7
    inputs = torch.randn(4 * size, size, generator=generator) @ mixing.T
    return inputs.T @ inputs / len(inputs)
