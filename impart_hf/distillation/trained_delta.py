"""A tensor's compressed delta with its stored numbers as parameters, written back to records of equal length."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..coding.factor_quantisation import least_squares
from ..coding.records import columns_of
from ..common.expert_stacks import ExpertStack
from ..modeling.codebook import CODEBOOKS, Codebook, Levels
from ..modeling.delta_decode import decode_planes
from ..modeling.delta_record import FACTORED, Record
from ..modeling.factors import DirectDelta, Factors, MatrixDelta
from ..modeling.planes import Plane

_DAMPING = 1e-4  # of the least squares fit that gives the initial latents


def _into_cells(targets: Tensor, stored: Tensor, book: Codebook) -> Tensor:
    """Return the numbers nearest to the targets that round to the stored values."""
    if not isinstance(book, Levels):
        return stored
    infinity = stored.new_tensor([torch.inf])
    edges = torch.cat([-infinity, book.edges(stored.device), infinity])
    cells = torch.bucketize(stored, edges[1:-1])
    # A margin keeps the result off the edge itself, where rounding may go either way.
    margins = (
        1e-3 * (stored - edges[cells]).nan_to_num(posinf=0),
        1e-3 * (edges[cells + 1] - stored).nan_to_num(posinf=0),
    )
    return targets.maximum(edges[cells] + margins[0]).minimum(edges[cells + 1] - margins[1])


class _Rounded(torch.autograd.Function):
    """Rounding to stored values with a straight-through gradient (Bengio et al., arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, plane: "TrainedPlane") -> Tensor:
        ctx.plane = plane
        return plane.stored(latents)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return torch.cat(ctx.plane.in_units(gradients[0])), None


class TrainedPlane(nn.Module):
    """The kept values of U, V or a direct plane.

    Attributes:
        latents: float32 (kept,), numbers that round to the stored values; a parameter if the values are trained,
            otherwise None. They are divided by a unit, so that one learning rate fits all widths: the root mean square
            of all values, halved for each bit of a code beyond the first, because its levels are closer together.
    """

    latents: Tensor | None

    def __init__(self, plane: Plane, runs: list[tuple[Codebook, slice]], targets: Tensor | None):
        """Initialise with the stored values.

        Args:
            plane: the decoded plane, without column scales.
            runs: codebooks, and the columns that use them.
            targets: float32 (columns, rows), the values before rounding. A latent starts as near to its target as the
                stored value allows, so that it moves more easily to the level on the target's side. None if values are
                not trained.
        """
        super().__init__()
        stored, positions = plane.values(), plane.positions()
        self._shape = plane.columns, plane.rows
        size = plane.columns * plane.rows
        # The smallest dtype that numbers all entries; positions take a good part of the memory of training.
        narrow = torch.int32 if size <= torch.iinfo(torch.int32).max else torch.int64
        self._positions = positions.to(narrow) if len(stored) < size else None
        starts = plane.rows * torch.arange(plane.columns + 1, device=stored.device)
        ends = torch.searchsorted(positions, starts).tolist()
        self._runs = [(book, slice(ends[part.start], ends[part.stop])) for book, part in runs]
        if targets is None:
            self.latents, self._fixed = None, stored
            return
        kept = targets.reshape(-1) if self._positions is None else targets.reshape(-1)[self._positions]
        values = [_into_cells(kept[part], stored[part], book) for book, part in self._runs]
        rms = float(stored.square().mean().sqrt()) or 1.0
        self._units = [rms * 0.5 ** (book.bits - 1) if isinstance(book, Levels) else rms for book, _ in self._runs]
        parts = [part / unit for part, unit in zip(values, self._units, strict=True)]
        self.latents = nn.Parameter(torch.cat(parts))

    def stored(self, values: Tensor) -> Tensor:
        """Round values (kept,) to stored values, in the record's own units."""
        parts = zip(self.in_units(values), self._runs, strict=True)
        return torch.cat([book.round(part) for part, (book, _) in parts])

    def in_units(self, values: Tensor) -> list[Tensor]:
        """Return values (kept,) times their units, for each run of columns."""
        return [values[part] * unit for unit, (_, part) in zip(self._units, self._runs, strict=True)]

    def values(self) -> Tensor:
        """Return the stored values: float32 (kept,)."""
        return self._fixed if self.latents is None else _Rounded.apply(self.latents, self)

    def dense(self) -> Tensor:
        """Return the stored plane, with zeros for dropped entries: float32 (columns, rows)."""
        values = self.values()
        if self._positions is None:
            return values.view(self._shape)
        return values.new_zeros(self._shape).view(-1).index_put((self._positions,), values).view(self._shape)

    def fixed_tensors(self) -> list[Tensor]:
        """Return the tensors that training does not change: positions, and values that are not trained."""
        found = [self._positions, self._fixed if self.latents is None else None]
        return [tensor for tensor in found if tensor is not None]

    @torch.no_grad()
    def codes(self) -> list[np.ndarray]:
        """Return the packed codes of each run of columns."""
        values = self.values()
        return [book.pack(values[part]) for book, part in self._runs]


