"""A correction of vLLM's adapters on CPUs: a row of a batch without an adapter gets nothing added.

In vLLM 0.32 the index of such a row, -1, takes the weights of the last slot, so that in one batch with adapters the
base answers as the last of them. The kernels for GPUs leave these rows alone.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

_FUNCTIONS = ("bgmv_expand", "bgmv_expand_slice")  # what an adapter adds goes through one of them
_MODULES = ("vllm.lora.ops.torch_ops.lora_ops", "vllm.lora.ops.torch_ops", "vllm.lora.punica_wrapper.punica_cpu")


def leave_rows_without_adapter() -> None:
    """Correct vLLM's functions for CPUs if they are wrong; doing it again changes nothing."""
    modules = [importlib.import_module(name) for name in _MODULES]
    for name in _FUNCTIONS:
        function = getattr(modules[0], name)
        if not _adds_to_rows_without(function, name == "bgmv_expand_slice"):
            continue
        corrected = _corrected(function)
        for module in modules:
            if hasattr(module, name):
                setattr(module, name, corrected)


def _adds_to_rows_without(function: Callable[..., None], sliced: bool) -> bool:
    outputs = torch.zeros(1, 1)
    function(torch.ones(1, 1), torch.ones(1, 1, 1, 1), outputs, torch.tensor([-1]), *((0, 1) if sliced else ()), True)
    return bool(outputs.any())


def _corrected(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def corrected(
        inputs: torch.Tensor,
        weights: torch.Tensor,
        outputs: torch.Tensor,
        slots: torch.Tensor,
        *more: Any,
        **named: Any,
    ) -> None:
        function(inputs * (slots >= 0)[:, None], weights, outputs, slots, *more, **named)

    return corrected
