"""A tensor's compressed delta with its stored numbers as parameters, and back to records of the same length."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..coding.factor_quantisation import least_squares
from ..coding.records import columns_of, midpoints, nearest_normal, value_codes
from ..modeling.delta_decode import Plane, decode_planes, normal_levels
from ..modeling.delta_record import BFLOAT16, FACTORED, FLOAT16, NORMAL_LEVELS, Record, code_bits

_DAMPING = 1e-4  # of the least squares fit that training begins with
_FLOATS = {FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}


def nearest_stored(values: Tensor, width: int) -> Tensor:
    """The nearest numbers that codes of a width stand for, float32."""
    if width in _FLOATS:
        return values.to(_FLOATS[width]).float()
    if width in NORMAL_LEVELS:
        return normal_levels(width, values.device)[nearest_normal(values, width).int()]
    top = (1 << width) - 1
    return ((values + 1) * (top / 2)).round_().clamp_(0, top).mul_(2 / top).sub_(1)


def _into_cells(wanted: Tensor, stored: Tensor, width: int) -> Tensor:
    """The numbers nearest to the wanted ones that are stored as they are now."""
    if width in _FLOATS:
        return stored
    if width in NORMAL_LEVELS:
        levels = normal_levels(width, stored.device)
    else:
        levels = torch.linspace(-1, 1, 1 << width, device=stored.device)
    endless = levels.new_tensor([torch.inf])
    edges = torch.cat([-endless, midpoints(levels), endless])
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

    def __init__(self, plane: Plane, runs: list[tuple[int, slice]], wanted: Tensor | None):
        """Begin with the values that are stored.

        Args:
            plane: as decoded, without scales.
            runs: width codes, and the columns that have them.
            wanted: float32 (columns, rows), what the values stand for: which of its neighbours a value is nearer to
                decides how easily it goes there. None if values are not trained.
        """
        super().__init__()
        stored, positions = plane.values(), plane.positions()
        self._shape = plane.columns, plane.rows
        self._positions = positions if len(stored) < plane.columns * plane.rows else None
        starts = plane.rows * torch.arange(plane.columns + 1, device=stored.device)
        ends = torch.searchsorted(positions, starts).tolist()
        self._runs = [(width, slice(ends[part.start], ends[part.stop])) for width, part in runs]
        if wanted is None:
            self.latents, self._fixed = None, stored
            return
        kept = wanted.reshape(-1) if self._positions is None else wanted.reshape(-1)[self._positions]
        values = [_into_cells(kept[part], stored[part], width) for width, part in self._runs]
        rms = float(stored.square().mean().sqrt()) or 1.0
        self._units = [rms if width in _FLOATS else rms * 0.5 ** (code_bits(width) - 1) for width, _ in self._runs]
        parts = [part / unit for part, unit in zip(values, self._units, strict=True)]
        self.latents = nn.Parameter(torch.cat(parts))

    def stored(self, values: Tensor) -> Tensor:
        """What of values (kept,) is stored, in the record's own units."""
        parts = zip(self.in_units(values), self._runs, strict=True)
        return torch.cat([nearest_stored(part, width) for part, (width, _) in parts])

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
        return [value_codes(values[part], width) for width, part in self._runs]