class TrainedDelta(nn.Module):
    """The trainable delta of one tensor, a matrix or a stack of them, as a parametrisation of the base's weight.

    Attributes:
        records: one record per matrix.
        log_factors: for each matrix, the logarithms of the factors on its column scales: float32 (rank,) for the
            singular values of a factored record; for a direct record (rows,) if its rows have scales, otherwise (1,).
    """

    def __init__(self, records: list[Record], name: str, exact: Tensor | None, device: torch.device):
        """Initialise with the numbers in the records.

        Args:
            records: the tensor's records.
            name: the tensor's name, for messages.
            exact: the exact delta, float32 (matrices, m, n), if kept values are trained; otherwise None.
            device: where all parameters are.
        """
        super().__init__()
        self.records = records
        self._used: list[MatrixDelta] | None = None
        self._scales = [_column_scales(record, device) for record in records]
        self.log_factors = nn.ParameterList([torch.zeros_like(scales) for scales in self._scales])
        self._planes: list[list[TrainedPlane]] = []
        for number, (record, scales) in enumerate(zip(records, self._scales, strict=True)):
            unscaled = replace(record, column_scales=[None] * len(record.segments))
            planes = decode_planes(unscaled, name, device)
            targets: list[Any] = [None] * len(planes)
            if exact is not None and len(record.codes):
                targets = _targets(record, [plane.dense() for plane in planes], scales, exact[number].to(device))
            columns = columns_of(record.segments)
            widths = zip(*(segment.widths() for segment in record.segments), strict=True)
            books = [[CODEBOOKS[width] for width in own] for own in widths]
            runs = [list(zip(own, columns, strict=True)) for own in books] or [[] for _ in planes]
            self._planes.append([TrainedPlane(*parts) for parts in zip(planes, runs, targets, strict=True)])
        self.planes = nn.ModuleList([plane for planes in self._planes for plane in planes])

    def deltas(self) -> list[MatrixDelta]:
        """Return the delta of each matrix with the current numbers, or within `using` those given there."""
        if self._used is not None:
            return self._used
        deltas: list[MatrixDelta] = []
        for planes, scales, log_factors in zip(self._planes, self._scales, self.log_factors, strict=True):
            parts, scale = [plane.dense() for plane in planes], scales * log_factors.exp()
            deltas.append(DirectDelta(parts[0], scale) if len(parts) == 1 else Factors(parts[0], scale, parts[1]))
        return deltas

    @contextmanager
    def using(self, deltas: list[MatrixDelta]) -> Iterator[None]:
        """Within this context, use these deltas, from `deltas`, instead of making them again at every call."""
        before, self._used = self._used, deltas
        try:
            yield
        finally:
            self._used = before

    def latents(self) -> list[Tensor]:
        """Return the parameters from which kept values are rounded; empty if these are not trained."""
        return [plane.latents for planes in self._planes for plane in planes if plane.latents is not None]

    def fixed_tensors(self) -> list[Tensor]:
        """Return the tensors of all planes that training does not change."""
        return [tensor for planes in self._planes for plane in planes for tensor in plane.fixed_tensors()]

    def forward(self, base: Tensor) -> Tensor:
        """Return base plus delta."""
        return base + self.matrices().view_as(base)

    def matrices(self) -> Tensor:
        """Return the delta with the current numbers: float32 (matrices, m, n)."""
        return torch.stack([delta.matrix() for delta in self.deltas()])

    def linear(self, inputs: Tensor, base: Tensor, bias: Tensor | None) -> Tensor:
        """Compute nn.Linear with the weight base plus delta, without forming the sum or a gradient of its size."""
        (delta,) = self.deltas()
        change = delta.multiply(inputs)
        return functional.linear(inputs, base, bias) + change

    def embedding(self, tokens: Tensor, base: Tensor, padding: int | None) -> Tensor:
        """Compute nn.Embedding with the weight base plus delta, of which only the tokens' rows are formed."""
        (delta,) = self.deltas()
        return functional.embedding(tokens, base, padding) + delta.rows(tokens)

    @torch.no_grad()
    def fold(self) -> list[Record]:
        """Write the trained numbers into the records and return them; the current numbers become the stored ones."""
        for number, factors in enumerate(self.log_factors):
            record = self.records[number]
            change = factors.double().exp().cpu().numpy()
            scale, sigma, column_scales = record.scale, record.sigma, record.column_scales
            if record.layout == FACTORED:
                exact = record.sigma * change
                # Scaled to a largest value of 1, the others stay within the range of float16.
                largest = float(np.abs(exact).max(initial=0.0)) or 1.0
                scale, sigma = scale * largest, (exact / largest).astype(np.float16)
            elif len(change) == 1:
                scale *= float(change[0])
            else:
                exact = np.concatenate([part for part in column_scales if part is not None], 1) * change
                largest = float(np.abs(exact).max(initial=0.0)) or 1.0
                scale *= largest
                stored = (exact / largest).astype(np.float16)
                column_scales = [stored[:, part] for part in columns_of(record.segments)]
            runs = zip(*(plane.codes() for plane in self._planes[number]), strict=True)
            codes = [side for run in runs for side in run]
            self.records[number] = replace(
                record,
                scale=float(np.float32(scale)),
                sigma=sigma,
                column_scales=column_scales,
                codes=np.concatenate(codes) if codes else record.codes,
            )
            self._scales[number] = _column_scales(self.records[number], factors.device)
            factors.zero_()
        return self.records


