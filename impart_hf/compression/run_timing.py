"""What a compression costs beside its matrices' decomposition: reading, the price of a byte, calibration, training."""

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..calibration.layer_stream import Moments, stream_layers
from ..calibration.sensitivity import enough_of
from ..calibration.streamed_model import StreamedModel
from ..common.progress import Progress
from ..distillation import DistillSettings
from ..methods import MethodConfig, Spectrum
from ..modeling.base_tensors import BaseTensors
from ..modeling.tensors import Model
from .budgets import sharing
from .compatibility import vocabulary_size
from .matrix_timing import Cost, MatrixKind
from .plan import CompressionPlan
from .scan import TensorPlan, scan_tensor

Clock = Callable[[], float]

_SCANNED_BYTES = 256 << 20  # of both models together, at most
_PRICED = 1 << 18  # the most components whose price is found
_FIRST_TOKENS, _LAYER_SECONDS = 64, 1.5
_SIDE, _PRODUCTS = 1024, 24  # of the matrices whose product is timed
# Of the speed of a large product alone, what training reaches: layers have smaller products and other work between.
_TRAINING_SPEED = 0.7


def scan_rate(
    tensors: list[TensorPlan], base: BaseTensors, finetuned: Model, clock: Clock = time.perf_counter
) -> float:
    """Return how many bytes of both models are scanned in a second; the sample is spread over all sizes."""
    by_size = sorted(tensors, key=lambda tensor: tensor.dense_bytes)
    done = {by_size[len(by_size) * part // 9].name: 0 for part in range(9)}
    scanned_bytes, seconds, tokens = 0, 0.0, vocabulary_size(finetuned)
    for tensor in by_size:
        size = 2 * (tensor.dense_bytes + tensor.added_bytes)
        if tensor.name in done and (not scanned_bytes or scanned_bytes + size <= _SCANNED_BYTES):
            started = clock()
            scan_tensor(tensor.name, base, finetuned, tokens)
            seconds += clock() - started
            scanned_bytes += size
    return scanned_bytes / max(seconds, 1e-9)


def counts_of(tensors: Iterable[TensorPlan], kinds: Mapping[str, MatrixKind]) -> dict[MatrixKind, int]:
    """Return the number of matrices of each kind in tensors.

    Args:
        kinds: the kind of each tensor.
    """
    counts: Counter[MatrixKind] = Counter()
    for tensor in tensors:
        counts[kinds[tensor.name]] += tensor.matrices
    return dict(counts)


def allocation_seconds(
    tensors: list[TensorPlan], kinds: Mapping[str, MatrixKind], method: MethodConfig, most: int = _PRICED
) -> float:
    """Return the time in which the budget of those of the tensors that share it is shared out among their matrices.

    Args:
        kinds: the kind of each tensor.
        most: as for `price_seconds`.
    """
    shared = sharing(tensors, method)
    entries = sum(t.dense_bytes // t.dtype.itemsize for t in shared)
    share = sum(t.max_bytes for t in shared) / max(1, entries)
    return price_seconds(method, counts_of(shared, kinds).items(), share, most=most)


def price_seconds(
    method: MethodConfig,
    kinds: Iterable[tuple[MatrixKind, int]],
    share: float,
    clock: Clock = time.perf_counter,
    most: int = _PRICED,
) -> float:
    """Return the time in which a method with `shares_budget` finds the bytes of all matrices, from a part of them.

    Args:
        kinds: the kinds of all matrices that share, and how many there are of each.
        share: bytes of the records, relative to the entries of the dense matrices.
        most: the most components whose price is found, except that a whole matrix is taken.
    """
    spectra: list[Spectrum] = []
    total = taken = entries = 0
    for kind, count in kinds:
        rank = min(kind.rows, kind.columns)
        total += count * rank
        for _ in range(count):
            if taken and taken + rank > most:
                break
            # As most fine-tunes' singular values fall, and no two matrices alike.
            sigma = (1 + 0.37 * (len(spectra) % 97)) * np.arange(1, rank + 1) ** -0.5
            spectra.append(Spectrum(sigma, kind.rows, kind.columns, float(np.square(sigma).sum()), kind.vocabulary))
            taken, entries = taken + rank, entries + kind.rows * kind.columns
    if not spectra:
        return 0.0
    started = clock()
    method.allocate(spectra, int(share * entries))
    return (clock() - started) * total / taken


class _Enough(Exception):
    """Raised to end calibration after its first layer."""


def layer_seconds(
    stream: StreamedModel, finetuned: Model, tokens: torch.Tensor, clock: Clock = time.perf_counter
) -> float:
    """Return the time that calibration takes for one decoder layer and all tokens, without encoding.

    The real calibration runs for the first layer, on few tokens, and then on as many as there is time for.
    """

    def timed(part: torch.Tensor) -> float:
        first, *others = list(stream.layers)
        inside, after = set(stream.names_in(first)), set(stream.names_in(others[0]) if others else ())
        started: list[float] = []

        def compressed(name: str, moments: Moments) -> torch.Tensor:
            if isinstance(moments, Sequence):
                for _ in moments:  # computed when they are asked for
                    pass
            if name in inside and not started:
                started.append(clock())
            if name in after:
                raise _Enough
            return finetuned.tensor(name)

        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Enough):
            stream_layers(stream.another(), part, compressed, Path(folder), progress=Progress(False))
        return clock() - started[0]

    count, length = tokens.shape
    fewer = tokens[:1, : min(length, _FIRST_TOKENS)]
    least = timed(fewer)
    if fewer.numel() == tokens.numel():
        return least
    most = int(_LAYER_SECONDS / max(least, 1e-9) * fewer.numel())
    part = tokens[: max(1, most // length), : max(1, min(length, most))]
    if part.numel() <= fewer.numel():
        return least * tokens.numel() / fewer.numel()
    per_token = max(0.0, (timed(part) - least) / (part.numel() - fewer.numel()))
    return least + per_token * (tokens.numel() - fewer.numel())


def training_speed(device: torch.device, clock: Clock = time.perf_counter, products: int = _PRODUCTS) -> float:
    """Return how many operations a second training makes, about: from some products of float32 matrices."""
    matrix = torch.randn(_SIDE, _SIDE, generator=torch.Generator().manual_seed(0)).to(device)
    float((matrix @ matrix)[0, 0])
    started = clock()
    for _ in range(products):
        product = matrix @ matrix
    float(product[0, 0])  # waits for a GPU
    return _TRAINING_SPEED * products * 2 * _SIDE**3 / max(clock() - started, 1e-9)


def training_operations(
    plan: CompressionPlan,
    tokens: torch.Tensor,
    settings: DistillSettings,
    model_config: Mapping[str, Any],
    cost: Mapping[str, Cost],
) -> float:
    """Return about how many operations distillation takes: of products of matrices, except attention's.

    A step runs the fine-tune and the compressed model forward, the latter backward for inputs and for weights, and
    makes the deltas out of their factors. Held-out sequences are run forward by both, before the first step and at
    every check.

    Args:
        tokens: those to distil on, (sequences, length).
        cost: what a matrix of each tensor to encode costs.
    """
    sequences, length = tokens.shape
    weights = sum(t.dense_bytes / t.dtype.itemsize * used_share(t.name, model_config) for t in _matrices(plan))
    decoded = sum(2.0 * t.work * cost[t.name].rank for t in plan.encoded)
    held_out = max(1, round(sequences * settings.validation_share))
    step = 8 * weights * settings.batch_size * length + 3 * decoded
    check = 4 * weights * held_out * length + decoded
    return settings.steps * step + (settings.checks + 1) * check


def sensitivity_operations(plan: CompressionPlan, calibration: torch.Tensor) -> float:
    """Return the operations in which sensitivity is measured: two passes forward, and one backward, of two."""
    parameters = sum(t.dense_bytes // t.dtype.itemsize for t in plan.tensors if len(t.shape) >= 2)
    return 4 * 2.0 * parameters * enough_of(calibration).numel()


def _matrices(plan: CompressionPlan) -> list[TensorPlan]:
    """Return the tensors that multiply: all matrices, but of those with a row for every token only one."""
    matrices = [t for t in plan.tensors if len(t.shape) >= 2]
    vocabulary = [t for t in matrices if t.vocabulary]
    return [t for t in matrices if not t.vocabulary] + vocabulary[:1]


def used_share(name: str, model_config: Mapping[str, Any]) -> float:
    """Return the share of a tensor that a token uses: of experts, those that it is sent to."""
    text = model_config.get("text_config") or model_config
    experts = text.get("num_experts") or text.get("num_local_experts") or text.get("n_routed_experts")
    used = text.get("num_experts_per_tok")
    return used / experts if experts and used and ".experts." in name else 1.0
