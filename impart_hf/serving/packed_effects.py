"""What a packed delta does to the modules of one of vLLM's models, of which some rows of a batch belong to the delta.

vLLM's modules are not transformers': it joins query, key and value, and gate and up projection, to one module each, so
that a delta's matrices go to columns of a module's outputs; and an output projection is read, not called.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from ..delta_adapters.effects import with_values
from ..delta_adapters.linear_deltas import LinearDelta, linear_delta
from ..modeling.delta_decode import matrix_delta
from ..modeling.delta_file import TensorParts
from ..modeling.delta_record import Record, parse_record
from ..modeling.delta_repository import DeltaRepository
from ..modeling.precision import full_float32
from .engine_base import DeltaRefusedError

# The module whose outputs are the logits, one row for each token that is sampled.
LOGITS = "logits_processor"
_HEAD = "lm_head"
# Architectures whose modules have the names of transformers', or join them as `packed_modules_mapping` says, and whose
# forward methods call all modules that have weights.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_SHOWN = 5


class Effect(Protocol):
    """What a delta does to the outputs of a module."""

    def changed(self, outputs: Tensor, *inputs: Tensor) -> Tensor:
        """Return the delta's outputs.

        Args:
            outputs: (rows, …), the base's outputs of the delta's rows; contiguous, may be written to.
            inputs: (rows, …), the same rows of the module's inputs; may be written to.
        """


@dataclass(frozen=True)
class _Added:
    """A matrix that is the base's plus a record, or unchanged, and a bias that may have changed.

    Attributes:
        delta: the matrix's delta; None if it has not changed.
        bias: (out_features,), the bias's delta; None if it has not changed.
    """

    delta: LinearDelta | None
    bias: Tensor | None

    def outputs(self, base: Tensor, inputs: Tensor) -> Tensor:
        """Return outputs (rows, out_features), contiguous, made of the base's outputs."""
        result = base.contiguous()
        if self.delta is not None:
            self.delta.add_to(result, inputs)
        return result if self.bias is None else result.add_(self.bias)


@dataclass(frozen=True)
class _Replaced:
    """A matrix that the delta's file holds as it is.

    Attributes:
        weight: (out_features, in_features).
        bias: (out_features,), the fine-tune's bias; None if there is none.
    """

    weight: Tensor
    bias: Tensor | None

    def outputs(self, base: Tensor, inputs: Tensor) -> Tensor:
        """Return outputs (rows, out_features) in the base's dtype."""
        return functional.linear(inputs.to(self.weight.dtype), self.weight, self.bias).to(base.dtype)


@dataclass(frozen=True)
class _Linear:
    """The effect on a linear layer, which may be several joined ones, or on logits.

    Attributes:
        members: the columns of the outputs that a layer makes, and what they become.
    """

    members: Sequence[tuple[slice, _Added | _Replaced]]

    def changed(self, outputs: Tensor, *inputs: Tensor) -> Tensor:
        for columns, member in self.members:
            outputs[:, columns] = member.outputs(outputs[:, columns], inputs[0])
        return outputs


@dataclass(frozen=True)
class _AddedRows:
    """The effect on an embedding of a record, which is decoded each time."""

    record: Record
    name: str

    @full_float32()
    def changed(self, outputs: Tensor, *inputs: Tensor) -> Tensor:
        delta = matrix_delta(self.record, self.name, outputs.device)
        return (outputs + delta.rows(inputs[0])).to(outputs.dtype)


@dataclass(frozen=True)
class _OtherRows:
    """The effect on an embedding whose weight, (tokens, features), is in the delta's file as it is."""

    weight: Tensor

    def changed(self, outputs: Tensor, *inputs: Tensor) -> Tensor:
        return functional.embedding(inputs[0], self.weight).to(outputs.dtype)


@dataclass(frozen=True)
class _OtherNorm:
    """The effect on a norm: a copy of the module with another weight."""

    module: Any

    def changed(self, outputs: Tensor, *inputs: Tensor) -> Tensor:
        # A copy's `forward` would be the base's: vLLM binds the method to the module that it makes.
        result = self.module.forward_native(*inputs)
        return result[0] if isinstance(result, tuple) else result  # the sum with the residual is the base's, too


@dataclass(frozen=True)
class Effects:
    """What a delta does to a model.

    Attributes:
        by_module: its effects by the names of vLLM's modules.
        nbytes: bytes of the file's entries that are held.
    """

    by_module: Mapping[str, Effect]
    nbytes: int


