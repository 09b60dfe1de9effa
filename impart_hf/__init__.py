"""impart-hf: fine-tuned language models as small compressed deltas against their base.

Importing this package registers the configuration and model classes with transformers' Auto classes. Everything else is
imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .registration import is_command_line, register_with_transformers

if TYPE_CHECKING:
    from .compression.compress import compress
    from .compression.tune import tune
    from .distillation import DistillSettings
    from .merging.config import MergeConfig, MergeModel
    from .merging.merge import merge
    from .methods import (
        BitDeltaConfig,
        DareConfig,
        DareQtConfig,
        DeltaComeConfig,
        ImPartConfig,
        ImPartQtConfig,
        ImPartRdConfig,
        LowRankConfig,
    )
    from .modeling.configuration_delta_compressed import DeltaCompressedConfig
    from .modeling.configuration_pruned_llama import PrunedLlamaConfig
    from .modeling.modeling_delta_compressed import DeltaCompressedForCausalLM
    from .modeling.modeling_pruned_llama import PrunedLlamaForCausalLM, PrunedLlamaModel

__version__ = "0.1.0"

_METHODS = ("BitDelta", "Dare", "DareQt", "DeltaCome", "ImPart", "ImPartQt", "ImPartRd", "LowRank")
_HOMES = {
    "compress": "compression.compress",
    "tune": "compression.tune",
    "DistillSettings": "distillation",
    "MergeConfig": "merging.config",
    "MergeModel": "merging.config",
    "merge": "merging.merge",
    "DeltaCompressedConfig": "modeling.configuration_delta_compressed",
    "DeltaCompressedForCausalLM": "modeling.modeling_delta_compressed",
    "PrunedLlamaConfig": "modeling.configuration_pruned_llama",
    "PrunedLlamaForCausalLM": "modeling.modeling_pruned_llama",
    "PrunedLlamaModel": "modeling.modeling_pruned_llama",
    **{f"{method}Config": "methods" for method in _METHODS},
}

__all__ = [
    "BitDeltaConfig",
    "DareConfig",
    "DareQtConfig",
    "DeltaComeConfig",
    "DeltaCompressedConfig",
    "DeltaCompressedForCausalLM",
    "DistillSettings",
    "ImPartConfig",
    "ImPartQtConfig",
    "ImPartRdConfig",
    "LowRankConfig",
    "MergeConfig",
    "MergeModel",
    "PrunedLlamaConfig",
    "PrunedLlamaForCausalLM",
    "PrunedLlamaModel",
    "compress",
    "merge",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not is_command_line():
    register_with_transformers()
