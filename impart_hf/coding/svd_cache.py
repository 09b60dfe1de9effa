"""Singular components stored on disk, so that several compressions of one pair decompose each matrix once."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..common.files import atomic_write
from .spectrum import decomposed
from .svd import RankRule, Svd

SvdOf = Callable[[str, int], Svd]


def uncached_svd(name: str, number: int) -> Svd:
    """Return `decomposed`, for matrices that are decomposed once."""
    return decomposed


class SvdCache:
    """Computes singular components as `decomposed` does, and stores them.

    A matrix is decomposed again only if more components are needed than are stored.
    """

    def __init__(self, folder: Path):
        """Use a folder, made if missing, for the components: each takes 4 (m + n + 1) bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def of(self, name: str, number: int) -> Svd:
        """Return the function that decomposes one matrix.

        Args:
            name: the tensor's name.
            number: the matrix's number in its stack.
        """
        key = hashlib.sha256(f"{name}:{number}".encode()).hexdigest()[:32]
        path = self._folder / f"{key}.safetensors"

        def svd(
            matrix: torch.Tensor, rank: int | RankRule, known: np.ndarray | None = None, /
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            if path.exists():
                stored = {part: tensor.to(matrix.device) for part, tensor in load_file(path).items()}
                stored_rank = len(stored["sigma"])
                count = rank(stored["sigma"].double().cpu().numpy()) if callable(rank) else rank
                if count <= stored_rank or stored_rank == min(matrix.shape):
                    return stored["u"][:, :count], stored["sigma"][:count], stored["v"][:, :count]
            u, sigma, v = decomposed(matrix, rank, known)
            with atomic_write(path) as new:
                save_file({"u": u.contiguous(), "sigma": sigma.contiguous(), "v": v.contiguous()}, new)
            return u, sigma, v

        return svd
