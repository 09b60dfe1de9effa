"""ImPart by rate and distortion: unbiased codes of 1 to 8 bits, allocated where they reduce the error most per byte.

Vectors are rounded by sparse GPTQ; without calibration text, for inputs that are estimated from the delta itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..coding.allocation import Allocation, allocation
from ..coding.entry_codes import EntryCode, entry_code, of_components
from ..coding.rate_distortion import NOISE, Choice, Components, ErrorWeights, Matrix
from ..coding.record_sizes import OVERHEAD_BYTES, factored_bytes, kept_ratios, runs
from ..common.validation import check_number, check_whole_number
from ..modeling.width_codes import level_widths
from .base import GUESSED, Encoded, EncodingTask, MethodConfig, Spectrum
from .settings import setting

if TYPE_CHECKING:
    import torch

    from ..common.last_result import LastResult

# Weights of noise in v, and in both vectors, relative to noise in u (docs/methods/impart-rd.md has the measurements).
_V_NOISE, _BOTH_NOISE = 0.25, 0.06
# The same for noise in single entries of a whole matrix.
_ENTRY_NOISE = 0.06
# Scale of the levels of entries, in units of their root mean square: above 1, so that the largest lose less.
_ENTRY_SCALE = 1.15
# The same for matrices whose rows are tokens, and the weight of all errors there relative to other matrices. Noise in u
# moves a token towards other tokens, as a dropped component does.
_TOKEN_V_NOISE, _TOKEN_BOTH_NOISE, _TOKEN_WEIGHT = 0.02, 0.1, 6.0
# Added to the inputs' variance in each direction, in units of its mean, because inputs other than those of the
# calibration text or the fine-tune will occur. GPTQ alone does best with hardly any. But U, which compensates for V,
# would then respond to directions that hardly occur in the inputs. The inputs of a real model are strong in a few,
# which make most of the mean.
_UNKNOWN_IN_TEXT, _UNKNOWN_IN_DELTA = 10.0, 1.0
# Deltas below this share of their weight are light: rounding them without guessed inputs is better, and noise of many
# times their size is still small beside the weight.
_LIGHT = 0.05
_MAX_FITS = 16
_TRIED_ROWS = 8  # of each run of components, to choose the kind of their levels


def _rank(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"max_rank must be a whole number, got {text!r}")
    return int(text)


@dataclass
class ImPartRdConfig(MethodConfig):
    """Settings of ImPart by rate and distortion.

    The byte budget is allocated at one price of a byte for the whole model, including embeddings and output projection.

    Attributes:
        drop_weight: weight of a dropped component, relative to noise of the same size; at least 1. A dropped component
            is missing in the same direction everywhere, while noise averages out.
        max_rank: the most components of a matrix, so that a LoRA adapter of this rank holds the delta as a whole; None
            for no bound. With a bound no matrix is stored by entries.
    """

    name: ClassVar[str] = "impart-rd"
    factored: ClassVar[bool] = True
    shares_budget: ClassVar[bool] = True
    quantises: ClassVar[bool] = True
    uncalibrated: ClassVar[str] = "none: inputs guessed from deltas that are not light"

    embeddings: str = "method"
    drop_weight: float = setting(3.0, "weight of a dropped component, relative to noise of the same size, at least 1")
    max_rank: int | None = setting(
        None, "most components of a matrix, so that an adapter of this rank is the whole delta", parse=_rank
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("drop_weight", self.drop_weight)
        if not 1 <= self.drop_weight < float("inf"):
            raise ValueError(f"drop_weight must be at least 1, got {self.drop_weight}")
        if self.max_rank is not None:
            check_whole_number(1, max_rank=self.max_rank)

    def least_bytes(self, rows: int, columns: int) -> int:
        return factored_bytes(np.ones(1, int), np.array([rows]), np.array([columns]))

    def allocate(self, spectra: list[Spectrum], max_bytes: int) -> list[int]:
        return self.allocation(spectra, max_bytes).bytes

    def allocation(self, spectra: list[Spectrum], max_bytes: int) -> Allocation:
        """Share out a byte budget as `allocate` does, with the errors that are to be expected."""
        return allocation([self.matrix(spectrum) for spectrum in spectra], max_bytes)

    def matrix(self, spectrum: Spectrum) -> Matrix:
        """A matrix as bits are shared out among components: its spectrum, and what errors in it count for."""
        # Entries of an embedding that are dropped are missing in single tokens, which does not average out. And noise
        # that is many times a delta must still be small beside the weight.
        by_entries = _is_light(spectrum.relative_norm) and not spectrum.vocabulary and self.max_rank is None
        spectrum = replace(spectrum, sigma=spectrum.sigma[: self.max_rank])
        noise = spectrum.weight * _ENTRY_NOISE * spectrum.energy if by_entries else math.inf
        return Matrix(
            spectrum.sigma, spectrum.rows, spectrum.columns, _error_weights(spectrum, self.drop_weight), noise
        )

    def _encode(self, task: EncodingTask) -> Encoded:
        import torch

        from ..coding.factor_quantisation import plane_mask, quantised
        from ..coding.records import factored, pack_measured
        from ..coding.spectrum import singular_values

        spectrum = singular_values(task.delta) if task.sigma is None else task.sigma
        norm = float(torch.linalg.vector_norm(task.delta))
        (choice,) = self._fitted([spectrum], [task], [norm])
        if (entries := self._by_entries(choice, spectrum, task, norm)) is not None:
            return entries
        count = choice.count
        if count == 0:
            return _dropped(task)
        factors = task.svd(task.delta, count, spectrum)
        bits, thresholds = choice.bits[:count], choice.thresholds[:count]
        (widths_u, scale_u), (widths_v, scale_v) = (
            best_widths(part.t(), plane_mask(task.mask_seed, side, thresholds, part), bits[:, side])
            for side, part in enumerate((factors[0], factors[2]))
        )
        levels_u, scaled_sigma, levels_v, notes = quantised(
            *factors,
            thresholds,
            widths_u,
            task.mask_seed,
            input_moments(task),
            widths_v=widths_v,
            scales=(scale_u, scale_v),
            delta=task.delta,
            transposed=task.transposed,
        )
        data = pack_measured(
            factored(levels_u, scaled_sigma, levels_v, thresholds, widths_u, task.mask_seed, widths_v), task.delta
        )
        return Encoded(data, (*notes, GUESSED) if _guesses(task) else notes)

    def _encode_stack(self, tasks: list[EncodingTask]) -> list[Encoded]:
        import torch

        from ..coding.spectrum import leading_components_of_all, singular_values
        from ..coding.stacked_factors import FactorStack, stacked_moments

        if any(task.vocabulary for task in tasks):
            return super()._encode_stack(tasks)
        guessed = [task.hessian is None and not _is_light(task.relative_norm) for task in tasks]
        if any(guessed) and tasks[0].hessian is None and not all(guessed):
            kinds = {
                kind: iter(self.encode_all([t for t, own in zip(tasks, guessed, strict=True) if own == kind]))
                for kind in (False, True)
            }
            return [next(kinds[own]) for own in guessed]
        deltas = torch.stack([task.delta for task in tasks])
        known = [task.sigma for task in tasks if task.sigma is not None]
        spectra = known if len(known) == len(tasks) else list(singular_values(deltas))
        norms = torch.linalg.vector_norm(deltas, dim=(1, 2)).tolist()
        choices = self._fitted(spectra, tasks, norms)
        encoded = [_dropped(task) for task in tasks]
        stored = []
        for number, (task, choice) in enumerate(zip(tasks, choices, strict=True)):
            if (entries := self._by_entries(choice, spectra[number], task, norms[number])) is not None:
                encoded[number] = entries
            elif choice.count:
                stored.append(number)
        if not stored:
            return encoded
        if len(stored) < len(tasks):
            deltas = deltas[stored]
        tasks, choices = [tasks[number] for number in stored], [choices[number] for number in stored]
        factors = leading_components_of_all(deltas, [c.count for c in choices], [spectra[number] for number in stored])
        stack = FactorStack(
            deltas, factors, [c.thresholds[: c.count] for c in choices], [task.mask_seed for task in tasks]
        )
        bits = np.concatenate([choice.bits[: choice.count] for choice in choices])
        fits = [
            best_widths(*stack.rows(side), bits[:, side], np.repeat(np.arange(len(choices)), stack.ranks))
            for side in (0, 1)
        ]
        hessians = [task.hessian for task in tasks if task.hessian is not None]
        known_inputs = bool(hessians) or guessed[0]
        moments: tuple[torch.Tensor | None, list[int] | None] = (None, None)
        if known_inputs:
            moments = stacked_moments(hessians or deltas, _text_moments if hessians else _guessed_moments)
        records = stack.records(fits, *moments, compensated=True, transposed=tasks[0].transposed)
        for number, data in zip(stored, records, strict=True):
            encoded[number] = Encoded(data, () if hessians or not known_inputs else (GUESSED,))
        return encoded

    def _by_entries(self, choice: Choice, sigma: np.ndarray, task: EncodingTask, norm: float) -> Encoded | None:
        """Store a matrix by entries, if that is better than a choice of components."""
        rows, columns = task.delta.shape
        spectrum = Spectrum(sigma, rows, columns, norm**2, task.vocabulary, relative_norm=task.relative_norm)
        matrix = self.matrix(spectrum)
        code = entry_code(matrix, task.max_bytes)
        harm = float(of_components(float(choice.errors.sum()), matrix.entry_energy))
        return _entries_encoded(task, code, harm) if code.error < harm else None

    def _fitted(self, spectra: Sequence[np.ndarray], tasks: list[EncodingTask], norms: list[float]) -> list[Choice]:
        """Choose components so that each record, with the entries that its masks really keep, fits its budget.

        Args:
            norms: the Frobenius norms of the deltas.
        """
        from ..coding.records import kept_counts_of_all

        rows, columns = tasks[0].delta.shape
        # Bits are chosen for the outputs' factor and the inputs': U and V, unless the matrix is transposed.
        order = -1 if tasks[0].transposed else 1
        outputs, inputs = (rows, columns)[::order]
        components = [
            Components([self.matrix(Spectrum(sigma, outputs, inputs, norm**2, task.vocabulary))])
            for sigma, norm, task in zip(spectra, norms, tasks, strict=True)
        ]
        budgets = [float(task.max_bytes - OVERHEAD_BYTES) for task in tasks]
        choices: dict[int, Choice] = {}
        waiting = list(range(len(tasks)))
        for _ in range(_MAX_FITS):
            for i in waiting:
                choice = components[i].choose(components[i].price_for(budgets[i]))
                choices[i] = replace(choice, bits=choice.bits[:, ::order])
            kept = kept_counts_of_all(
                [tasks[i].mask_seed for i in waiting],
                [choices[i].thresholds[: choices[i].count] for i in waiting],
                (rows, columns),
                tasks[0].delta.device,
            )
            too_large = []
            for i, counts in zip(waiting, kept, strict=True):
                excess = factored_bytes(choices[i].bits[: choices[i].count], *counts) - tasks[i].max_bytes
                if excess > 0:
                    budgets[i] = choices[i].bytes.sum() - excess
                    too_large.append(i)
            waiting = too_large
            if not waiting:
                break
        for i in waiting:
            choice, dropped = choices[i], components[i].table.numbers[2]
            choices[i] = replace(choice, bits=choice.bits * 0, bytes=choice.bytes * 0, errors=dropped)
        return [choices[i] for i in range(len(tasks))]


def _dropped(task: EncodingTask) -> Encoded:
    from ..coding.records import empty_record

    rows, columns = task.delta.shape
    return Encoded(empty_record(rows, columns, 1.0), ("dropped: its bytes reduce the error more in other matrices",))


def _entries_encoded(task: EncodingTask, code: EntryCode, most_error: float) -> Encoded | None:
    """Round a part of the entries, drawn at random, and scale them so that nothing of the delta is lost on average.

    Returns:
        None if the error is more than `most_error`, because the entries are not like normally distributed numbers.
    """
    import torch

    from ..coding.gptq import Grid
    from ..coding.records import direct_record, fit_threshold

    delta, (rows, columns) = task.delta, task.delta.shape
    width = level_widths(code.bits)[-1]  # levels for normally distributed numbers
    size = torch.linalg.vector_norm(delta)
    grid = Grid((_ENTRY_SCALE * size / math.sqrt(delta.numel())).reshape(1, 1), np.array([width]))
    entries = delta.reshape(1, -1)
    levels = (grid.values(grid.codes(entries)) / grid.scale).reshape(rows, columns)
    sizes = torch.stack([size**2, torch.dot(levels.flatten(), delta.flatten()), levels.square().sum()])
    energy, along, stored = sizes.tolist()
    if code.error * (stored * energy / along**2) / (1 + NOISE[code.bits]) > most_error:
        return None
    threshold = fit_threshold(rows, columns, code.values, task.mask_seed, delta.device)
    scale = energy / along / float(kept_ratios(np.array([threshold]))[0])
    return Encoded(
        direct_record(delta, levels, scale, threshold, width, task.mask_seed),
        ("entries instead of components: few bytes reduce its error more there",),
    )


def _error_weights(spectrum: Spectrum, drop_weight: float) -> ErrorWeights:
    """Return the error weights of a matrix's components, estimating the inputs' variance from its singular values."""
    if spectrum.vocabulary:
        weight = _TOKEN_WEIGHT * spectrum.weight
        return ErrorWeights(weight, weight, _TOKEN_V_NOISE * weight, _TOKEN_BOTH_NOISE * weight)
    # The inputs' variance along v, relative to its mean over all directions, is about `along` squared, because training
    # changes a weight in the directions of its inputs, most along the strongest. Its root gives the best results.
    along = spectrum.sigma * np.sqrt(min(spectrum.rows, spectrum.columns) / (spectrum.energy or 1.0))
    weight = spectrum.weight
    return ErrorWeights(
        weight * drop_weight * along, weight * along, weight * _V_NOISE, weight * np.minimum(_BOTH_NOISE, along)
    )


def input_moments(task: EncodingTask) -> torch.Tensor | None:
    """Return the second moments of a matrix's inputs, (n, n), in units of their mean, or None.

    Without calibration text, the second moments of the delta's rows are used: the delta is a sum of gradients, whose
    rows are combinations of inputs. The result is then None if rows are tokens, or if the delta is small: it is rounded
    with the weights, and an early step of Adam is nearly a sign, so that it says little of the inputs.
    """
    if task.hessian is not None:
        return _shared_moments()(task.hessian)
    return _guessed_moments(task.delta.t() @ task.delta) if _guesses(task) else None


def _guesses(task: EncodingTask) -> bool:
    return task.hessian is None and not task.vocabulary and not _is_light(task.relative_norm)


def _is_light(relative_norm: float | None) -> bool:
    return relative_norm is not None and relative_norm < _LIGHT


def _text_moments(known: torch.Tensor) -> torch.Tensor:
    return _with_unknown(known, _UNKNOWN_IN_TEXT)


def _guessed_moments(known: torch.Tensor) -> torch.Tensor:
    return _with_unknown(known, _UNKNOWN_IN_DELTA)


def _with_unknown(known: torch.Tensor, unknown: float) -> torch.Tensor:
    """Return second moments (..., n, n) in units of their mean, with as much more in every direction as `unknown`."""
    mean = known.diagonal(dim1=-2, dim2=-1).mean(-1)
    moments = known / mean.where(mean != 0, 1.0)[..., None, None]  # 0 if all inputs are zero
    moments.diagonal(dim1=-2, dim2=-1).add_(unknown)
    return moments


@functools.cache
def _shared_moments() -> LastResult[torch.Tensor]:
    """Return `_text_moments` of the last Hessian, for the matrices that share their inputs."""
    from ..common.last_result import LastResult

    return LastResult(_text_moments)


def best_widths(
    plane: torch.Tensor, mask: torch.Tensor | None, bits: np.ndarray, owners: np.ndarray | None = None
) -> tuple[np.ndarray, torch.Tensor]:
    """Return the width codes, (r,), that round a plane (r, length) best among levels of the given bits.

    Args:
        mask: bool (r, length), true where an entry is kept; None keeps all.
        bits: (r,), the bits of each component's values; a run of equal bits gets one width code, by a few of its rows.
        owners: (r,), which matrix a component belongs to, if there are several.

    Returns:
        The width codes, and the scales, (r,), that suit them.
    """
    from ..coding.level_scales import fit_levels

    widths, tried = bits.copy(), []
    for _, part in runs(bits if owners is None else np.stack([owners, bits], 1)):
        kinds = level_widths(int(bits[part.start]))  # at most two
        widths[part] = kinds[0]
        if len(kinds) > 1:
            tried.append((part, kinds, np.unique(np.linspace(part.start, part.stop - 1, _TRIED_ROWS, dtype=int))))
    if tried:
        rows = np.concatenate([some for _, _, some in tried])
        sample = plane[rows], None if mask is None else mask[rows]
        fits = [
            fit_levels(*sample, np.concatenate([np.full(len(some), kinds[number]) for _, kinds, some in tried])).cosine
            for number in range(2)
        ]
        gains = (fits[1].double().square() - fits[0].double().square()).cpu().numpy()
        for (part, kinds, _), gain in zip(
            tried, np.split(gains, np.cumsum([len(some) for _, _, some in tried])[:-1]), strict=True
        ):
            if gain.sum() > 0:
                widths[part] = kinds[1]
    return widths, fit_levels(plane, mask, widths).scale
