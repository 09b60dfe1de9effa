"""Serving with vLLM.

Installed, this package makes `vllm serve` and `LLM` take delta repositories and pruned LLaMA like any other model.
What is here for users is swapping the delta of a running engine.
"""

from .deltas import CheckedDelta, DeltaRefusedError
from .swap import AsyncDeltaSwitch, DeltaSwitch, EngineUnsoundError, SwapError

__all__ = ["AsyncDeltaSwitch", "CheckedDelta", "DeltaRefusedError", "DeltaSwitch", "EngineUnsoundError", "SwapError"]
