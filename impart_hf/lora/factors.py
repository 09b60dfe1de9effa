"""The pairs of factors of an adapter, and how many components each matrix gets of a budget."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..coding.svd import leading_svd
from ..common.progress import Progress
from ..methods.base import Spectrum
from ..methods.impart_rd import ImPartRdConfig
from ..modeling.delta_repository import DeltaRepository
from .places import Place


class Factors(Protocol):
    """Gives the factors of matrices."""

    def of(self, place: Place, delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return A (matrices, rank, inputs) and B (matrices, outputs, rank), padded with zeros, of a place's delta."""

    def close(self) -> None:
        """Remove what is on disk."""


class Decomposed:
    """Factors that are computed when they are asked for: those of the records, if these have no more components."""

    def __init__(self, repository: DeltaRepository):
        self._repository = repository

    def of(self, place: Place, delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        stored = place.stored_factors(self._repository, delta.device, rank)
        return decomposed(place, delta, rank) if stored is None else stored

    def close(self) -> None:
        """There is nothing on disk."""


def decomposed(place: Place, delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of the leading singular components, with the roots of the singular values in both."""
    a = delta.new_zeros(place.matrices, rank, place.inputs)
    b = delta.new_zeros(place.matrices, place.outputs, rank)
    for number, matrix in enumerate(delta):
        if not matrix.any():
            continue
        u, sigma, v = leading_svd(matrix, min(rank, place.most_components))
        root = sigma.sqrt()
        a[number, : len(sigma)], b[number, :, : len(sigma)] = root[:, None] * v.t(), u * root
    return a, b


class SpooledFactors:
    """Factors of the largest rank, kept in a folder until it is known how many of their components fit a budget."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir()

    def ranks(
        self,
        repository: DeltaRepository,
        places: Sequence[Place],
        rank: int,
        max_bytes: int,
        device: torch.device,
        progress: Progress,
    ) -> list[int]:
        """Decompose all matrices, and return the rank of each, 0 for one that is left out.

        Args:
            rank: the most components of a matrix.
            max_bytes: the most bytes of all factors.

        Raises:
            ValueError: if not one component fits.
        """
        worth, sizes = [], []
        for place in progress.track(places, "Decomposing"):
            delta, dtype = place.delta(repository, device), place.dtype(repository)
            a, b = decomposed(place, delta, min(rank, place.most_components))
            save_file({"a": a.to(dtype).cpu(), "b": b.to(dtype).cpu()}, self._path(place))
            worth.append(_worth(place, a, delta))
            sizes.append(place.numbers_per_rank * dtype.itemsize)
        ranks = ranks_for(worth, sizes, max_bytes)
        if not any(part.any() for part in worth):
            raise ValueError(f"'{repository.source}' changes nothing in these parts: there is nothing to export")
        if not any(ranks):
            raise ValueError(f"max_bytes: {max_bytes} bytes hold no component of a matrix; the least is {min(sizes)}")
        return ranks

    def of(self, place: Place, delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        kept = load_file(self._path(place))
        return kept["a"][:, :rank].to(delta.device), kept["b"][..., :rank].to(delta.device)

    def close(self) -> None:
        shutil.rmtree(self._folder)

    def _path(self, place: Place) -> Path:
        return self._folder / f"{place.parameter}.safetensors"


def _worth(place: Place, a: Tensor, delta: Tensor) -> np.ndarray:
    """Return what dropping each component costs by the measure of `impart-rd`, summed over a place's matrices."""
    sigmas = a.double().square().sum(-1).cpu().numpy()  # A has their roots
    costs = np.zeros(sigmas.shape[1])
    for sigma, matrix in zip(sigmas, delta, strict=True):
        energy = float(matrix.square().sum())
        spectrum = Spectrum(sigma, place.outputs, place.inputs, energy, place.part == "embeddings")
        costs += sigma**2 * ImPartRdConfig().matrix(spectrum).error_weights.dropped
    return costs


def ranks_for(worth: Sequence[np.ndarray], bytes_per_rank: Sequence[int], max_bytes: int) -> list[int]:
    """Return the rank of every matrix, in total of at most `max_bytes`: 0 for one that is left out.

    A component is kept if it is worth the bytes of its vectors, at the lowest price at which all fit.

    Args:
        worth: for each matrix, float64: what its components are worth, falling.
        bytes_per_rank: the bytes of a component of each.
    """
    owner = np.repeat(np.arange(len(worth)), [len(part) for part in worth])
    sizes = np.asarray(bytes_per_rank)[owner]
    per_byte = np.concatenate([*worth, np.empty(0)]) / sizes
    order = np.argsort(-per_byte, kind="stable")
    order = order[per_byte[order] > 0]
    kept = order[np.cumsum(sizes[order]) <= max_bytes]
    return np.bincount(owner[kept], minlength=len(worth)).tolist()
