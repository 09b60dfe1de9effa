"""The configuration that vLLM sees of a delta repository: its fine-tuned model's own."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from vllm import ModelRegistry
from vllm.transformers_utils.config import HFConfigParser

from ..modeling.configuration_delta_compressed import DeltaCompressedConfig
from .model_classes import DELTA_PREFIX


class DeltaConfigParser(HFConfigParser):
    """vLLM's parser of config.json, which takes a delta repository for the model that it stands for.

    To vLLM it then is a LLaMA (a Mistral, a Qwen, …) in every respect, overrides included, with a model class that
    reads its weights in another way.
    """

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict, PreTrainedConfig]:
        """As vLLM's; of a delta repository, `text_config` and the name of one of our model classes.

        Raises:
            ValueError: if the repository has no inner configuration.
        """
        fields, config = super().parse(model, trust_remote_code, revision, code_revision, **kwargs)
        if config.model_type != DeltaCompressedConfig.model_type:
            return fields, config
        inner = config.text_config
        if inner is None or inner.model_type == config.model_type:
            raise ValueError(f"config.json of '{model}' has no text_config of a fine-tuned model")
        # vLLM takes the first that it knows; some of its models look for the transformers class that they stand for.
        inner.architectures = [_delta_architecture(inner), *(inner.architectures or ())]
        inner._name_or_path = str(model)
        if inner.dtype is None:  # vLLM would look for it in the delta file, whose entries say nothing of it
            inner.dtype = config.tensor_dtype
        return fields["text_config"], inner


def _delta_architecture(config: PreTrainedConfig) -> str:
    """Our model class for a fine-tuned model's configuration; transformers' own code where vLLM has no class for it."""
    known = ModelRegistry.get_supported_archs()
    for name in config.architectures or ():
        if DELTA_PREFIX + name in known:
            return DELTA_PREFIX + name
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return DELTA_PREFIX + ("TransformersMoEForCausalLM" if experts else "TransformersForCausalLM")
