"""Serving with vLLM.

Once installed, this package makes `vllm serve` and `LLM` accept delta repositories and pruned models like any other
model. Its public names are for swapping the delta of a running engine.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .deltas import CheckedDelta
    from .engine_base import DeltaRefusedError
    from .swap import AsyncDeltaSwitch, DeltaSwitch, EngineUnsoundError, SwapError

# Every process of vLLM imports this package to register classes, so the modules for swaps are imported on first use.
_MODULES = {
    "AsyncDeltaSwitch": "swap",
    "CheckedDelta": "deltas",
    "DeltaRefusedError": "engine_base",
    "DeltaSwitch": "swap",
    "EngineUnsoundError": "swap",
    "SwapError": "swap",
}

__all__ = ["AsyncDeltaSwitch", "CheckedDelta", "DeltaRefusedError", "DeltaSwitch", "EngineUnsoundError", "SwapError"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