class StackedDeltas(nn.Module):
    """The trainable deltas of the tensors that become one stack of experts, as a parametrisation of that parameter.

    Attributes:
        deltas: by tensor name; the others have none.
    """

    def __init__(self, stack: ExpertStack):
        super().__init__()
        self._stack = stack
        self.deltas: dict[str, TrainedDelta] = {}

    def forward(self, base: Tensor) -> Tensor:
        """Return base plus deltas."""
        dense = {name: delta.matrices() for name, delta in self.deltas.items()}
        if self._stack.fused is None:
            dense = {name: matrices[0] for name, matrices in dense.items()}
        return base + self._stack.assembled(dense)


def _column_scales(record: Record, device: torch.device) -> Tensor:
    """Return a record's column scales times the record's scale: (rank,), or for a direct record (rows,) or (1,).

    Raises:
        ValueError: if only some rows of a direct record have scales, which no method writes.
    """
    given = [part for part in record.column_scales if part is not None]
    if record.layout == FACTORED:
        parts = zip(record.segments, record.column_scales, strict=True)
        both = [np.ones(s.columns) if scale is None else scale.astype(np.float64).prod(0) for s, scale in parts]
        scales = record.sigma.astype(np.float64) * (np.concatenate(both) if both else 1.0)
    elif given and len(given) < len(record.segments):
        raise ValueError("a direct record in which only some rows have scales cannot be trained: compress again")
    else:
        scales = np.concatenate(given, 1)[0].astype(np.float64) if given else np.ones(1)
    return torch.from_numpy((scales * record.scale).astype(np.float32)).to(device)


def _targets(record: Record, planes: list[Tensor], scales: Tensor, delta: Tensor) -> list[Tensor]:
    """Return the exact values that the planes of a record approximate, (columns, rows) each, in units of its levels.

    For a direct record these are the delta's entries, divided by scale times keep ratio, because scales include the
    rescaling for dropped entries. For a factored record, U is the least squares fit to the delta for the stored V, and
    V that for the stored U; each column is scaled so that the stored column approximates it best without a factor.
    """
    if len(planes) == 1:
        rows = scales * torch.from_numpy(record.keep_ratios()).to(delta)
        return [delta / torch.where(rows == 0, 1.0, rows)[:, None]]
    targets = []
    for one, other, matrix in ((planes[0], planes[1], delta), (planes[1], planes[0], delta.t())):
        best = least_squares(other, matrix, _DAMPING)
        kept = one != 0
        overlap = (best * kept * one).sum(1)
        unit = one.square().sum(1) / torch.where(overlap > 0, overlap, torch.inf)
        targets.append(best * unit[:, None])
    return targets
