"""What matrices cost: a few are timed, the cost of all others follows from their shapes.

A decomposition takes about m n min(m, n) operations, and other work on a matrix about m n. A matrix that is too large
for the time there is, is timed by crops of its shape.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..coding.spectrum import singular_values
from ..evaluation.memory import PeakMemory, anonymous_bytes
from ..methods import MethodConfig, method_for
from ..modeling.delta_decode import add_delta
from ..modeling.delta_record import FACTORED, parse_stack
from .budgets import Delta
from .encoding import mask_seed
from .pair import ModelPair
from .scan import TensorPlan

# The shorter side of a first crop, and the most that a side grows from there: a matrix up to it is timed whole.
_FIRST, _WHOLE = 512, 1024
# Below this shorter side, decompositions take another route (coding/svd.py).
_ROUTE = 1024
_GROWTH = 1.25  # the least growth of a side that is worth another crop
_MOST_SAMPLES = 4  # whole matrices of a kind
_FLOAT = 4  # bytes of a float32
# Returns a part of the matrices of a kind with so many rows and columns: base and fine-tuned, in the models' dtypes,
# and the seed of the matrix's masks; successive numbers may choose other matrices.
Source = Callable[["MatrixKind", int, int, int], tuple[torch.Tensor, torch.Tensor, int]]


@dataclass(frozen=True)
class MatrixKind:
    """Matrices that cost about the same.

    Attributes:
        rows, columns: their shape.
        vocabulary: whether they have a row for every token.
        calibrated: whether calibration gives the second moments of their inputs.
        transposed: whether these inputs belong to the rows.
    """

    rows: int
    columns: int
    vocabulary: bool = False
    calibrated: bool = False
    transposed: bool = False

    @property
    def work(self) -> float:
        return float(self.rows) * self.columns * min(self.rows, self.columns)

    def crop(self, shorter: int) -> tuple[int, int]:
        """Return the shape of a part with a shorter side of this length, and the same aspect."""
        share = min(1.0, shorter / min(self.rows, self.columns))
        return max(1, round(self.rows * share)), max(1, round(self.columns * share))


def kind_of(tensor: TensorPlan, calibrated: bool = False, transposed: bool = False) -> MatrixKind:
    """Return the kind of a tensor's matrices."""
    rows, columns = tensor.shape[-2:]
    return MatrixKind(rows, columns, tensor.vocabulary, calibrated, calibrated and transposed)


@dataclass(frozen=True)
class Cost:
    """What one matrix, or a part of it, costs.

    Attributes:
        spectrum, encoding, decoding: seconds for its singular values, if the method needs those of all matrices at
            first; for everything else until its record; for decoding that, if calibration does.
        peak: bytes of memory at the most.
        fill: bytes of the record, relative to its budget.
        rank: stored components, relative to the shorter side; 0 for a record of another kind.
    """

    spectrum: float
    encoding: float
    decoding: float
    peak: float
    fill: float = 1.0
    rank: float = 0.0

    @property
    def seconds(self) -> float:
        return self.spectrum + self.encoding + self.decoding


@dataclass(frozen=True)
class Sample:
    """The cost of a part of a matrix."""

    rows: int
    columns: int
    cost: Cost


Timed = Callable[[MatrixKind, int, int, int], Cost]  # times a part of a kind, as `Source` chooses it


def extrapolated(samples: Sequence[tuple[int, int, float]], rows: int, columns: int) -> float:
    """Return the seconds that a matrix takes: a m n + b m n min(m, n), with a and b not below 0 from samples.

    Args:
        samples: rows, columns and seconds, at least one. One alone, or several of one shape, tell b only.
    """

    def terms(m: float, n: float) -> list[float]:
        return [m * n, m * n * min(m, n)]

    if not any(s for _, _, s in samples):
        return 0.0
    # Relative errors count, so that small samples do, too.
    table = np.array([terms(m, n) for m, n, _ in samples])
    seconds = np.maximum([s for _, _, s in samples], 1e-9)
    target = np.array(terms(rows, columns))
    if len({(m, n) for m, n, _ in samples}) > 1:
        fit, *_ = np.linalg.lstsq(table / seconds[:, None], np.ones(len(samples)), rcond=None)
        if (fit >= 0).all():
            return float(fit @ target)
    # Of the terms, the one that explains the samples better alone.
    scaled = table / seconds[:, None]
    single = scaled.sum(0) / np.square(scaled).sum(0)
    errors = np.square(scaled * single - 1).sum(0)
    best = 1 if errors[1] <= errors[0] else 0
    return float(single[best] * target[best])


