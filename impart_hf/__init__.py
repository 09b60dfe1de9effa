"""impart-hf: fine-tuned language models as small compressed deltas against their base.

Importing this package registers the configuration and model classes with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .compress import compress
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
from .tune import tune

AutoConfig.register("delta_compressed", DeltaCompressedConfig, exist_ok=True)
AutoModelForCausalLM.register(DeltaCompressedConfig, DeltaCompressedForCausalLM, exist_ok=True)
AutoConfig.register("pruned_llama", PrunedLlamaConfig, exist_ok=True)
AutoModel.register(PrunedLlamaConfig, PrunedLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(PrunedLlamaConfig, PrunedLlamaForCausalLM, exist_ok=True)

__version__ = "0.1.0"

__all__ = [
    "BitDeltaConfig",
    "DareConfig",
    "DareQtConfig",
    "DeltaComeConfig",
    "DeltaCompressedConfig",
    "DeltaCompressedForCausalLM",
    "ImPartConfig",
    "ImPartQtConfig",
    "ImPartRdConfig",
    "LowRankConfig",
    "MergeConfig",
    "MergeModel",
    "PrunedLlamaConfig",
    "PrunedLlamaForCausalLM",
    "compress",
    "merge",
    "tune",
]
