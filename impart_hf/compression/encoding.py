"""Encoding of planned tensors into records in a workspace."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from ..calibration.layer_stream import Moments
from ..calibration.streamed_model import StreamedModel
from ..coding.records import empty_record
from ..coding.svd_cache import SvdOf, uncached_svd
from ..common import processes
from ..methods import Encoded, EncodingTask, MethodConfig, Spectrum, method_for
from ..modeling.base_tensors import BaseTensors
from ..modeling.delta_decode import add_delta
from ..modeling.tensors import Model
from ..storage.workspace import Workspace
from .batches import Batches
from .budgets import deltas_of, spectra_of
from .pair import ModelPair
from .scan import TensorPlan, order_to_take
from .stages import COMPRESSING

# The note on a tensor that the text was to calibrate, and that hardly any of its tokens reach.
NOT_REACHED = "not calibrated: too few tokens of the text reach it"


class Encoding:
    """Encodes a pair's tensors into a workspace, each once, in any order.

    Attributes:
        bar: the progress, in units of the tensors' work; the caller begins it.
    """

    def __init__(
        self,
        pair: ModelPair,
        encoded: list[TensorPlan],
        method: MethodConfig,
        workspace: Workspace,
        svd_of: SvdOf,
        budgets: dict[str, list[int]],
        stream: StreamedModel | None = None,
        work: Mapping[str, float] = MappingProxyType({}),
    ):
        """Set up the encoding.

        Args:
            budgets: byte budget of each matrix, by tensor, for the tensors whose spectra the workspace has; the others
                have equal shares.
            stream: the model whose layers' inputs are known on calibration text.
            work: what each tensor takes, by name, if more is known of it than its `TensorPlan.work`.
        """
        self._matrices = frozenset[str]() if stream is None else stream.matrices
        self._transposed = frozenset[str]() if stream is None else stream.transposed
        self._base, self._finetuned, self._device = pair.base, pair.finetuned, pair.device
        self._method, self._workspace, self._svd_of, self._budgets = method, workspace, svd_of, budgets
        self._waiting = {t.name: t for t in encoded}
        self._work = {t.name: t.work for t in encoded} if not work else {t.name: work.get(t.name, 0.0) for t in encoded}
        self._by_name = dict(self._waiting)
        self._done = self._written = 0
        self._earlier = {tensor.name for tensor in encoded if workspace.has_record(tensor.name)}
        done = sum(self._work[name] for name in self._earlier)
        self.bar = pair.progress.bar(sum(self._work.values()), COMPRESSING, done)

    def encode_all(self, tensors: list[TensorPlan], moments: Mapping[str, Moments] = MappingProxyType({})) -> None:
        """Encode the tensors that no other process takes and that have not been encoded.

        Args:
            moments: second moments of the inputs of some or all, by name.
        """
        batches = Batches(self._device, self._encode_batch)
        for tensor in order_to_take(tensors):
            self._begin(tensor, moments.get(tensor.name), batches)
        batches.finish()

    def prepare(self, moments: Mapping[str, Moments]) -> None:
        """Encode tensors with these second moments of their inputs, shared out among the processes of a job."""
        tensors = [self._by_name[name] for name in moments if name in self._by_name]
        processes.each(lambda: self.encode_all(tensors, moments))

    def _begin(self, tensor: TensorPlan, hessian: Moments, batches: "Batches[_Matrix]") -> None:
        """Put a tensor's matrices into batches, unless that has been done or another process does it."""
        if self._waiting.pop(tensor.name, None) is None:
            return
        self.bar.show(f"{tensor.name} {self._done / self._written:.1f}x" if self._written else tensor.name)
        if self._workspace.has_record(tensor.name) or not self._workspace.take("records", tensor.name):
            self._count(tensor)
            return
        budgets = self._budgets.get(tensor.name)
        tasks = tasks_of(
            tensor, self._base, self._finetuned, self._method, self._device, hessian, self._svd_of, budgets,
            None if budgets is None else spectra_of(tensor, self._workspace), tensor.name in self._transposed,
        )  # fmt: skip
        records = _Records(tensor, hessian is None and tensor.name in self._matrices)
        for number, task in enumerate(tasks):
            if isinstance(task, Encoded):
                self._put(records, number, task)
                continue
            records.relative_norms[number] = min(1.0, task.relative_norm or 0.0)
            if task.hessian is None and hessian is not None:
                records.notes[number].append(f"matrix {number} not calibrated: too few tokens of the text reach it")
            kind = task.delta.shape, task.vocabulary, task.hessian is None, task.transposed
            batches.add(kind, _Matrix(task, records, number), bytes_for(task))

    def _encode_batch(self, batch: "list[_Matrix]") -> None:
        encoder = method_for(self._method, batch[0].task.vocabulary)
        for matrix, encoded in zip(batch, encoder.encode_all([matrix.task for matrix in batch]), strict=True):
            self._put(matrix.records, matrix.number, encoded)

    def _put(self, records: "_Records", number: int, encoded: Encoded) -> None:
        """Add a matrix's record to those of its tensor, and write them if it is the last."""
        records.encoded[number] = encoded
        if len(records.encoded) == records.tensor.matrices:
            self._workspace.put_record(records.tensor.name, *records.joined())
            self._count(records.tensor)

    def _count(self, tensor: TensorPlan) -> None:
        if self._workspace.has_record(tensor.name):
            self._done += tensor.dense_bytes
            self._written += self._workspace.record_bytes(tensor.name)
        if tensor.name not in self._earlier:
            self.bar.update(self._work[tensor.name])

    def is_kept(self, name: str) -> bool:
        """Return whether a tensor needs no records, or has them."""
        return name not in self._by_name or self._workspace.has_record(name)

    def compressed(self, name: str, hessian: Moments) -> torch.Tensor:
        """Return the tensor as a reader decodes it; it has been prepared with this Hessian."""
        dense = self._finetuned.tensor(name)
        tensor = self._by_name.get(name)
        if tensor is None:
            return dense
        data = np.frombuffer(self._workspace.record(name), np.uint8)
        shared = add_delta(self._base.tensor(name, self._device), data, name, tensor.dtype)
        return torch.cat([shared, dense[tensor.shape[0] :].to(shared.device)]) if tensor.added_rows else shared


