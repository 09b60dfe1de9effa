"""Byte budgets of all matrices, for methods that share one budget among them according to their components."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..coding.spectrum import singular_values
from ..methods import MethodConfig, Spectrum, method_for
from ..modeling.base_tensors import BaseTensors
from ..modeling.checkpoints import all_finite
from ..modeling.tensors import Model
from ..modeling.transfer import to_device
from ..storage.workspace import Workspace
from .batches import Batches
from .pair import ModelPair
from .scan import TensorPlan, order_to_take
from .stages import DECOMPOSING

# The squares of smaller numbers underflow in float32: such a delta has norm 0 and changes no model.
ZERO_DELTA = 1e-15
_MOST = 1000.0  # and its inverse: bounds of a weight, because a sensitivity is measured on little text
_PROPERTIES = 3  # numbers that are stored before a matrix's singular values: energy, weight of errors, relative norm


@dataclass(frozen=True)
class Delta:
    """The delta of one matrix.

    Attributes:
        matrix: float32 (m, n).
        is_nonzero: whether it is more than zero.
        relative_norm: its Frobenius norm over that of the fine-tuned matrix; infinite if that is 0.
    """

    matrix: torch.Tensor
    is_nonzero: bool
    relative_norm: float

    @classmethod
    def of(cls, before: torch.Tensor, after: torch.Tensor, vocabulary: bool, device: torch.device) -> "Delta":
        """Return the delta of two matrices, on a device."""
        whole = to_device(after, device).float()
        matrix = whole - to_device(before, device).float()
        if vocabulary and not all_finite(matrix):
            matrix = matrix.nan_to_num(0, 0, 0)  # rows that hold NaN or infinity are the same in both
        norms = [torch.linalg.vector_norm(part) for part in (matrix, whole)]
        norm, of_whole, largest = torch.stack([*norms, matrix.abs().max()]).tolist()  # a device is waited for once
        return cls(matrix, largest > ZERO_DELTA, norm / of_whole if of_whole else math.inf)


def deltas_of(tensor: TensorPlan, base: BaseTensors, finetuned: Model, device: torch.device) -> Iterator[Delta]:
    """Yield the delta of each of a tensor's matrices."""
    before = base.tensor(tensor.name)
    after = finetuned.tensor(tensor.name)[: before.shape[0]]
    stack = (-1, *tensor.shape[-2:])
    for old, new in zip(before.reshape(stack), after.reshape(stack), strict=True):
        yield Delta.of(old, new, tensor.vocabulary, device)


def sharing(tensors: list[TensorPlan], method: MethodConfig) -> list[TensorPlan]:
    """Return the tensors among which the method shares its budget: those that it encodes itself."""
    if not method.shares_budget:
        return []
    return [tensor for tensor in tensors if method_for(method, tensor.vocabulary) is method]


def spectra_bytes(tensors: list[TensorPlan], method: MethodConfig) -> int:
    """Return the bytes that `find_spectra` stores in the workspace."""
    return sum(8 * t.matrices * (_PROPERTIES + min(t.shape[-2:])) for t in sharing(tensors, method))


def find_spectra(tensors: list[TensorPlan], pair: ModelPair, method: MethodConfig, workspace: Workspace) -> None:
    """Compute the spectra of all matrices that share the method's budget, and store them in the workspace.

    A tensor whose spectra are stored, or that another process takes, is skipped.
    """
    tensors = order_to_take(sharing(tensors, method))
    stored = {tensor.name for tensor in tensors if workspace.has_spectra(tensor.name)}
    rows: dict[str, list[np.ndarray]] = {}  # by tensor, the properties of its matrices so far

    def decompose(batch: list[tuple[TensorPlan, Delta]]) -> None:
        for (tensor, *_), row in zip(batch, _properties(batch, pair), strict=True):
            rows[tensor.name].append(row)
            if len(rows[tensor.name]) == tensor.matrices:
                workspace.put_spectra(tensor.name, np.stack(rows.pop(tensor.name)))

    batches = Batches(pair.device, decompose)
    done = sum(tensor.work for tensor in tensors if tensor.name in stored)
    with pair.progress.bar(sum(tensor.work for tensor in tensors), DECOMPOSING, done) as bar:
        for tensor in tensors:
            if tensor.name in stored:
                continue
            bar.show(tensor.name)
            if not workspace.has_spectra(tensor.name) and workspace.take("spectra", tensor.name):
                rows[tensor.name] = []
                for delta in deltas_of(tensor, pair.base, pair.finetuned, pair.device):
                    # Of the delta there are two copies, of the shorter side's Gram matrix three with the solver's.
                    shape = delta.matrix.shape
                    size = 4 * (2 * delta.matrix.numel() + 3 * min(shape) ** 2)
                    batches.add(shape, (tensor, delta), size)
            bar.update(tensor.work)
        batches.finish()


