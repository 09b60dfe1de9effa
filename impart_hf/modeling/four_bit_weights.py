"""The content of bitsandbytes' 4-bit weights, in whichever order a CPU holds it.

On CPUs with AVX512-BF16, bitsandbytes reorders a 4-bit weight in its first forward pass and rounds its scales to
bfloat16. Its `state_dict` undoes that in part only: it leaves the scales transposed, and the next forward pass reads
them in the wrong order. So a weight is read here instead, and put in order before the model is saved.
"""

import copy
import importlib
from typing import Any

import torch
from torch import nn


def is_four_bit(module: nn.Module) -> bool:
    """Return whether the module's weight is one of bitsandbytes' 4-bit weights."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def codes_and_scales(weight: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a 4-bit weight's codes (uint8) and the scales of its blocks, both in the order of a file.

    The scales are float32, or bfloat16 if the weight has been reordered.
    """
    state = weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return weight.data, _scales(state)
    codes, _ = _functional()._convert_weight_packed_for_cpu_inverse(weight.data, copy.copy(state))
    return codes, state.absmax.T.reshape(-1)


def put_in_order(model: nn.Module) -> None:
    """Put all 4-bit weights of a model in the order of a file, so that `state_dict` gives what the model computes."""
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if is_four_bit(module) and getattr(weight.quant_state, "packing_format_for_cpu", False):
            scales = weight.quant_state.absmax.T.reshape(-1).float()
            weight.data, state = _functional()._convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
            if not state.nested:
                state.absmax = scales


def _scales(state: Any) -> torch.Tensor:
    """Return the scales of a weight's blocks, which may be quantised themselves."""
    if not state.nested:
        return state.absmax
    return _functional().dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def _functional() -> Any:
    # Only models that bitsandbytes has quantised come here. The inverse is private, but bitsandbytes has no other.
    return importlib.import_module("bitsandbytes.functional")
