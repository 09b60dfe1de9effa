"""vLLM's model classes for our repositories, made when vLLM asks for them.

Attribute `DeltaCompressedLlamaForCausalLM@0.32.0` of this module is the class that loads a delta repository into vLLM
0.32.0's `LlamaForCausalLM`; there is one for each of vLLM's classes that can be a fine-tuned model. Nothing of vLLM is
imported before: the plugin must not touch a device.
"""

import functools
from typing import Any

DELTA_PREFIX = "DeltaCompressed"
PRUNED_LLAMA = "PrunedLlamaForCausalLM"


@functools.cache
def _model_class(name: str) -> type:
    if name == PRUNED_LLAMA:
        from .pruned_llama import PrunedLlamaForCausalLM

        return PrunedLlamaForCausalLM
    from vllm import ModelRegistry

    from .delta_weights import DeltaWeights

    inner = ModelRegistry.models[name.removeprefix(DELTA_PREFIX)].load_model_cls()
    return type(name, (DeltaWeights, inner), {"__module__": __name__})


def __getattr__(attribute: str) -> Any:
    name, at, _ = attribute.partition("@")
    if not at:
        raise AttributeError(f"module {__name__} has no attribute {attribute}")
    return _model_class(name)
