"""What a compression costs beside its matrices' decomposition: reading, the price of a byte, calibration, training."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..calibration.layer_stream import Moments, stream_layers
from ..calibration.streamed_model import StreamedModel
from ..common.progress import Progress
from ..methods import MethodConfig, Spectrum
from ..modeling.base_tensors import BaseTensors
from ..modeling.tensors import Model
from .compatibility import vocabulary_size
from .matrix_timing import MatrixKind
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


def price_seconds(
    method: MethodConfig, kinds: Iterable[tuple[MatrixKind, int]], share: float, clock: Clock = time.perf_counter
) -> float:
    """Return the time in which a method with `shares_budget` finds the bytes of all matrices, from a part of them.

    Args:
        kinds: the kinds of all matrices that share, and how many there are of each.
        share: bytes of the records, relative to the entries of the dense matrices.
    """
    spectra: list[Spectrum] = []
    total = taken = entries = 0
    for kind, count in kinds:
        rank = min(kind.rows, kind.columns)
        total += count * rank
        for _ in range(count):
            if taken and taken + rank > _PRICED:
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


def training_speed(device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Return how many operations a second training makes, about: from products of float32 matrices."""
    matrix = torch.randn(_SIDE, _SIDE, device=device)
    float((matrix @ matrix)[0, 0])
    started = clock()
    for _ in range(_PRODUCTS):
        product = matrix @ matrix
    float(product[0, 0])  # waits for a GPU
    return _TRAINING_SPEED * _PRODUCTS * 2 * _SIDE**3 / max(clock() - started, 1e-9)