class _Records:
    """The records of a tensor, some of whose matrices may wait to be encoded."""

    def __init__(self, tensor: TensorPlan, uncalibrated: bool):
        self.tensor, self._uncalibrated = tensor, uncalibrated
        self.encoded: dict[int, Encoded] = {}
        self.notes: list[list[str]] = [[] for _ in range(tensor.matrices)]  # of each matrix, beside the method's
        self.relative_norms = [0.0] * tensor.matrices  # of the deltas: 0 where the delta is

    def joined(self) -> tuple[bytes, dict[str, Any]]:
        """Return the records of all matrices in their order; the notes on them, and means of what was measured."""
        ordered = [self.encoded[number] for number in range(self.tensor.matrices)]
        notes = [note for own, encoded in zip(self.notes, ordered, strict=True) for note in (*own, *encoded.notes)]
        if self._uncalibrated:
            notes.append(NOT_REACHED)
        about = {
            "notes": list(dict.fromkeys(notes)),
            "relative_norm": sum(self.relative_norms) / len(ordered),
            "dropped": sum(encoded.record.dropped for encoded in ordered) / len(ordered),
        }
        return b"".join(encoded.data for encoded in ordered), about


@dataclass(frozen=True)
class _Matrix:
    """A matrix to encode: which one of the tensor that has these records."""

    task: EncodingTask
    records: _Records
    number: int


def bytes_for(task: EncodingTask) -> int:
    """Return about how much memory a matrix takes while it is encoded: copies of itself, and of its inputs' moments."""
    inputs = task.delta.shape[0 if task.transposed else 1]
    return 4 * (4 * task.delta.numel() + 5 * inputs**2)


def tasks_of(
    tensor: TensorPlan,
    base: BaseTensors,
    finetuned: Model,
    method: MethodConfig,
    device: torch.device,
    hessian: Moments = None,
    svd_of: SvdOf = uncached_svd,
    budgets: list[int] | None = None,
    spectra: list[Spectrum] | None = None,
    transposed: bool = False,
) -> Iterator[EncodingTask | Encoded]:
    """Yield what is to be encoded for each matrix of a tensor, or its record if the delta is zero.

    Args:
        budgets: byte budget of each matrix; None for equal shares of the tensor's.
        spectra: the spectrum of each matrix's delta, if it is known.
        transposed: whether the layer's inputs belong to the rows.
    """
    for number, delta in enumerate(deltas_of(tensor, base, finetuned, device)):
        if not delta.is_nonzero:
            yield Encoded(empty_record(delta.matrix.shape[0], delta.matrix.shape[1], float(delta.matrix.any())))
            continue
        own = hessian if hessian is None or isinstance(hessian, torch.Tensor) else hessian[number]
        yield EncodingTask(
            delta.matrix,
            tensor.max_bytes // tensor.matrices if budgets is None else budgets[number],
            mask_seed(method.seed, tensor.name, number),
            own,
            svd_of(tensor.name, number),
            None if spectra is None else spectra[number].sigma,
            delta.relative_norm,
            tensor.vocabulary,
            transposed and own is not None,
        )


def mask_seed(seed: int, name: str, number: int) -> int:
    """Derive the 32-bit mask seed of a matrix from the method's seed, so that every matrix has its own masks.

    Args:
        seed: the method's seed.
        name: the tensor's name.
        number: the matrix's index in its stack; 0 for a plain matrix.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}:{number}".encode()).digest()[:4], "little")