class MatrixCosts:
    """Costs of matrices of all shapes, from samples of some."""

    def __init__(self, samples: dict[MatrixKind, list[Sample]]):
        self.samples = samples

    def of(self, kind: MatrixKind) -> Cost:
        """Return the cost of a matrix of this kind."""
        samples = self.samples.get(kind) or self.samples[self._nearest(kind)]
        # Parts that are decomposed by another route tell little.
        largest = max(min(s.rows, s.columns) for s in samples)
        samples = [s for s in samples if (min(s.rows, s.columns) >= _ROUTE) == (largest >= _ROUTE)]

        def seconds(part: str) -> float:
            return extrapolated([(s.rows, s.columns, getattr(s.cost, part)) for s in samples], kind.rows, kind.columns)

        last = max(samples, key=lambda s: s.rows * s.columns).cost
        area = max(s.cost.peak / (s.rows * s.columns) for s in samples)
        peak = area * kind.rows * kind.columns
        fills = [s.cost.fill for s in samples if s.rows * s.columns == max(t.rows * t.columns for t in samples)]
        fill = sum(fills) / len(fills)
        return Cost(seconds("spectrum"), seconds("encoding"), seconds("decoding"), peak, fill, last.rank)

    def _nearest(self, kind: MatrixKind) -> MatrixKind:
        def distance(other: MatrixKind) -> tuple[bool, bool, float]:
            return (
                other.vocabulary != kind.vocabulary,
                other.calibrated != kind.calibrated,
                abs(np.log(other.work / kind.work)),
            )

        return min(self.samples, key=distance)


