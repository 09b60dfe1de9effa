"""Byte budgets of all matrices, for methods that share one budget among them according to their components."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from ..coding.svd_cache import SvdOf
from ..methods import MethodConfig, Spectrum, method_for
from ..modeling.base_tensors import BaseTensors
from ..modeling.checkpoints import all_finite
from ..modeling.tensors import Model
from ..modeling.transfer import to_device
from .pair import ModelPair
from .scan import TensorPlan

# The squares of smaller numbers underflow in float32: such a delta has norm 0 and changes no model.
_ZERO_DELTA = 1e-15
# Components are computed for up to this multiple of the budget that a matrix has in proportion to its size.
_BUDGET_MULTIPLE = 2


def deltas_of(
    tensor: TensorPlan, base: BaseTensors, finetuned: Model, device: torch.device
) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yield the delta of each of a tensor's matrices, float32 (m, n), and whether it is more than zero."""
    before = base.tensor(tensor.name)
    after = finetuned.tensor(tensor.name)[: before.shape[0]]
    stack = (-1, *tensor.shape[-2:])
    for old, new in zip(before.reshape(stack), after.reshape(stack), strict=True):
        delta = to_device(new, device).float() - to_device(old, device).float()
        if tensor.vocabulary and not all_finite(delta):
            delta = delta.nan_to_num(0, 0, 0)  # rows that hold NaN or infinity are the same in both
        yield delta, bool(delta.abs().max() > _ZERO_DELTA)


def _sharing(tensors: list[TensorPlan], method: MethodConfig) -> list[TensorPlan]:
    """Return the tensors that the user's own method encodes; others keep their budgets."""
    return [tensor for tensor in tensors if method_for(method, tensor.vocabulary) is method]


def _rank_rule(tensor: TensorPlan, method: MethodConfig) -> Callable[[np.ndarray], int]:
    """Return the function that gives, from a matrix's singular values, how many of its components to compute."""
    rows, columns = tensor.shape[-2:]
    most = _BUDGET_MULTIPLE * (tensor.max_bytes // tensor.matrices)
    return partial(method.rank_for, rows=rows, columns=columns, max_bytes=most)


def components_bytes(tensors: list[TensorPlan], method: MethodConfig, number_bytes: int) -> int:
    """Return the most bytes of the components that `svd_of` keeps in `shared_budgets`, at `number_bytes` a number."""
    total = 0
    for tensor in _sharing(tensors, method):
        rows, columns = tensor.shape[-2:]
        rank = min(rows, columns)
        count = min(rank, _rank_rule(tensor, method)(np.ones(rank)))
        total += tensor.matrices * count * (number_bytes * (rows + columns) + 4)
    return total


def shared_budgets(
    tensors: list[TensorPlan], pair: ModelPair, method: MethodConfig, svd_of: SvdOf
) -> dict[str, list[int]]:
    """Decompose every matrix, and allocate each a byte budget according to its components.

    Args:
        tensors: the tensors to encode, with budgets in proportion to their sizes; the sum of these is shared.
        method: the user's method, with `shares_budget`; tensors that another method encodes keep their budgets.
        svd_of: gives, for a tensor's name and a matrix's index in its stack, the function that computes the matrix's
            singular components and keeps them for the encoding.

    Returns:
        By tensor name, the byte budget of each of its matrices.
    """
    tensors = _sharing(tensors, method)
    if not tensors:
        return {}
    spectra: list[tuple[TensorPlan, Spectrum]] = []
    with pair.progress.bar(sum(tensor.dense_bytes for tensor in tensors), "Decomposing", "B") as bar:
        for tensor in tensors:
            bar.set_postfix_str(tensor.name)
            for number, (delta, is_nonzero) in enumerate(deltas_of(tensor, pair.base, pair.finetuned, pair.device)):
                rows, columns = delta.shape
                spectrum = np.empty(0)
                if is_nonzero:
                    _, sigma, _ = svd_of(tensor.name, number)(delta, _rank_rule(tensor, method))
                    spectrum = sigma.double().cpu().numpy()
                weight = (
                    embedding_weight(pair.base.tensor(tensor.name), delta) if tensor.vocabulary and is_nonzero else 1.0
                )
                energy = float(torch.linalg.vector_norm(delta)) ** 2
                spectra.append((tensor, Spectrum(spectrum, rows, columns, energy, tensor.vocabulary, weight)))
            bar.update(tensor.dense_bytes)
    shares = method.allocate([spectrum for _, spectrum in spectra], sum(t.max_bytes for t in tensors))
    budgets: dict[str, list[int]] = {tensor.name: [] for tensor in tensors}
    for (tensor, _), share in zip(spectra, shares, strict=True):
        budgets[tensor.name].append(share)
    return budgets


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
