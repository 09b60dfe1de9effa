"""Serving with vLLM.

Installed, this package makes `vllm serve` and `LLM` take delta repositories and pruned LLaMA like any other model.
What is here for users is swapping the delta of a running engine.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .deltas import CheckedDelta, DeltaRefusedError
    from .swap import AsyncDeltaSwitch, DeltaSwitch, EngineUnsoundError, SwapError

# Every process of vLLM imports this package to register classes: what swaps need is imported when it is first used.
_HOMES = {
    "AsyncDeltaSwitch": "swap",
    "CheckedDelta": "deltas",
    "DeltaRefusedError": "deltas",
    "DeltaSwitch": "swap",
    "EngineUnsoundError": "swap",
    "SwapError": "swap",
}

__all__ = ["AsyncDeltaSwitch", "CheckedDelta", "DeltaRefusedError", "DeltaSwitch", "EngineUnsoundError", "SwapError"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