def time_matrices(
    counts: dict[MatrixKind, int], timed: Timed, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> MatrixCosts:
    """Time matrices for about so many seconds, the most costly kinds first and at least one.

    Args:
        counts: number of matrices of each kind.
        timed: times a part of a kind.
        clock: seconds since any time.
    """
    samples: dict[MatrixKind, list[Sample]] = {}
    kinds = sorted(counts, key=lambda kind: kind.work * counts[kind], reverse=True)
    if not kinds:
        return MatrixCosts({})

    def take(kind: MatrixKind, rows: int, columns: int, number: int = 0) -> None:
        samples.setdefault(kind, []).append(Sample(rows, columns, timed(kind, rows, columns, number)))

    smallest = min(kinds, key=lambda kind: kind.work)
    timed(smallest, *smallest.crop(_FIRST // 4), 0)  # what is done once in a process is not counted
    end = clock() + seconds
    for kind in kinds:
        if not samples or clock() < end:
            whole = min(kind.rows, kind.columns) <= _WHOLE
            take(kind, *((kind.rows, kind.columns) if whole else kind.crop(_FIRST)))
    todo = [kind for kind in reversed(kinds) if kind in samples]  # what costs little first: the last has what is left
    for number in range(1, _MOST_SAMPLES):
        for at, kind in enumerate(todo):
            left, last = end - clock(), samples[kind][-1]
            if (last.rows, last.columns) == (kind.rows, kind.columns):
                if counts[kind] > number and last.cost.seconds <= left / len(todo[at:]):
                    take(kind, kind.rows, kind.columns, number)
                continue
            weights = [k.work * counts[k] for k in todo[at:]]
            allowed = max(0.0, left * weights[0] / sum(weights))
            growth = (allowed / max(last.cost.seconds, 1e-9)) ** (1 / 3)
            if growth >= _GROWTH:
                take(kind, *kind.crop(int(min(last.rows, last.columns) * growth)))
    return MatrixCosts(samples)


class MatrixTimer:
    """Times what a compression does to a matrix."""

    def __init__(
        self,
        source: Source,
        method: MethodConfig,
        share: float,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Set up the timing; arguments beside these as for `time_matrices`.

        Args:
            source: gives parts of matrices.
            method: the method, with its ratio.
            share: bytes of a record's budget, relative to those of the dense matrix.
        """
        self._source, self._method, self._share, self._device, self._clock = source, method, share, device, clock

    def __call__(self, kind: MatrixKind, rows: int, columns: int, number: int) -> Cost:
        """Return the cost of a part of a kind."""
        if resident_bytes() is None:
            return self._timed(kind, rows, columns, number)
        with PeakMemory() as memory:
            cost = self._timed(kind, rows, columns, number)
        return replace(cost, peak=max(memory.bytes, cost.peak))

    def _timed(self, kind: MatrixKind, rows: int, columns: int, number: int) -> Cost:
        before, after, seed = self._source(kind, rows, columns, number)
        encoder = method_for(self._method, kind.vocabulary)
        budget = max(int(self._share * rows * columns * after.element_size()), encoder.least_bytes(rows, columns))
        hessian = _hessian(rows if kind.transposed else columns, self._device) if kind.calibrated else None
        sigma, times = None, [self._now()]
        if encoder is self._method and self._method.shares_budget:
            sigma = singular_values(self._delta(before, after, kind).matrix)
        times.append(self._now())
        delta = self._delta(before, after, kind)
        data = encoder.encode(
            delta.matrix, budget, seed,
            hessian=hessian, sigma=sigma, relative_norm=delta.relative_norm,
            vocabulary=kind.vocabulary, transposed=kind.transposed,
        ).data  # fmt: skip
        times.append(self._now())
        if hessian is not None:
            add_delta(before.to(self._device), np.frombuffer(data, np.uint8), "sample", after.dtype)
        times.append(self._now())
        spectrum, encoding, decoding = np.diff(times)
        peak = 2 * _FLOAT * rows * columns  # the least, if nothing else is known: delta and one copy
        return Cost(
            float(spectrum), float(encoding), float(decoding), peak, len(data) / budget, _rank(data, min(after.shape))
        )

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()

    def _delta(self, before: torch.Tensor, after: torch.Tensor, kind: MatrixKind) -> Delta:
        delta = Delta.of(before, after, kind.vocabulary, self._device)
        if delta.is_nonzero:
            return delta
        # Of rows that did not change, others tell more.
        other = torch.randn(delta.matrix.shape, generator=torch.Generator().manual_seed(0)).to(self._device)
        return replace(delta, matrix=other)


def pair_source(pair: ModelPair, kinds: dict[str, MatrixKind], seed: int) -> Source:
    """Return a function that gives parts of a pair's matrices: rows that are evenly spaced, and the first columns.

    Args:
        kinds: the kind of each tensor to encode.
        seed: the method's seed.
    """

    def part(kind: MatrixKind, rows: int, columns: int, number: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        names = [name for name, other in kinds.items() if other == kind]
        # From the middle of the model outwards.
        name = names[(len(names) // 2 + number * max(1, len(names) // 4)) % len(names)]
        before = pair.base.tensor(name)
        after = pair.finetuned.tensor(name)[: before.shape[0]]
        parts = (t.reshape(-1, kind.rows, kind.columns)[0, :: kind.rows // rows] for t in (before, after))
        one, other = (t[:rows, :columns] for t in parts)
        return one, other, mask_seed(seed, name, 0)

    return part


def resident_bytes() -> int | None:
    """Return the memory of this process without mapped files, in bytes; None where the system does not tell."""
    try:
        return anonymous_bytes()
    except OSError:
        return None


def _hessian(order: int, device: torch.device) -> torch.Tensor:
    """Return second moments of the kind that inputs have: few directions above a floor."""
    inputs = torch.randn(64, order, generator=torch.Generator().manual_seed(0)).to(device)
    return (inputs.t() @ inputs / 64).diagonal_scatter(torch.full((order,), 2.0, device=device))


def _rank(data: bytes, most: int) -> float:
    """Return the share of components that a record stores, of `most`; 0 if it stores none as such."""
    record = parse_stack(np.frombuffer(data, np.uint8), "sample")[0]
    return record.rank / most if record.layout == FACTORED else 0.0
