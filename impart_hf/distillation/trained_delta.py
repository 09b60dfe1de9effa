"""A tensor's compressed delta with its stored numbers as parameters, and back to records of the same length."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..coding.factor_quantisation import least_squares
from ..coding.records import columns_of
from ..modeling.codebook import CODEBOOKS, Codebook, Levels
from ..modeling.delta_decode import decode_planes
from ..modeling.delta_record import FACTORED, Record
from ..modeling.factors import DirectDelta, Factors, MatrixDelta
from ..modeling.planes import Plane

_DAMPING = 1e-4  # of the least squares fit that training begins with


def _into_cells(wanted: Tensor, stored: Tensor, book: Codebook) -> Tensor:
    """The numbers nearest to the wanted ones that are stored as they are now."""
    if not isinstance(book, Levels):
        return stored
    endless = stored.new_tensor([torch.inf])
    edges = torch.cat([-endless, book.edges(stored.device), endless])
    cells = torch.bucketize(stored, edges[1:-1])
    # Not to the edge itself, where rounding may go either way
    inside = (
        1e-3 * (stored - edges[cells]).nan_to_num(posinf=0),
        1e-3 * (edges[cells + 1] - stored).nan_to_num(posinf=0),
    )
    return wanted.maximum(edges[cells] + inside[0]).minimum(edges[cells + 1] - inside[1])


class _Rounded(torch.autograd.Function):
    """Rounding to what is stored; the gradient goes straight through (Bengio et al., arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, plane: "_TrainedPlane") -> Tensor:
        ctx.plane = plane
        return plane.stored(latents)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return torch.cat(ctx.plane.in_units(gradients[0])), None


class _TrainedPlane(nn.Module):
    """The kept values of U, V or a direct plane.

    Attributes:
        latents: float32 (kept,), what rounds to the stored values, in units: by how much a value may be changed in
            training in the same time, which is the root mean square of all, halved for each bit of a code beyond the
            first, as its levels are closer together. A parameter if the values are trained, else None.
    """

    latents: Tensor | None

    def __init__(self, plane: Plane, runs: list[tuple[Codebook, slice]], wanted: Tensor | None):
        """Begin with the values that are stored.

        Args:
            plane: as decoded, without scales.
            runs: codebooks, and the columns that have them.
            wanted: float32 (columns, rows), what the values stand for: which of its neighbours a value is nearer to
                decides how easily it goes there. None if values are not trained.
        """
        super().__init__()
        stored, positions = plane.values(), plane.positions()
        self._shape = plane.columns, plane.rows
        self._positions = positions if len(stored) < plane.columns * plane.rows else None
        starts = plane.rows * torch.arange(plane.columns + 1, device=stored.device)
        ends = torch.searchsorted(positions, starts).tolist()
        self._runs = [(book, slice(ends[part.start], ends[part.stop])) for book, part in runs]
        if wanted is None:
            self.latents, self._fixed = None, stored
            return
        kept = wanted.reshape(-1) if self._positions is None else wanted.reshape(-1)[self._positions]
        values = [_into_cells(kept[part], stored[part], book) for book, part in self._runs]
        rms = float(stored.square().mean().sqrt()) or 1.0
        self._units = [rms * 0.5 ** (book.bits - 1) if isinstance(book, Levels) else rms for book, _ in self._runs]
        parts = [part / unit for part, unit in zip(values, self._units, strict=True)]
        self.latents = nn.Parameter(torch.cat(parts))

    def stored(self, values: Tensor) -> Tensor:
        """What of values (kept,) is stored, in the record's own units."""
        parts = zip(self.in_units(values), self._runs, strict=True)
        return torch.cat([book.round(part) for part, (book, _) in parts])

    def in_units(self, values: Tensor) -> list[Tensor]:
        """Of each run of columns, values (kept,) times their units."""
        return [values[part] * unit for unit, (_, part) in zip(self._units, self._runs, strict=True)]

    def values(self) -> Tensor:
        """float32 (kept,), as stored."""
        return self._fixed if self.latents is None else _Rounded.apply(self.latents, self)

    def dense(self) -> Tensor:
        """float32 (columns, rows), as stored, zeros where entries were dropped."""
        values = self.values()
        if self._positions is None:
            return values.view(self._shape)
        return values.new_zeros(self._shape).view(-1).index_put((self._positions,), values).view(self._shape)

    @torch.no_grad()
    def codes(self) -> list[np.ndarray]:
        """The packed codes of each run of columns."""
        values = self.values()
        return [book.pack(values[part]) for book, part in self._runs]


