"""ImPart by rate and distortion: unbiased codes of 1 to 8 bits, as many of each as do most good for their bytes.

Vectors are rounded by sparse GPTQ; without calibration text, against the inputs that the delta itself tells of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..coding.rate_distortion import Choice, Components, ErrorWeights, Matrix, allocate
from ..coding.record_sizes import COMPONENT_BYTES, OVERHEAD_BYTES, factored_bytes, runs
from ..common.validation import check_number
from ..modeling.width_codes import level_widths
from .base import Encoded, EncodingTask, MethodConfig, Spectrum
from .settings import setting

if TYPE_CHECKING:
    import torch

# What noise in v, and in both vectors, counts for in that of noise in u (docs/methods/impart-rd.md: measurements)
_V_NOISE, _BOTH_NOISE = 0.25, 0.06
# The same where rows are tokens, and what all counts for there in that of other matrices. Noise in u puts a token
# where other tokens are, as a dropped component does.
_TOKEN_V_NOISE, _TOKEN_BOTH_NOISE, _TOKEN_WEIGHT = 0.02, 0.1, 6.0
# Added to the inputs' variance in each direction, in units of its mean: others than the text's or the fine-tune's will
# come. Hardly any at all is the optimum of GPTQ, but U, which makes up for V, would answer to what is hardly there.
_UNKNOWN_INPUTS = 1.0
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
    uncalibrated: ClassVar[str] = "none: inputs guessed"

    embeddings: str = "method"
    drop_weight: float = setting(3.0, "what a dropped component counts for, in noise of the same size, at least 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("drop_weight", self.drop_weight)
        if not 1 <= self.drop_weight < float("inf"):
            raise ValueError(f"drop_weight must be at least 1, got {self.drop_weight}")

    def least_bytes(self, rows: int, columns: int) -> int:
        return factored_bytes(np.ones(1, int), np.array([rows]), np.array([columns]))

    def rank_for(self, spectrum: np.ndarray, rows: int, columns: int, max_bytes: int) -> int:
        most = 8 * max_bytes / (_LEAST_BITS * (rows + columns) + 8 * COMPONENT_BYTES)
        return min(min(rows, columns), 1 + int(most))

    def allocate(self, spectra: list[Spectrum], max_bytes: int) -> list[int]:
        return allocate([self.matrix(spectrum) for spectrum in spectra], max_bytes)

    def matrix(self, spectrum: Spectrum) -> Matrix:
        """A matrix as bits are shared out among components: its spectrum, and what errors in it count for."""
        return Matrix(spectrum.sigma, spectrum.rows, spectrum.columns, _error_weights(spectrum, self.drop_weight))

    def _encode(self, task: EncodingTask) -> Encoded:
        from ..coding.factor_quantisation import quantised
        from ..coding.records import empty_record, factored_record
        from ..modeling.seeded_mask import keep_mask

        rows, columns = task.delta.shape
        u, sigma, v = task.svd(task.delta, lambda spectrum: self.rank_for(spectrum, rows, columns, task.max_bytes))
        choice = self._fitted(sigma.double().cpu().numpy(), task)
        count = choice.count
        if count == 0:
            return Encoded(empty_record(rows, columns, 1.0), ("dropped: its bytes do more good elsewhere",))
        factors = u[:, :count], sigma[:count], v[:, :count]
        bits, thresholds = choice.bits[:count], choice.thresholds[:count]
        widths_u, widths_v = (
            best_widths(part.t(), keep_mask(task.mask_seed, side, thresholds, len(part), part.device), bits[:, side])
            for side, part in enumerate((factors[0], factors[2]))
        )
        levels_u, weights, levels_v, notes = quantised(
            *factors, thresholds, widths_u, task.mask_seed, input_moments(task), widths_v=widths_v, delta=task.delta
        )
        data = factored_record(task.delta, levels_u, weights, levels_v, thresholds, widths_u, task.mask_seed, widths_v)
        return Encoded(data, notes)

    def _fitted(self, sigma: np.ndarray, task: EncodingTask) -> Choice:
        """The choice of components with which the record fits its budget, as the masks turn out."""
        import torch

        from ..coding.records import kept_counts

        rows, columns = task.delta.shape
        budget = float(task.max_bytes - OVERHEAD_BYTES)
        energy = float(torch.linalg.vector_norm(task.delta)) ** 2
        components = Components([self.matrix(Spectrum(sigma, rows, columns, energy, task.vocabulary))])
        for _ in range(_MAX_FITS):
            choice = components.choose(components.price_for(budget))
            count = choice.count
            kept = kept_counts(task.mask_seed, choice.thresholds[:count], (rows, columns), task.delta.device)
            excess = factored_bytes(choice.bits[:count], *kept) - task.max_bytes
            if excess <= 0:
                return choice
            budget = choice.bytes.sum() - excess
        return Choice(choice.bits * 0, choice.thresholds, choice.bytes * 0)


def _error_weights(spectrum: Spectrum, drop_weight: float) -> ErrorWeights:
    """What errors of a matrix count for, by what its singular values tell of the inputs."""
    if spectrum.vocabulary:
        weight = _TOKEN_WEIGHT * spectrum.weight
        return ErrorWeights(weight, weight, _TOKEN_V_NOISE * weight, _TOKEN_BOTH_NOISE * weight)
    # The variance of the inputs along v, in that of all, is about this one squared: training moves a weight in the
    # directions of its inputs, and most along the strongest. The root is what turns out best.
    along = spectrum.sigma * np.sqrt(min(spectrum.rows, spectrum.columns) / (spectrum.energy or 1.0))
    return ErrorWeights(drop_weight * along, along, _V_NOISE, np.minimum(_BOTH_NOISE, along))


def input_moments(task: EncodingTask) -> torch.Tensor | None:
    """The second moments of a matrix's inputs, (n, n), in units of their mean; None where rows are tokens.

    Without calibration text they are those of the delta's own rows: the gradients that it is the sum of were made of
    inputs.
    """
    if task.hessian is None and task.vocabulary:
        return None
    known = task.delta.t() @ task.delta if task.hessian is None else task.hessian
    moments = known / (float(known.diagonal().mean()) or 1.0)  # inputs may all be zero
    moments.diagonal().add_(_UNKNOWN_INPUTS)
    return moments


def best_widths(plane: torch.Tensor, mask: torch.Tensor, bits: np.ndarray) -> np.ndarray:
    """The width codes of a plane (r, length): of the levels with so many bits, those that round it best."""
    from ..coding.factor_quantisation import cosines

    widths = bits.copy()
    for width, part in runs(bits):
        kinds = [np.full(part.stop - part.start, kind) for kind in level_widths(width)]
        widths[part] = max(kinds, key=lambda kind: float(cosines(plane[part], mask[part], kind).square().sum()))
    return widths