class _Reader:
    """Reads the effects of one delta."""

    def __init__(self, repository: DeltaRepository, model: nn.Module, dtype: torch.dtype, tied: bool):
        self._repository, self._dtype, self._tied = repository, dtype, tied
        self._modules: dict[str, Any] = dict(model.named_modules())
        joined: Any = getattr(model, "packed_modules_mapping", {})
        self._joined = {member: (whole, list(joined[whole])) for whole in joined for member in joined[whole]}
        self._linear: dict[str, dict[str, tuple[slice, _Added | _Replaced]]] = {}
        self._others: dict[str, Effect] = {}
        self._records: dict[str, np.ndarray] = {}  # what tied layers share is held once
        self._values: dict[str, Tensor] = {}

    def read(self) -> Effects:
        """Return the effects; errors as for `read_effects`."""
        refused = []
        for name in self._repository.names():
            if self._differs(name) and not self._place(name):
                refused.append(name)
        if refused:
            rest = f" and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
            raise DeltaRefusedError(
                f"'{self._repository.source}' changes what cannot be changed for a part of a batch: "
                f"{', '.join(refused[:_SHOWN])}{rest}. Serve it with an engine of its own, or swap to it"
            )
        linear = {name: _Linear(list(members.values())) for name, members in self._linear.items()}
        held: list[Any] = [*self._records.values(), *self._values.values()]
        return Effects(self._others | linear, sum(one.nbytes for one in held))

    def _differs(self, name: str) -> bool:
        return self._repository.is_changed(name) or name in self._repository.base.row_counts

    def _place(self, name: str) -> bool:
        """Read what a tensor's change does, and return whether there is a place for it."""
        parts, (owner, _, attribute) = self._repository.parts[name], name.rpartition(".")
        if parts.added_rows or name in self._repository.base.row_counts:
            return False
        if owner == _HEAD:
            columns = slice(0, self._repository.shape(f"{owner}.weight")[0])
            return not self._tied and self._place_linear(owner, attribute, LOGITS, columns)
        parent, _, leaf = owner.rpartition(".")
        whole, members = self._joined.get(leaf, (leaf, [leaf]))
        place = f"{parent}.{whole}" if parent else whole
        wrapped = self._modules.get(place)
        module = getattr(wrapped, "base_layer", wrapped)  # of an adapters' layer
        if isinstance(module, LinearBase):
            sizes = list(module.output_sizes) if len(members) > 1 else [module.output_size]
            if len(sizes) != len(members):
                return False
            start, stop = [0, *accumulate(sizes)][members.index(leaf) :][:2]
            return self._place_linear(owner, attribute, place, slice(start, stop))
        if attribute != "weight":
            return False
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            self._others[place] = self._embedding(name, parts)
            if self._tied:
                self._place_linear(owner, attribute, LOGITS, slice(0, self._repository.shape(name)[0]))
            return True
        if isinstance(module, RMSNorm) and parts.holds_values:
            self._others[place] = _OtherNorm(with_values(module, {"weight": self._replacement(name)}))
            return True
        return False

    def _place_linear(self, owner: str, attribute: str, place: str, columns: slice) -> bool:
        """Read the changes of a linear layer of transformers', of which each tensor may ask."""
        weight, bias = f"{owner}.weight", f"{owner}.bias"
        shape: Any = self._repository.shape(weight)
        if attribute not in ("weight", "bias") or len(shape) != 2 or shape[0] != columns.stop - columns.start:
            return False
        if owner not in self._linear.setdefault(place, {}):
            biases = bias in self._repository.names()
            self._linear[place][owner] = columns, self._member(weight, bias if biases else None, shape)
        return True

    def _member(self, weight: str, bias: str | None, shape: tuple[int, int]) -> _Added | _Replaced:
        repository, device = self._repository, self._device
        after = repository.tensor(bias).to(device, self._dtype) if bias else None
        if repository.parts[weight].holds_values:
            return _Replaced(self._replacement(weight), after)
        delta = None
        if repository.parts[weight].records:
            delta = linear_delta(
                self._record(weight), shape, weight, transposed=False, packed=True, device=device, dtype=self._dtype
            )  # fmt: skip
        if bias is None or after is None or not self._differs(bias):
            return _Added(delta, None)
        self._values[bias] = after - repository.base_tensor(bias).to(device, self._dtype)
        return _Added(delta, self._values[bias])

    def _embedding(self, name: str, parts: TensorParts) -> Effect:
        if parts.holds_values:
            return _OtherRows(self._replacement(name))
        shape = self._repository.shape(name)
        record, _ = parse_record(self._record(name), (shape[0], shape[1]), name)
        if not self._tied:  # otherwise the logits' effect checks it
            matrix_delta(record, name, self._device)  # it raises what is wrong with the record
        return _AddedRows(record, name)

    def _record(self, name: str) -> np.ndarray:
        if name not in self._records:
            self._records[name] = self._repository.file.read_records(name)
        return self._records[name]

    def _replacement(self, name: str) -> Tensor:
        if name not in self._values:
            self._values[name] = self._repository.tensor(name).to(self._device, self._dtype)
        return self._values[name]

    @property
    def _device(self) -> torch.device:
        return next(parameter.device for module in self._modules.values() for parameter in module.parameters())


def read_effects(repository: DeltaRepository, model: nn.Module, dtype: torch.dtype, tied: bool) -> Effects:
    """Read what a delta does to one of vLLM's models, whose base it is.

    Args:
        repository: the delta, whose base has been checked.
        model: one of `ARCHITECTURES` on one device, with adapters' layers or without.
        dtype: of the model's weights.
        tied: whether the model's output projection is its input embedding.

    Raises:
        DeltaRefusedError: if a tensor changes that cannot differ between the rows of a batch; it names them.
        DeltaFormatError: if the delta is damaged.
    """
    return _Reader(repository, model, dtype, tied).read()