class TrainedDelta(nn.Module):
    """The trained delta of one tensor, a matrix or a stack of them: a parametrisation of the base's weight.

    Attributes:
        records: one for each matrix.
        log_factors: of each, the logarithms of the factors by which its scales change: float32 (rank,) for the singular
            values of a factored record; for a direct one (rows,) if its rows have scales, else (1,).
    """

    def __init__(self, records: list[Record], name: str, exact: Tensor | None, device: torch.device):
        """Begin with what records stand for.

        Args:
            records: of the tensor.
            name: its, for messages.
            exact: float32 (matrices, m, n), the delta that is compressed, if values are to be trained.
            device: of all parameters.
        """
        super().__init__()
        self.records = records
        self._scales = [_column_scales(record, device) for record in records]
        self.log_factors = nn.ParameterList([torch.zeros_like(scales) for scales in self._scales])
        self._planes: list[list[_TrainedPlane]] = []
        for number, (record, scales) in enumerate(zip(records, self._scales, strict=True)):
            unscaled = replace(record, column_scales=[None] * len(record.segments))
            planes = decode_planes(unscaled, name, device)
            wanted: list[Any] = [None] * len(planes)
            if exact is not None and len(record.codes):
                wanted = _wanted(record, [plane.dense() for plane in planes], scales, exact[number].to(device))
            columns = columns_of(record.segments)
            widths = zip(*(segment.widths() for segment in record.segments), strict=True)
            books = [[CODEBOOKS[width] for width in own] for own in widths]
            runs = [list(zip(own, columns, strict=True)) for own in books] or [[] for _ in planes]
            self._planes.append([_TrainedPlane(*parts) for parts in zip(planes, runs, wanted, strict=True)])
        self.planes = nn.ModuleList([plane for planes in self._planes for plane in planes])

    def _deltas(self) -> list[MatrixDelta]:
        """The delta of each matrix, by the numbers in force."""
        found: list[MatrixDelta] = []
        for planes, scales, log_factors in zip(self._planes, self._scales, self.log_factors, strict=True):
            parts, scale = [plane.dense() for plane in planes], scales * log_factors.exp()
            found.append(DirectDelta(parts[0], scale) if len(parts) == 1 else Factors(parts[0], scale, parts[1]))
        return found

    def latents(self) -> list[Tensor]:
        """The parameters that kept values are rounded from, if these are trained."""
        return [plane.latents for planes in self._planes for plane in planes if plane.latents is not None]

    def forward(self, base: Tensor) -> Tensor:
        """Base plus delta."""
        return base + torch.stack([delta.matrix() for delta in self._deltas()]).view_as(base)

    def linear(self, inputs: Tensor, base: Tensor, bias: Tensor | None) -> Tensor:
        """nn.Linear with base plus delta as its weight; neither the sum is formed nor a gradient of its size."""
        (delta,) = self._deltas()
        change = delta.multiply(inputs)
        return functional.linear(inputs, base, bias) + change

    def embedding(self, tokens: Tensor, base: Tensor, padding: int | None) -> Tensor:
        """nn.Embedding with base plus delta as its weight, of which only the tokens' own rows are formed."""
        (delta,) = self._deltas()
        return functional.embedding(tokens, base, padding) + delta.rows(tokens)

    @torch.no_grad()
    def fold(self) -> list[Record]:
        """The records with what was learned in them; from here on, the numbers in force are those that these store."""
        for number, factors in enumerate(self.log_factors):
            record = self.records[number]
            change = factors.double().exp().cpu().numpy()
            scale, sigma, column_scales = record.scale, record.sigma, record.column_scales
            if record.layout == FACTORED:
                exact = record.sigma * change
                # With 1 for the largest, the others stay as far from the ends of float16 as they were
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


def _column_scales(record: Record, device: torch.device) -> Tensor:
    """The column scales of a record, its own scale included: (rank,), or of a direct record (rows,) or (1,).

    Raises:
        ValueError: if some rows of a direct record have scales and others none, as no method writes it.
    """
    given = [part for part in record.column_scales if part is not None]
    if record.layout == FACTORED:
        parts = zip(record.segments, record.column_scales, strict=True)
        both = [np.ones(s.columns) if scale is None else scale.astype(np.float64).prod(0) for s, scale in parts]
        scales = record.sigma.astype(np.float64) * (np.concatenate(both) if both else 1.0)
    elif given and len(given) < len(record.segments):
        raise ValueError("a direct record of which only some rows have scales cannot be trained")
    else:
        scales = np.concatenate(given, 1)[0].astype(np.float64) if given else np.ones(1)
    return torch.from_numpy((scales * record.scale).astype(np.float32)).to(device)


def _wanted(record: Record, planes: list[Tensor], scales: Tensor, delta: Tensor) -> list[Tensor]:
    """What the planes of a record stand for, (columns, rows) each, in the units of its levels.

    A direct record's are the delta's own entries, less what its scales make up for where masks drop others. Of a
    factored one U is what goes best with the stored V, and the other way round, each column in the unit in which the
    stored one is its own best approximation.
    """
    if len(planes) == 1:
        rows = scales * torch.from_numpy(record.keep_ratios()).to(delta)
        return [delta / torch.where(rows == 0, 1.0, rows)[:, None]]
    found = []
    for one, other, matrix in ((planes[0], planes[1], delta), (planes[1], planes[0], delta.t())):
        best = least_squares(other, matrix, _DAMPING)
        kept = one != 0
        overlap = (best * kept * one).sum(1)
        unit = one.square().sum(1) / torch.where(overlap > 0, overlap, torch.inf)
        found.append(best * unit[:, None])
    return found
