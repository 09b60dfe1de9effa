"""Singular components on disk, so that several compressions of one pair decompose each matrix once."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..common.files import written_whole
from .svd import RankRule, Svd, leading_svd

SvdOf = Callable[[str, int], Svd]


def leading_svd_of(name: str, number: int) -> Svd:
    """What decomposes a matrix that is decomposed once."""
    return leading_svd


class SvdCache:
    """Gives singular components as `leading_svd` does, and remembers them.

    A matrix is decomposed again only if more of its components are wanted than ever before.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        """Keep the components in a folder that is made if need be: about (m + n) numbers of `dtype` for each."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._dtype = folder, dtype

    def of(self, name: str, number: int) -> Svd:
        """What decomposes one matrix.

        Args:
            name: the tensor's.
            number: of the matrix in its stack.
        """
        key = hashlib.sha256(f"{name}:{number}".encode()).hexdigest()[:32]
        path = self._folder / f"{key}.safetensors"

        def svd(matrix: torch.Tensor, wanted: RankRule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            if path.exists():
                stored = load_file(path, device=str(matrix.device))
                count, have = wanted(stored["sigma"].double().cpu().numpy()), len(stored["sigma"])
                if count <= have or have == min(matrix.shape):
                    return stored["u"][:, :count].float(), stored["sigma"][:count], stored["v"][:, :count].float()
            u, sigma, v = leading_svd(matrix, wanted)
            u, v = u.contiguous().to(self._dtype), v.contiguous().to(self._dtype)
            with written_whole(path) as new:
                save_file({"u": u, "sigma": sigma.contiguous(), "v": v}, new)
            return u.float(), sigma, v.float()

        return svd