def _properties(batch: list[tuple[TensorPlan, Delta]], pair: ModelPair) -> np.ndarray:
    """Return what is stored of deltas of one shape, float64 (b, _PROPERTIES + min(m, n))."""
    nonzero = np.array([delta.is_nonzero for _, delta in batch])
    properties = np.zeros((len(batch), _PROPERTIES + min(batch[0][1].matrix.shape)))
    properties[:, 1], properties[:, 2] = 1.0, [delta.relative_norm for _, delta in batch]
    if nonzero.any():
        chosen = [delta.matrix for _, delta in batch if delta.is_nonzero]
        deltas = chosen[0] if len(chosen) == 1 else torch.stack(chosen)
        properties[nonzero, 0] = torch.linalg.vector_norm(deltas, dim=(-2, -1)).double().cpu().numpy() ** 2
        properties[nonzero, _PROPERTIES:] = singular_values(deltas)
    for row, (tensor, delta) in zip(properties, batch, strict=True):
        if tensor.vocabulary and delta.is_nonzero:
            row[1] = embedding_weight(pair.base.tensor(tensor.name), delta.matrix)
    return properties


def spectra_of(tensor: TensorPlan, workspace: Workspace) -> list[Spectrum]:
    """Return the stored spectra of a tensor's matrices."""
    rows, columns = tensor.shape[-2:]
    return [
        Spectrum(row[_PROPERTIES:], rows, columns, float(row[0]), tensor.vocabulary, float(row[1]), float(row[2]))
        for row in workspace.spectra(tensor.name)
    ]


def budgets_or_exact(
    tensors: list[TensorPlan], method: MethodConfig, workspace: Workspace, sensitivities: Mapping[str, float]
) -> dict[str, list[int]]:
    """Allocate budgets as `shared_budgets`, and choose tensors whose exact record takes no more than they would get.

    What these leave is allocated to the others, until no more are chosen.

    Returns:
        By tensor name, the byte budget of each of its matrices; empty for a tensor that is to be stored exactly.
    """
    rest, exact = sharing(tensors, method), list[TensorPlan]()
    total = sum(tensor.max_bytes for tensor in rest)
    while True:
        left = total - sum(tensor.exact_bytes for tensor in exact)
        budgets = shared_budgets(rest, method, workspace, sensitivities, left)
        chosen = [t for t in rest if 0 < t.exact_bytes <= sum(budgets[t.name])]
        if not chosen:
            return budgets | {tensor.name: [] for tensor in exact}
        exact += chosen
        rest = [tensor for tensor in rest if tensor not in chosen]


def shared_budgets(
    tensors: list[TensorPlan],
    method: MethodConfig,
    workspace: Workspace,
    sensitivities: Mapping[str, float],
    max_bytes: int | None = None,
) -> dict[str, list[int]]:
    """Allocate a byte budget to every matrix according to its spectrum.

    Args:
        tensors: the tensors to encode, with budgets in proportion to their sizes; the sum of these is shared.
        method: the user's method. Without `shares_budget`, or for tensors that another method encodes, these budgets
            are kept.
        workspace: has the spectra of all that share.
        sensitivities: what a squared error costs in some of the tensors, by name, in any unit.
        max_bytes: what is shared; None for the sum of the tensors' budgets.

    Returns:
        By tensor name, the byte budget of each of its matrices, of those that share.
    """
    tensors = sharing(tensors, method)
    if not tensors:
        return {}
    max_bytes = sum(t.max_bytes for t in tensors) if max_bytes is None else max_bytes
    weights = error_weights(tensors, sensitivities)
    spectra = [
        [replace(one, weight=one.weight * weights.get(tensor.name, 1.0)) for one in spectra_of(tensor, workspace)]
        for tensor in tensors
    ]
    shares = iter(method.allocate([one for several in spectra for one in several], max_bytes))
    return {tensor.name: [next(shares) for _ in several] for tensor, several in zip(tensors, spectra, strict=True)}


def error_weights(tensors: list[TensorPlan], sensitivities: Mapping[str, float]) -> dict[str, float]:
    """Return the weights of squared errors in tensors whose sensitivity is known: 1 in the geometric mean of entries.

    So the other tensors, and the vocabulary's, whose sensitivity follows from other rules, get as much as without.
    """
    known = {t.name: t for t in tensors if sensitivities.get(t.name, 0.0) > 0 and not t.vocabulary}
    if not known:
        return {}
    sizes = [math.prod(tensor.shape) for tensor in known.values()]
    mean = float(np.average(np.log([sensitivities[name] for name in known]), weights=sizes))
    return {name: float(np.clip(sensitivities[name] / math.exp(mean), 1 / _MOST, _MOST)) for name in known}


def embedding_weight(base: torch.Tensor, delta: torch.Tensor) -> float:
    """Return the weight of an embedding's squared error relative to other vocabulary matrices'; 1 or more.

    The inputs of a linear layer have about unit variance, so that its squared error is that of its output. A token
    reads one row of an embedding, and the result is normalised: the squared error, relative to the mean square of the
    weights, is divided among the tokens that the fine-tune was trained on. Their number is estimated from the rows that
    it changed. If they are few, each has a large part of the error.

    Args:
        base, delta: (tokens, size).
    """
    if not all_finite(base):
        base = base.nan_to_num(0, 0, 0)
    energies = torch.linalg.vector_norm(delta, dim=1).double().square()
    tokens = float(energies.sum().square() / energies.square().sum())
    size = torch.linalg.vector_norm(base, dtype=torch.promote_types(base.dtype, torch.float32))
    shared = tokens * float(size) ** 2 / base.numel()
    return max(1.0, 1 / shared) if shared else 1.0
