"""Deltas as fine-tunes make them, and second moments of inputs."""

from __future__ import annotations

import torch


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


def make_hessian(size: int, seed: int = 0) -> torch.Tensor:
    """Second moments of inputs of which few directions carry most of the power, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) * torch.arange(1, size + 1).float() ** -0.7
    inputs = torch.randn(4 * size, size, generator=generator) @ mixing.T
    return inputs.T @ inputs / len(inputs)
