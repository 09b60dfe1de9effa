"""The configuration that vLLM sees for a delta repository: that of its fine-tuned model."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from vllm import ModelRegistry
from vllm.transformers_utils.config import HFConfigParser

from ..modeling.configuration_delta_compressed import DeltaCompressedConfig
from .model_classes import DELTA_PREFIX


class DeltaConfigParser(HFConfigParser):
    """vLLM's parser of config.json, which presents a delta repository as its fine-tuned model.

    vLLM then treats it as a LLaMA (a Mistral, a Qwen, …) in every respect, overrides included, but with a model class
    whose weights are read from base and delta.
    """

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict, PreTrainedConfig]:
        """Parse like vLLM's parser; for a delta repository, return `text_config` with one of our model classes.

        Raises:
            ValueError: if the repository has no inner configuration, or not that of a language model.
        """
        fields, config = super().parse(model, trust_remote_code, revision, code_revision, **kwargs)
        if config.model_type != DeltaCompressedConfig.model_type:
            return fields, config
        inner = config.text_config
        if inner is None or inner.model_type == config.model_type:
            raise ValueError(f"config.json of '{model}' has no text_config of a fine-tuned model")
        if str((inner.architectures or [None])[0]).endswith("ForSequenceClassification"):
            raise ValueError(
                f"'{model}' is a sequence classifier, and deltas of language models alone can be served: make it dense "
                "with `impart-hf reconstruct`"
            )
        # vLLM takes the first architecture that it knows. Some of its models also look for their transformers class.
        inner.architectures = [_delta_architecture(inner), *(inner.architectures or ())]
        inner._name_or_path = str(model)
        if inner.dtype is None:  # otherwise vLLM infers it from the delta file, whose entries have other dtypes
            inner.dtype = config.tensor_dtype
        return fields["text_config"], inner


def _delta_architecture(config: PreTrainedConfig) -> str:
    """Return our model class for a fine-tuned model's configuration; transformers' own code if vLLM has no class."""
    known = ModelRegistry.get_supported_archs()
    for name in config.architectures or ():
        if DELTA_PREFIX + name in known:
            return DELTA_PREFIX + name
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return DELTA_PREFIX + ("TransformersMoEForCausalLM" if experts else "TransformersForCausalLM")
