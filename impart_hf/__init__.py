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
    from .modeling.configuration_pruned import PrunedGemma2Config as PrunedGemma2Config
    from .modeling.configuration_pruned import PrunedGemma3TextConfig as PrunedGemma3TextConfig
    from .modeling.configuration_pruned import PrunedLlamaConfig as PrunedLlamaConfig
    from .modeling.configuration_pruned import PrunedMistralConfig as PrunedMistralConfig
    from .modeling.configuration_pruned import PrunedPhi3Config as PrunedPhi3Config
    from .modeling.configuration_pruned import PrunedQwen2Config as PrunedQwen2Config
    from .modeling.configuration_pruned import PrunedQwen3Config as PrunedQwen3Config
    from .modeling.modeling_delta_compressed import DeltaCompressedForCausalLM as DeltaCompressedForCausalLM
    from .modeling.modeling_delta_compressed import (
        DeltaCompressedForSequenceClassification as DeltaCompressedForSequenceClassification,
    )
    from .modeling.modeling_pruned import PrunedGemma2ForCausalLM as PrunedGemma2ForCausalLM
    from .modeling.modeling_pruned import PrunedGemma2Model as PrunedGemma2Model
    from .modeling.modeling_pruned import PrunedGemma3ForCausalLM as PrunedGemma3ForCausalLM
    from .modeling.modeling_pruned import PrunedGemma3TextModel as PrunedGemma3TextModel
    from .modeling.modeling_pruned import PrunedLlamaForCausalLM as PrunedLlamaForCausalLM
    from .modeling.modeling_pruned import PrunedLlamaModel as PrunedLlamaModel
    from .modeling.modeling_pruned import PrunedMistralForCausalLM as PrunedMistralForCausalLM
    from .modeling.modeling_pruned import PrunedMistralModel as PrunedMistralModel
    from .modeling.modeling_pruned import PrunedPhi3ForCausalLM as PrunedPhi3ForCausalLM
    from .modeling.modeling_pruned import PrunedPhi3Model as PrunedPhi3Model
    from .modeling.modeling_pruned import PrunedQwen2ForCausalLM as PrunedQwen2ForCausalLM
    from .modeling.modeling_pruned import PrunedQwen2Model as PrunedQwen2Model
    from .modeling.modeling_pruned import PrunedQwen3ForCausalLM as PrunedQwen3ForCausalLM
    from .modeling.modeling_pruned import PrunedQwen3Model as PrunedQwen3Model

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
    "PrunedGemma2Config": "modeling.configuration_pruned",
    "PrunedGemma3TextConfig": "modeling.configuration_pruned",
    "PrunedLlamaConfig": "modeling.configuration_pruned",
    "PrunedMistralConfig": "modeling.configuration_pruned",
    "PrunedPhi3Config": "modeling.configuration_pruned",
    "PrunedQwen2Config": "modeling.configuration_pruned",
    "PrunedQwen3Config": "modeling.configuration_pruned",
    "PrunedGemma2ForCausalLM": "modeling.modeling_pruned",
    "PrunedGemma2Model": "modeling.modeling_pruned",
    "PrunedGemma3ForCausalLM": "modeling.modeling_pruned",
    "PrunedGemma3TextModel": "modeling.modeling_pruned",
    "PrunedLlamaForCausalLM": "modeling.modeling_pruned",
    "PrunedLlamaModel": "modeling.modeling_pruned",
    "PrunedMistralForCausalLM": "modeling.modeling_pruned",
    "PrunedMistralModel": "modeling.modeling_pruned",
    "PrunedPhi3ForCausalLM": "modeling.modeling_pruned",
    "PrunedPhi3Model": "modeling.modeling_pruned",
    "PrunedQwen2ForCausalLM": "modeling.modeling_pruned",
    "PrunedQwen2Model": "modeling.modeling_pruned",
    "PrunedQwen3ForCausalLM": "modeling.modeling_pruned",
    "PrunedQwen3Model": "modeling.modeling_pruned",
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
