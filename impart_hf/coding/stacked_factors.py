"""Records of several matrices of one shape, quantised together: on an accelerator, launches are those of one.

Ranks differ. Matrices of a lower one than others have absent components at the end: zeros that a mask drops.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..modeling.delta_record import MAX_THRESHOLD, pack_record
from ..modeling.seeded_mask import keep_mask
from .factor_quantisation import Side, quantise_sides
from .gptq import Factor, Grid, inverse_factor
from .level_scales import fit_levels
from .record_sizes import kept_ratios
from .records import MeasuredRecord, factored
from .svd import SvdStack

# The width codes of one side of all components, and their scales if they are known.
SideWidths = tuple[np.ndarray, Tensor | None]


@dataclass(frozen=True)
class FactorStack:
    """Deltas and their singular components, of which a part is dropped by masks.

    Attributes:
        deltas: float32 (b, m, n).
        factors: U (b, m, r), sigma (b, r), V (b, n, r), with at least as many components as are stored.
        thresholds: of each matrix, uint16 (own rank,).
        seeds: of each matrix, its record's mask seed.
    """

    deltas: Tensor
    factors: SvdStack
    thresholds: list[np.ndarray]
    seeds: list[int]

    @cached_property
    def ranks(self) -> np.ndarray:
        """The components stored of each matrix, (b,)."""
        return np.array([len(own) for own in self.thresholds])

    @cached_property
    def _present(self) -> np.ndarray:
        return np.arange(self.ranks.max()) < self.ranks[:, None]

    @cached_property
    def _index(self) -> Tensor | None:
        """The numbers of the components that are there among those of all, or None if all are."""
        present = self._present
        return None if present.all() else torch.from_numpy(np.flatnonzero(present)).to(self.deltas.device)

    @cached_property
    def _there(self) -> Tensor:
        """Which components are there, bool (b, r, 1)."""
        return torch.from_numpy(self._present).to(self.deltas.device)[..., None]

    @cached_property
    def ranks_there(self) -> Tensor | None:
        """The ranks, float32 (b,), if some components are absent."""
        return None if self._present.all() else torch.from_numpy(self.ranks).to(self.deltas)

    def padded(self, numbers: np.ndarray, absent: int) -> np.ndarray:
        """Return numbers of the components of all matrices, (sum of ranks,), by matrix: (b, r)."""
        table = np.full(self._present.shape, absent, numbers.dtype)
        table[self._present] = numbers
        return table

    def gathered(self, plane: Tensor) -> Tensor:
        """Return the rows of the components that are there, (sum of ranks, length), of all: (b, r, length)."""
        flat = plane.reshape(-1, plane.shape[-1])
        return flat if self._index is None else flat[self._index]

    def spread(self, numbers: Tensor) -> Tensor:
        """Return numbers of the components that are there by matrix, (b, r), 1 for those that are absent."""
        if self._index is not None:
            numbers = numbers.new_ones(self._present.size).index_copy_(0, self._index, numbers)
        return numbers.view(self._present.shape)

    @cached_property
    def _parts(self) -> list[Tensor]:
        """U and V, (b, length, r), with zeros for absent components."""
        most = self._present.shape[1]
        parts = [self.factors[number][..., :most] for number in (0, 2)]
        return parts if self._index is None else [part * self._there.mT for part in parts]

    @cached_property
    def _kept(self) -> list[Tensor | None]:
        """The masks of U and V, (b, r, length), or None if they keep all."""
        (count, most), thresholds = self._present.shape, self._padded_thresholds
        if (thresholds == MAX_THRESHOLD).all():
            return [None, None]
        seeds, numbers = np.repeat(self.seeds, most), np.tile(np.arange(most), count)
        return [
            keep_mask(seeds, side, thresholds.ravel(), length, self.deltas.device, numbers).view(count, most, length)
            for side, length in enumerate(self.deltas.shape[1:])
        ]

    @cached_property
    def _padded_thresholds(self) -> np.ndarray:
        return self.padded(np.concatenate(self.thresholds), MAX_THRESHOLD)

    def rows(self, side: int) -> tuple[Tensor, Tensor | None]:
        """Return the vectors of one side of all matrices, (sum of ranks, length), and their masks or None."""
        kept = self._kept[side]
        return self.gathered(self._parts[side].mT), None if kept is None else self.gathered(kept)

    def _side(self, side: int, widths: SideWidths) -> "_StackSide":
        kept = self._kept[side]
        if self._index is not None:
            kept = self._there.expand(-1, -1, self.deltas.shape[1 + side]) if kept is None else kept & self._there
        scale = None if widths[1] is None else self.spread(widths[1])
        return _StackSide(self._parts[side], kept, self.padded(widths[0], int(widths[0][0])), scale, self, side)

    def records(
        self,
        widths: Sequence[SideWidths],
        hessians: Tensor | None,
        which: list[int] | None,
        *,
        compensated: bool = False,
        transposed: bool = False,
    ) -> list[MeasuredRecord]:
        """Mask and quantise U and V as `factor_quantisation.quantised` does, and pack the records.

        Args:
            widths: of U and of V.
            hessians: float32 (k, n, n), or (k, m, m) if `transposed`, or None.
            which: of each matrix, which Hessian is its; None if they are in order.
            compensated: whether U is to compensate for the error of the quantised V.

        Raises:
            gptq.StackError: if one of the matrices needs more damping than usual.
        """
        factor = None if hessians is None else inverse_factor(hessians)
        if hessians is not None and factor is not None and which is not None:
            hessians, factor = hessians[which], Factor(factor.upper[which], factor.order[which])
        sides = [self._side(side, own) for side, own in enumerate(widths)]
        outer, inner = reversed(sides) if transposed else sides
        ratios = torch.from_numpy(kept_ratios(self._padded_thresholds) ** -2).to(self.deltas)
        sigma = self.factors[1][:, : self._present.shape[1]] * ratios
        deltas = self.deltas.mT if transposed else self.deltas
        done = quantise_sides(outer, inner, sigma, hessians, factor, deltas if compensated else None)
        codes = torch.cat([done.outer.codes.mT, done.inner.codes], 2).cpu()
        codes_of = codes.split([deltas.shape[1], deltas.shape[2]], 2)
        codes_u, codes_v = reversed(codes_of) if transposed else codes_of
        sigmas = done.sigma.double().cpu().numpy()
        records = []
        ends = np.cumsum(self.ranks)
        for number, (rank, end) in enumerate(zip(self.ranks.tolist(), ends.tolist(), strict=True)):
            own = [numbers[end - rank : end] for numbers, _ in widths]
            levels = [
                Grid(torch.ones(rank, 1), kinds).values(plane[number, :rank]).t()
                for kinds, plane in zip(own, (codes_u, codes_v), strict=True)
            ]
            records.append(
                factored(
                    levels[0], sigmas[number, :rank], levels[1], self.thresholds[number], own[0], self.seeds[number],
                    own[1],
                )
            )  # fmt: skip
        # What a reader decodes, without decoding every record.
        stored = np.zeros(self._present.shape)
        for row, record in zip(stored, records, strict=True):
            record.scale = float(np.float32(record.scale))
            row[: record.rank] = record.sigma.astype(np.float64) * record.scale
        scaled = torch.from_numpy(stored).to(deltas) / (done.outer_scale * done.inner_scale)
        left = torch.baddbmm(deltas, done.outer.values * scaled[:, None], done.inner.values, beta=-1)
        norms = torch.linalg.vector_norm(deltas, dim=(1, 2))
        missing = torch.linalg.vecdot(left.flatten(1), deltas.flatten(1)) / norms**2
        measured = torch.stack([torch.linalg.vector_norm(left, dim=(1, 2)) / norms, -missing]).tolist()
        for record, error in zip(records, measured[0], strict=True):
            record.relative_error = error
        return [MeasuredRecord(pack_record(record), part) for record, part in zip(records, measured[1], strict=True)]


@dataclass(frozen=True)
class _StackSide(Side):
    """U or V of a stack, (b, length, r), with its mask (b, r, length) or None, width codes and scales (b, r)."""

    stack: FactorStack
    number: int

    @property
    def ranks(self) -> Tensor | None:
        return self.stack.ranks_there

    def fitted(self, start: Tensor | None = None) -> Tensor:
        rows = self.stack.gathered(self.part.mT)
        kept = self.stack.rows(self.number)[1]
        near = None if start is None else self.stack.gathered(start[..., None])[:, 0]
        return self.stack.spread(fit_levels(rows, kept, self.widths[self.stack._present], near).scale)


def stacked_moments(
    tensors: list[Tensor] | Tensor, moments: Callable[[Tensor], Tensor]
) -> tuple[Tensor, list[int] | None]:
    """Return second moments (k, n, n) of the inputs of the matrices of a stack, and which of them is whose.

    Args:
        tensors: the Hessian of each matrix, of which several may be one tensor; or the deltas (b, m, n), whose rows
            then stand for inputs.
        moments: makes of second moments what is used.
    """
    if isinstance(tensors, Tensor):
        return moments(tensors.mT @ tensors), None
    once = {id(tensor): tensor for tensor in tensors}
    numbers = {key: number for number, key in enumerate(once)}
    which = [numbers[id(tensor)] for tensor in tensors]
    return moments(torch.stack(list(once.values()))), None if len(once) == len(tensors) else which
