"""impart-hf: fine-tuned language models as small compressed deltas against their base.

Importing this package registers the configuration and model classes with transformers' Auto classes. Everything else is
imported when it is first used. Every method's class (`ImPartConfig`, …) is public here: see `impart_hf.methods`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .common.version import __version__ as __version__
from .registration import is_command_line, register_with_transformers

if TYPE_CHECKING:  # names for the type checker
    from .checkpointing.callback import DeltaCheckpointCallback as DeltaCheckpointCallback
    from .compression.compress import compress as compress
    from .compression.flatten import flatten as flatten
    from .compression.forecast import forecast as forecast
    from .compression.resources import Forecast as Forecast
    from .compression.target import QualityTarget as QualityTarget
    from .compression.tune import tune as tune
    from .delta_adapters.model import DeltaModel as DeltaModel
    from .delta_adapters.model import load_delta as load_delta
    from .differences.diff import diff as diff
    from .differences.report import DiffReport as DiffReport
    from .distillation import DistillSettings as DistillSettings
    from .merging.config import MergeConfig as MergeConfig
    from .merging.config import MergeModel as MergeModel
    from .merging.merge import merge as merge
    from .methods import BitDeltaConfig as BitDeltaConfig
    from .methods import DareConfig as DareConfig
    from .methods import DareQtConfig as DareQtConfig
    from .methods import DeltaComeConfig as DeltaComeConfig
    from .methods import ExactConfig as ExactConfig
    from .methods import ImPartConfig as ImPartConfig
    from .methods import ImPartQtConfig as ImPartQtConfig
    from .methods import ImPartRdConfig as ImPartRdConfig
    from .methods import LowRankConfig as LowRankConfig
    from .modeling.configuration_delta_compressed import DeltaCompressedConfig as DeltaCompressedConfig
    from .modeling.configuration_pruned_llama import PrunedLlamaConfig as PrunedLlamaConfig
    from .modeling.modeling_delta_compressed import DeltaCompressedForCausalLM as DeltaCompressedForCausalLM
    from .modeling.modeling_delta_compressed import (
        DeltaCompressedForSequenceClassification as DeltaCompressedForSequenceClassification,
    )
    from .modeling.modeling_pruned_llama import PrunedLlamaForCausalLM as PrunedLlamaForCausalLM
    from .modeling.modeling_pruned_llama import PrunedLlamaModel as PrunedLlamaModel

# The modules of the public names, except the methods' classes.
_MODULES = {
    "DeltaCheckpointCallback": "checkpointing.callback",
    "compress": "compression.compress",
    "flatten": "compression.flatten",
    "forecast": "compression.forecast",
    "Forecast": "compression.resources",
    "QualityTarget": "compression.target",
    "tune": "compression.tune",
    "DeltaModel": "delta_adapters.model",
    "load_delta": "delta_adapters.model",
    "diff": "differences.diff",
    "DiffReport": "differences.report",
    "DistillSettings": "distillation",
    "MergeConfig": "merging.config",
    "MergeModel": "merging.config",
    "merge": "merging.merge",
    "DeltaCompressedConfig": "modeling.configuration_delta_compressed",
    "DeltaCompressedForCausalLM": "modeling.modeling_delta_compressed",
    "DeltaCompressedForSequenceClassification": "modeling.modeling_delta_compressed",
    "PrunedLlamaConfig": "modeling.configuration_pruned_llama",
    "PrunedLlamaForCausalLM": "modeling.modeling_pruned_llama",
    "PrunedLlamaModel": "modeling.modeling_pruned_llama",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    if name == "__all__" or name.endswith("Config"):
        methods = importlib.import_module(f"{__name__}.methods").PUBLIC
        if name == "__all__":
            return sorted([*_MODULES, *methods])
        if name in methods:
            return methods[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


if not is_command_line():
    register_with_transformers()
