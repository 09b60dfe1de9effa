"""Singular components at mixed precision: more bits for the first, fewer for the rest (Delta-CoMe, arXiv 2406.08903).

They are quantised by ImPart's algorithm 2 (arXiv 2504.13237), see `coding.factor_quantisation`.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..coding.record_sizes import COMPONENT_BYTES, OVERHEAD_BYTES
from .base import Encoded, EncodingTask, MethodConfig
from .settings import setting

_LEAST_BITS, _MOST_BITS = 2, 8


@dataclass
class MixedPrecision(MethodConfig):
    """Settings of the methods that quantise singular components.

    Attributes:
        bits: bits of a value in each group of components, in their order; 2 to 8 each.
        groups: number of components of each group except the last, which has the rest; one number fewer than `bits`.
    """

    quantises = True
    factored = True

    bits: tuple[int, ...] = setting((8, 3, 2), "bits of a value in each group of components, comma-separated, 2 to 8")
    groups: tuple[int, ...] = setting((2, 32), "components in each group except the last, comma-separated")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bits", "groups"):
            if not isinstance(getattr(self, name), (tuple, list)):
                raise ValueError(f"{name} must be a sequence of whole numbers, got {getattr(self, name)!r}")
        self.bits = tuple(check_bits("bits", bits) for bits in self.bits)
        self.groups = tuple(self.groups)
        if len(self.bits) != len(self.groups) + 1:
            raise ValueError(
                f"groups must have one number fewer than bits, because the last group has the rest; got bits "
                f"{self.bits} and groups {self.groups}"
            )
        if any(isinstance(g, bool) or not isinstance(g, int) or g < 1 for g in self.groups):
            raise ValueError(f"groups must be whole numbers above 0, got {self.groups}")

    def check_shapes(self, shapes: list[tuple[int, int]]) -> None:
        most = max((min(shape) for shape in shapes), default=0)
        if shapes and sum(self.groups) > most:
            raise ValueError(
                f"groups {self.groups} have {sum(self.groups)} components, more than the rank of any matrix "
                f"({most}): make the groups smaller"
            )

    def least_bytes(self, rows: int, columns: int) -> int:
        # All entries of the first component are kept: in ImPart, because its importance is 1.
        return OVERHEAD_BYTES + COMPONENT_BYTES + 2 + self.bits[0] * (rows + columns) // 8

    def _encode_stack(self, tasks: list[EncodingTask]) -> list[Encoded]:
        import torch

        from ..coding.spectrum import decomposed
        from ..coding.stacked_factors import FactorStack, stacked_moments
        from ..coding.svd import leading_svds

        if any(task.svd is not decomposed for task in tasks):
            return super()._encode_stack(tasks)
        deltas = torch.stack([task.delta for task in tasks])
        rows, columns = deltas.shape[1:]
        rules = [partial(self.rank_for, rows=rows, columns=columns, max_bytes=task.max_bytes) for task in tasks]
        factors, counts = leading_svds(deltas, rules)
        sigma = factors[1].double().cpu().numpy()
        chosen = self._stack_thresholds([row[:count] for row, count in zip(sigma, counts, strict=True)], tasks)
        thresholds = [own for own, _ in chosen]
        stack = FactorStack(deltas, factors, thresholds, [task.mask_seed for task in tasks])
        widths = np.concatenate([self.widths(len(own)) for own in thresholds])
        known = [task.hessian for task in tasks if task.hessian is not None]
        moments = stacked_moments(known, lambda hessians: hessians) if known else (None, None)
        records = stack.records([(widths, None)] * 2, *moments, transposed=tasks[0].transposed)
        return [Encoded(data, notes) for data, (_, notes) in zip(records, chosen, strict=True)]

    @abc.abstractmethod
    def _stack_thresholds(
        self, spectra: list[np.ndarray], tasks: list[EncodingTask]
    ) -> list[tuple[np.ndarray, tuple[str, ...]]]:
        """Return the thresholds of the components that are stored of each matrix, and notes.

        Args:
            spectra: the leading singular values of each, float64, as many as `rank_for` asks for.
        """

    def widths(self, count: int) -> np.ndarray:
        """Return the bits of the first `count` components' values, shape (count,)."""
        return np.repeat(self.bits, [*self.groups, max(count, 1)])[:count]


def check_bits(name: str, bits: object) -> int:
    """Return `bits` after checking that it is a number of bits from 2 to 8.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not _LEAST_BITS <= bits <= _MOST_BITS:
        raise ValueError(f"{name} must be whole numbers from {_LEAST_BITS} to {_MOST_BITS}, got {bits!r}")
    return bits
