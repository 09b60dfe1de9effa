"""vLLM's model classes for our repositories, created when vLLM asks for them.

The attribute `DeltaCompressedLlamaForCausalLM@0.32.0` of this module is vLLM 0.32.0's `LlamaForCausalLM`, under a name
that tells vLLM to load its weights from a delta repository. There is one for each of vLLM's classes that can be a
fine-tuned model. vLLM's models are imported only then, because the plugin must not initialise a device.
"""

import functools
from typing import Any

from .pruned_models import PRUNED_ARCHITECTURES, pruned_class

DELTA_PREFIX = "DeltaCompressed"


@functools.cache
def _model_class(name: str) -> type:
    if name in PRUNED_ARCHITECTURES:
        return pruned_class(name)
    from vllm import ModelRegistry

    inner = ModelRegistry.models[name.removeprefix(DELTA_PREFIX)].load_model_cls()
    return type(name, (inner,), {"__module__": __name__})


def __getattr__(attribute: str) -> Any:
    name, at, _ = attribute.partition("@")
    if not at:
        raise AttributeError(f"module {__name__} has no attribute {attribute}")
    return _model_class(name)
