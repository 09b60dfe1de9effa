"""The inputs of the experts of a mixture whose matrices are one stacked parameter, so that no module has them alone."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
_BATCHED = (torch.bmm, torch.Tensor.bmm, *_PRODUCTS)


class ExpertInputs(TorchFunctionMode):
    """A context that sees what is multiplied by the matrices of stacked parameters.

    It knows the three forms that transformers has: `linear(x, stack[expert])`, `x @ stack[expert]`, and a batched
    product of all experts' inputs with the stack, in which the rows of tokens that go elsewhere are zero.
    """

    def __init__(self, stacks: Mapping[str, Tensor], see: Callable[[str, int, Tensor, bool], None]):
        """Watch parameters.

        Args:
            stacks: parameters (experts, m, n), by name.
            see: called with a parameter's name, an expert's number, the rows (tokens, in_features) that are multiplied
                by its matrix, and whether the matrix is (in_features, out_features), not (out_features, in_features).
        """
        super().__init__()
        self._stacks = {id(stack): name for name, stack in stacks.items()}
        self._see = see
        # By a matrix's id, its place; it is kept alive, so that its id is its own.
        self._matrices: dict[int, tuple[str, int, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(args) < 2:
            pass
        elif func in _BATCHED and id(args[1]) in self._stacks:
            for number, rows in enumerate(args[0]):
                self._show(self._stacks[id(args[1])], number, rows[rows.any(-1)], True)
        elif func in _PRODUCTS and id(args[1]) in self._matrices:
            name, number, _ = self._matrices[id(args[1])]
            self._show(name, number, args[0], True)
        elif func is functional.linear and id(args[1]) in self._matrices:
            name, number, _ = self._matrices[id(args[1])]
            self._show(name, number, args[0], False)
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__ and id(args[0]) in self._stacks and _is_number(args[1]):
            self._matrices[id(result)] = self._stacks[id(args[0])], int(args[1]), result
        return result

    def _show(self, name: str, number: int, rows: Tensor, inputs_first: bool) -> None:
        rows = rows.reshape(-1, rows.shape[-1])
        if len(rows):
            self._see(name, number, rows, inputs_first)


def _is_number(index: Any) -> bool:
    return isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0)