class TrainedDelta(nn.Module):
    """The trained delta of one tensor, a matrix or a stack of them: a parametrisation of the base's weight.

    Attributes:
        records: one for each matrix.
        log_factors: of each, the logarithms of the factors by which its sizes change: float32 (rank,) for the singular
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
        self._sizes = [_sizes(record, device) for record in records]
        self.log_factors = nn.ParameterList([torch.zeros_like(sizes) for sizes in self._sizes])
        self._planes: list[list[_TrainedPlane]] = []
        for number, (record, sizes) in enumerate(zip(records, self._sizes, strict=True)):
            unscaled = replace(record, column_scales=[None] * len(record.segments))
            planes = decode_planes(unscaled, name, device)
            wanted: list[Any] = [None] * len(planes)
            if exact is not None and len(record.codes):
                wanted = _wanted(record, [plane.dense() for plane in planes], sizes, exact[number].to(device))
            columns = columns_of(record.segments)
            widths = zip(*(segment.widths() for segment in record.segments), strict=True)
            runs = [list(zip(own, columns, strict=True)) for own in widths] or [[] for _ in planes]
            self._planes.append([_TrainedPlane(*parts) for parts in zip(planes, runs, wanted, strict=True)])
        self.planes = nn.ModuleList([plane for planes in self._planes for plane in planes])

    def _parts(self) -> list[tuple[list[Tensor], Tensor]]:
        """Of each matrix, the planes and the sizes in force."""
        factors = [sizes * factor.exp() for sizes, factor in zip(self._sizes, self.log_factors, strict=True)]
        return [([p.dense() for p in planes], sizes) for planes, sizes in zip(self._planes, factors, strict=True)]

    def latents(self) -> list[Tensor]:
        """The parameters that kept values are rounded from, if these are trained."""
        return [plane.latents for planes in self._planes for plane in planes if plane.latents is not None]

    def forward(self, base: Tensor) -> Tensor:
        """Base plus delta."""
        deltas = [
            planes[0] * sizes[:, None] if len(planes) == 1 else (planes[0].t() * sizes) @ planes[1]
            for planes, sizes in self._parts()
        ]
        return base + torch.stack(deltas).view_as(base)

    def linear(self, inputs: Tensor, base: Tensor, bias: Tensor | None) -> Tensor:
        """nn.Linear with base plus delta as its weight; neither the sum is formed nor a gradient of its size."""
        ((planes, sizes),) = self._parts()
        inner = functional.linear(inputs, planes[-1])
        delta = inner * sizes if len(planes) == 1 else (inner * sizes) @ planes[0]
        return functional.linear(inputs, base, bias) + delta

    def embedding(self, tokens: Tensor, base: Tensor, padding: int | None) -> Tensor:
        """nn.Embedding with base plus delta as its weight, of which only the tokens' own rows are formed."""
        ((planes, sizes),) = self._parts()
        if len(planes) == 1:
            delta = functional.embedding(tokens, planes[0] * sizes[:, None])
        else:
            delta = (functional.embedding(tokens, planes[0].t()) * sizes) @ planes[1]
        return functional.embedding(tokens, base, padding) + delta

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
            self._sizes[number] = _sizes(self.records[number], factors.device)
            factors.zero_()
        return self.records


def _sizes(record: Record, device: torch.device) -> Tensor:
    """What the levels of a record's columns are multiplied by: (rank,), or of a direct record (rows,) or (1,).

    Raises:
        ValueError: if some rows of a direct record have scales and others none, as no method writes it.
    """
    scales = [part for part in record.column_scales if part is not None]
    if record.layout == FACTORED:
        parts = zip(record.segments, record.column_scales, strict=True)
        both = [np.ones(s.columns) if scale is None else scale.astype(np.float64).prod(0) for s, scale in parts]
        sizes = record.sigma.astype(np.float64) * (np.concatenate(both) if both else 1.0)
    elif scales and len(scales) < len(record.segments):
        raise ValueError("a direct record of which only some rows have scales cannot be trained")
    else:
        sizes = np.concatenate(scales, 1)[0].astype(np.float64) if scales else np.ones(1)
    return torch.from_numpy((sizes * record.scale).astype(np.float32)).to(device)


def _wanted(record: Record, planes: list[Tensor], sizes: Tensor, delta: Tensor) -> list[Tensor]:
    """What the planes of a record stand for, (columns, rows) each, in the units of its levels.

    A direct record's are the delta's own entries, less what its sizes make up for where masks drop others. Of a
    factored one U is what goes best with the stored V, and the other way round, each column in the unit in which the
    stored one is its own best approximation.
    """
    if len(planes) == 1:
        rows = sizes * torch.from_numpy(record.keep_ratios()).to(delta)
        return [delta / torch.where(rows == 0, 1.0, rows)[:, None]]
    found = []
    for one, other, matrix in ((planes[0], planes[1], delta), (planes[1], planes[0], delta.t())):
        best = least_squares(other, matrix, _DAMPING)
        kept = one != 0
        overlap = (best * kept * one).sum(1)
        unit = one.square().sum(1) / torch.where(overlap > 0, overlap, torch.inf)
        found.append(best * unit[:, None])
    return found
