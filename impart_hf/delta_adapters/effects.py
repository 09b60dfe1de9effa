"""What a delta does to a module of its base: it adds to a linear layer's outputs, or runs a copy with other values."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .linear_deltas import LinearDelta


def linear_input(arguments: Sequence[Any], options: Mapping[str, Any]) -> Tensor:
    """Return the input of a linear layer's forward method, its only argument."""
    return arguments[0] if arguments else next(iter(options.values()))


@dataclass(frozen=True)
class Addition:
    """What is added to a linear layer's outputs.

    Attributes:
        weight: what the weight's delta gives; None if it has not changed.
        bias: the bias's delta, (out_features,); None if it has not changed, or the layer has none.
    """

    weight: LinearDelta | None
    bias: Tensor | None

    def added(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        """Return outputs (…, out_features) with what inputs (…, in_features) give; outputs may be written to."""
        outputs = outputs.contiguous()
        if self.weight is not None:
            flat = outputs.view(-1, outputs.shape[-1])
            self.weight.add_to(flat, inputs.reshape(-1, inputs.shape[-1]).contiguous())
        return outputs if self.bias is None else outputs.add_(self.bias)


@dataclass(frozen=True)
class Replacement:
    """A module with other values, run in the place of the base's.

    Attributes:
        module: shares everything with the base's module but the parameters in `made`, or those replaced already.
        made: parameters that are decoded each time, by their names in the module.
    """

    module: nn.Module
    made: Mapping[str, Callable[[], Tensor]]

    def run(self, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Do what the module's own forward method does, with the other values."""
        module = with_values(self.module, {name: make() for name, make in self.made.items()})
        return type(module).forward(module, *arguments, **options)


Effect: TypeAlias = Addition | Replacement


def with_values(module: nn.Module, values: Mapping[str, Tensor]) -> Any:
    """Return a copy of a module that shares all but some parameters or buffers.

    Args:
        values: by name, which may lead into the module's children.
    """
    if not values:
        return module
    clone = copy.copy(module)
    vars(clone).pop("forward", None)  # of a watched module, which would apply the deltas
    clone._parameters, clone._buffers, clone._modules = (
        dict(module._parameters), dict(module._buffers), dict(module._modules)
    )  # fmt: skip
    own: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        child, dot, rest = name.partition(".")
        if dot:
            own.setdefault(child, {})[rest] = value
        elif name in clone._buffers:
            clone._buffers[name] = value
        else:
            clone._parameters[name] = nn.Parameter(value, requires_grad=False)
    for child, inner in own.items():
        clone._modules[child] = with_values(getattr(module, child), inner)
    if isinstance(clone, nn.Embedding) and "weight" in values:
        clone.num_embeddings = len(values["weight"])
    return clone


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer of these values, in the place of a quantised one."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    return with_values(layer, {"weight": weight} | ({} if bias is None else {"bias": bias}))
