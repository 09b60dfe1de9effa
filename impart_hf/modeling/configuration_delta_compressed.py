"""Configuration of a delta repository."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_pruned_llama import PrunedLlamaConfig

FORMAT_VERSION = 1


@strict
class DeltaCompressedConfig(PreTrainedConfig):
    """What a delta repository is made of: the fine-tuned model's own configuration, and where its base is.

    Attributes:
        text_config: the fine-tuned model's whole configuration (a dict is turned into its class).
        base_model_name_or_path: Hub id or local folder of the base model.
        base_model_revision: commit of the base on the Hub; None for a local folder.
        method: the method's name and all its hyperparameters, as the writer was given them.
        format_version: version of the file format (docs/FORMAT.md).
        tensor_dtype: dtype of the fine-tuned tensors as stored by their publisher, e.g. "bfloat16".
        tensor_dtype_exceptions: dtypes of the tensors that differ from that, by name.

    Raises:
        ValueError: if the repository has a format version that this reader does not know.
    """

    model_type = "delta_compressed"
    sub_configs = {"text_config": AutoConfig}  # type: ignore[dict-item]

    text_config: dict | PreTrainedConfig | None = None
    base_model_name_or_path: str = ""
    base_model_revision: str | None = None
    method: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION
    tensor_dtype: str = "bfloat16"
    tensor_dtype_exceptions: dict[str, str] | None = None

    def __post_init__(self, **kwargs):
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"the delta repository has format version {self.format_version}, this reader knows version "
                f"{FORMAT_VERSION}: upgrade impart-hf"
            )
        if isinstance(self.text_config, dict):
            model_type = self.text_config.get("model_type")
            if not isinstance(model_type, str):
                raise ValueError("text_config names no model_type: this config.json is not of a delta repository")
            fields = {k: v for k, v in self.text_config.items() if k != "model_type"}
            if model_type == PrunedLlamaConfig.model_type:  # which the Auto classes know only with impart_hf imported
                self.text_config = PrunedLlamaConfig.from_dict(fields)
            else:
                self.text_config = AutoConfig.for_model(model_type, **fields)
        if self.text_config is not None:
            self.tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As for any configuration; arguments about the model, such as use_cache=False, reach its own configuration."""
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        own = {*cls.__annotations__, "name_or_path"}
        for name, value in kwargs.items():
            if name not in own and hasattr(config.text_config, name) and value != "auto":
                setattr(config.text_config, name, value)
                unused.pop(name, None)
        return (config, unused) if return_unused_kwargs else config


__all__ = ["DeltaCompressedConfig"]
