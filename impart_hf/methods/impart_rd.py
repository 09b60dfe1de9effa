"""ImPart by rate and distortion: unbiased codes of 1 to 8 bits, as many of each as do most good for their bytes.

Without calibration, vectors are rounded to the levels that are best for normally distributed numbers. With it, each
matrix has either these or evenly spaced levels chosen by sparse GPTQ, whichever changes the layer's output less.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ..modeling.delta_decode import evenly_spaced, normal_levels
from ..modeling.delta_record import NORMAL_LEVELS
from ..modeling.seeded_mask import keep_mask
from .base import Encoded, EncodingTask, MethodConfig, check_number
from .gptq import Grid, best_scale
from .mixed_precision import quantised
from .rate_distortion import NOISE, Choice, allocate, choose, price_for
from .records import (
    COMPONENT_BYTES,
    OVERHEAD_BYTES,
    empty_record,
    factored_bytes,
    factored_record,
    kept_counts,
    nearest_normal,
    runs,
)

_WIDTHS = {bits: bits + 32 if bits + 32 in NORMAL_LEVELS else bits for bits in NOISE}
# No component that is worth its bytes keeps less than this share of a bit for each entry, see `rate_distortion`
_LEAST_BITS = 0.75
_MAX_FITS = 16


@dataclass
class ImPartRdConfig(MethodConfig):
    """Settings of ImPart by rate and distortion.

    One price of a byte holds for the whole model, embeddings and output projection included: a matrix has as many
    bytes as do good there.

    Attributes:
        drop_weight: what a dropped component counts for, in noise of the same size; at least 1. What is dropped is
            missing in the same direction everywhere, while noise averages out.
    """

    name: ClassVar[str] = "impart-rd"
    factored: ClassVar[bool] = True
    shares_budget: ClassVar[bool] = True
    quantises: ClassVar[bool] = True

    embeddings: str = "method"
    drop_weight: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("drop_weight", self.drop_weight)
        if not 1 <= self.drop_weight < float("inf"):
            raise ValueError(f"drop_weight must be at least 1, got {self.drop_weight}")

    def least_bytes(self, rows: int, columns: int) -> int:
        return factored_bytes(np.ones(1, int), np.array([rows]), np.array([columns]))

    def wanted(self, spectrum: np.ndarray, rows: int, columns: int, max_bytes: int) -> int:
        most = 8 * max_bytes / (_LEAST_BITS * (rows + columns) + 8 * COMPONENT_BYTES)
        return min(min(rows, columns), 1 + int(most))

    def allocate(self, spectra: list[np.ndarray], shapes: list[tuple[int, int]], max_bytes: int) -> list[int]:
        return allocate(spectra, shapes, max_bytes, self.drop_weight)

    def _encode(self, task: EncodingTask) -> Encoded:
        rows, columns = task.delta.shape
        u, sigma, v = task.svd(task.delta, lambda spectrum: self.wanted(spectrum, rows, columns, task.max_bytes))
        choice = self._fitted(sigma.double().cpu().numpy(), task)
        count = int((choice.bits > 0).sum())
        if count == 0:
            return Encoded(empty_record(rows, columns, 1.0), ("dropped: its bytes do more good elsewhere",))
        factors = u[:, :count], sigma[:count], v[:, :count]
        bits, thresholds = choice.bits[:count], choice.thresholds[:count]
        widths = _widths(bits)
        planes: Sequence[Any] = _rounded(*factors, thresholds, widths, task.mask_seed)
        notes: tuple[str, ...] = ()
        if task.hessian is not None:
            *others, notes = quantised(*factors, thresholds, bits, task.mask_seed, task.hessian)
            error, other = (_output_error(task.delta, task.hessian, *found) for found in (planes, others))
            if other < error:
                planes, widths = others, bits
        levels_u, weights, levels_v = planes
        return Encoded(
            factored_record(task.delta, levels_u, weights, levels_v, thresholds, widths, task.mask_seed), notes
        )

    def _fitted(self, sigma: np.ndarray, task: EncodingTask) -> Choice:
        """The choice of components with which the record fits its budget, as the masks turn out."""
        rows, columns = task.delta.shape
        budget = float(task.max_bytes - OVERHEAD_BYTES)
        for _ in range(_MAX_FITS):
            price = price_for(sigma, rows + columns, budget, self.drop_weight)
            choice = choose(sigma, rows + columns, price, self.drop_weight)
            count = int((choice.bits > 0).sum())
            kept = kept_counts(task.mask_seed, choice.thresholds[:count], (rows, columns), task.delta.device)
            excess = factored_bytes(_widths(choice.bits[:count]), *kept) - task.max_bytes
            if excess <= 0:
                return choice
            budget = choice.bytes.sum() - excess
        return Choice(choice.bits * 0, choice.thresholds, choice.bytes * 0)


def _widths(bits: np.ndarray) -> np.ndarray:
    return np.array([_WIDTHS[width] for width in bits.tolist()], np.int64)


def _rounded(
    u: torch.Tensor, sigma: torch.Tensor, v: torch.Tensor, thresholds: np.ndarray, widths: np.ndarray, mask_seed: int
) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    """U's levels (m, r), the weights of the components, V's levels (n, r), as `factored_record` wants them."""
    weights, levels = sigma.clone(), []
    for side, vectors in enumerate((u, v)):
        plane = vectors.t()
        mask = keep_mask(mask_seed, side, thresholds, plane.shape[1], plane.device)
        found = torch.cat([_levels(plane[part], mask[part], width) for width, part in runs(widths)])
        # The stored vector's part along the exact one is then exact: no bias, however coarse the levels
        weights *= plane.square().sum(1) / (plane * mask * found).sum(1).clamp_min(torch.finfo(plane.dtype).tiny)
        levels.append((found * mask).t())
    return levels[0], weights.double().cpu().numpy(), levels[1]


def _output_error(
    delta: torch.Tensor, hessian: torch.Tensor, u: torch.Tensor, weights: np.ndarray, v: torch.Tensor
) -> float:
    """Of the layer's output on the calibration text, squared, when these levels stand for the delta."""
    error = torch.addmm(delta, u * torch.from_numpy(weights).to(u), v.t(), alpha=-1)
    return float((error @ hessian * error).sum(dtype=torch.float64))


def _levels(plane: torch.Tensor, mask: torch.Tensor, width: int) -> torch.Tensor:
    """The levels nearest to a plane's values (columns, entries), each column in a unit of its own."""
    if width in NORMAL_LEVELS:
        rms = ((plane * mask).square().sum(1) / mask.sum(1).clamp_min(1)).sqrt().clamp_min(1e-20)
        return normal_levels(width, plane.device)[nearest_normal((plane / rms[:, None]).contiguous(), width).int()]
    if width == 1:
        return torch.where(plane < 0, -1.0, 1.0)
    scale = best_scale(plane, mask, width)[:, None]
    return evenly_spaced(Grid(scale, torch.full_like(scale, 2.0**width - 1)).codes(plane), width)
