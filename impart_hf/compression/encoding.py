"""Encoding of planned tensors into records in a workspace."""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from ..calibration.layer_stream import Moments
from ..calibration.streamed_model import StreamedModel
from ..coding.records import empty_record
from ..coding.svd_cache import SvdOf, uncached_svd
from ..common import processes
from ..methods import Encoded, MethodConfig, Spectrum, method_for
from ..modeling.base_tensors import BaseTensors
from ..modeling.delta_decode import add_delta
from ..modeling.tensors import Model
from ..storage.workspace import Workspace
from .budgets import deltas_of, spectra_of
from .pair import ModelPair
from .scan import TensorPlan, order_to_take


class Encoding:
    """Encodes a pair's tensors into a workspace, each once, in any order.

    Attributes:
        bar: progress bar over the dense bytes.
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
    ):
        """Set up the encoding.

        Args:
            budgets: byte budget of each matrix, by tensor, for the tensors whose spectra the workspace has; the others
                have equal shares.
            stream: the model whose layers' inputs are known on calibration text.
        """
        self._matrices = frozenset[str]() if stream is None else stream.matrices
        self._transposed = frozenset[str]() if stream is None else stream.transposed
        self._base, self._finetuned, self._device = pair.base, pair.finetuned, pair.device
        self._method, self._workspace, self._svd_of, self._budgets = method, workspace, svd_of, budgets
        self.bar: Any = None
        self._waiting = {t.name: t for t in encoded}
        self._by_name = dict(self._waiting)
        self._done = self._written = 0

    def encode_all(self, tensors: list[TensorPlan], moments: Mapping[str, Moments] = MappingProxyType({})) -> None:
        """Encode the tensors that no other process takes and that have not been encoded.

        Args:
            moments: second moments of the inputs of some or all, by name.
        """
        for tensor in order_to_take(tensors):
            self.encode(tensor, moments.get(tensor.name))

    def prepare(self, moments: Mapping[str, Moments]) -> None:
        """Encode tensors with these second moments of their inputs, shared out among the processes of a job."""
        tensors = [self._by_name[name] for name in moments if name in self._by_name]
        processes.each(lambda: self.encode_all(tensors, moments))

    def encode(self, tensor: TensorPlan, hessian: Moments = None) -> None:
        """Encode a tensor and write its records, unless that has been done or another process does it."""
        if self._waiting.pop(tensor.name, None) is None:
            return
        self.bar.set_postfix_str(f"{tensor.name} {self._done / self._written:.1f}x" if self._written else tensor.name)
        if not self._workspace.has_record(tensor.name) and self._workspace.take("records", tensor.name):
            budgets = self._budgets.get(tensor.name)
            data, notes = encode_tensor(
                tensor, self._base, self._finetuned, self._method, self._device, hessian, self._svd_of, budgets,
                None if budgets is None else spectra_of(tensor, self._workspace), tensor.name in self._transposed,
            )  # fmt: skip
            if hessian is None and tensor.name in self._matrices:
                notes.append("not calibrated: too few tokens of the text reach it")
            self._workspace.put_record(tensor.name, data, notes)
        if self._workspace.has_record(tensor.name):
            self._done += tensor.dense_bytes
            self._written += len(self._workspace.record(tensor.name))
        self.bar.update(tensor.dense_bytes)

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


def encode_tensor(
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
) -> tuple[bytes, list[str]]:
    """Return the records of one tensor, one per matrix of a stack, and the method's notes on it.

    Args:
        budgets: byte budget of each matrix; None for equal shares of the tensor's.
        spectra: the spectrum of each matrix's delta, if it is known.
        transposed: whether the layer's inputs belong to the rows.
    """
    encoder = method_for(method, tensor.vocabulary)
    records, notes = [], []
    for number, delta in enumerate(deltas_of(tensor, base, finetuned, device)):
        seed = mask_seed(method.seed, tensor.name, number)
        if delta.is_nonzero:
            svd = svd_of(tensor.name, number)
            budget = tensor.max_bytes // tensor.matrices if budgets is None else budgets[number]
            own = hessian if hessian is None or isinstance(hessian, torch.Tensor) else hessian[number]
            if own is None and hessian is not None:
                notes.append(f"matrix {number} not calibrated: too few tokens of the text reach it")
            encoded = encoder.encode(
                delta.matrix, budget, seed,
                hessian=own, svd=svd, sigma=None if spectra is None else spectra[number].sigma,
                relative_norm=delta.relative_norm, vocabulary=tensor.vocabulary, transposed=transposed,
            )  # fmt: skip
        else:
            encoded = Encoded(empty_record(delta.matrix.shape[0], delta.matrix.shape[1], float(delta.matrix.any())))
        records.append(encoded.data)
        notes += [note for note in encoded.notes if note not in notes]
    return b"".join(records), notes


def mask_seed(seed: int, name: str, number: int) -> int:
    """Derive the 32-bit mask seed of a matrix from the method's seed, so that every matrix has its own masks.

    Args:
        seed: the method's seed.
        name: the tensor's name.
        number: the matrix's index in its stack; 0 for a plain matrix.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}:{number}".encode()).digest()[:4], "little")
