"""vLLM's model classes for our repositories, made when vLLM asks for them.

Attribute `DeltaCompressedLlamaForCausalLM@0.32.0` of this module is vLLM 0.32.0's `LlamaForCausalLM`, under the name
by which vLLM knows that its weights are to be loaded from a delta repository; there is one for each of vLLM's classes
that can be a fine-tuned model. No model of vLLM is imported before: the plugin must not touch a device.
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

    inner = ModelRegistry.models[name.removeprefix(DELTA_PREFIX)].load_model_cls()
    return type(name, (inner,), {"__module__": __name__})


def __getattr__(attribute: str) -> Any:
    name, at, _ = attribute.partition("@")
    if not at:
        raise AttributeError(f"module {__name__} has no attribute {attribute}")
    return _model_class(name)
