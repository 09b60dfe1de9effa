"""Configuration of a delta repository."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_pruned import PRUNED_CONFIGS

FORMAT_VERSION = 1
# Fields of `text_config` that transformers looks for in any configuration in order to check, convert or write them.
_INNER_ONLY = ("auto_map", "layer_types", "mtp_layer_types", "quantization_config", "rope_parameters")
# A classifier's labels, from which `num_labels` is counted: any configuration has them, and `text_config`'s are meant.
_LABELS = ("id2label", "label2id")


@strict
class DeltaCompressedConfig(PreTrainedConfig):
    """Configuration of a delta repository: the fine-tuned model's configuration, and its base.

    Fields of the fine-tuned model, such as `hidden_size` or `vocab_size`, can be read and set here too.

    Attributes:
        text_config: the fine-tuned model's whole configuration (a dict is converted to its class).
        base_model_name_or_path: Hub id or local folder of the base model.
        base_model_revision: commit of the base on the Hub; None for a local folder.
        base_is_delta: whether the base is a delta repository itself.
        method: the method's name and all its settings, as given to the writer.
        format_version: version of the file format (docs/FORMAT.md).
        tensor_dtype: dtype of the fine-tuned tensors as published, e.g. "bfloat16".
        tensor_dtype_exceptions: dtypes of the tensors that have another one, by name.
        absent_tensors: tensors of the base that the fine-tuned model does not have.
        row_counts: how many of the base tensor's first rows a tensor has, by name, where it does not have all.
        base_tensors: the base's tensor on which a tensor rests, by name, where the base has none of that name.

    Raises:
        ValueError: if this reader does not know the format version, or `text_config` has no model type.
    """

    model_type = "delta_compressed"
    sub_configs = {"text_config": AutoConfig}  # type: ignore[dict-item]

    text_config: dict | PreTrainedConfig | None = None
    base_model_name_or_path: str = ""
    base_model_revision: str | None = None
    base_is_delta: bool = False
    method: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION
    tensor_dtype: str = "bfloat16"
    tensor_dtype_exceptions: dict[str, str] | None = None
    absent_tensors: list[str] | None = None
    row_counts: dict[str, int] | None = None
    base_tensors: dict[str, str] | None = None

    def __post_init__(self, **kwargs):
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"the delta repository has format version {self.format_version}, this reader knows version "
                f"{FORMAT_VERSION}: upgrade impart-hf"
            )
        if isinstance(self.text_config, dict):
            model_type = self.text_config.get("model_type")
            if not isinstance(model_type, str):
                raise ValueError("text_config has no model_type: this config.json is not that of a delta repository")
            fields = {k: v for k, v in self.text_config.items() if k != "model_type"}
            if model_type in PRUNED_CONFIGS:  # the Auto classes know it only if impart_hf is imported
                self.text_config = PRUNED_CONFIGS[model_type].from_dict(fields)
            else:
                self.text_config = AutoConfig.for_model(model_type, **fields)
        if self.text_config is not None:
            self.__dict__["tie_word_embeddings"] = getattr(self.text_config, "tie_word_embeddings", False)
        super().__post_init__(**kwargs)
        if isinstance(self.text_config, PreTrainedConfig):
            for name in _LABELS:  # in a file that is written, they stand at their defaults beside `text_config`
                self.__dict__[name] = self.__dict__.get(name) or getattr(PreTrainedConfig(), name)

    def _is_inner(self, name: str) -> bool:
        """Return whether a name is that of a field of `text_config` and of none of this configuration, or of labels."""
        inner = self.__dict__.get("text_config")
        if not isinstance(inner, PreTrainedConfig) or name.startswith("_") or name in _INNER_ONLY:
            return False
        if name in _LABELS:
            return True
        is_own = name in self.__dict__ or hasattr(type(self), name)
        return not is_own and (name in inner.__dict__ or name in inner.attribute_map)

    def __getattribute__(self, name: str) -> Any:
        # Labels are found here too, so that Python would not call `__getattr__` for them.
        if name in _LABELS and self._is_inner(name):
            return getattr(self.__dict__["text_config"], name)
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        # Python calls this only for what is not found otherwise; copies ask for names before they have any fields.
        if self._is_inner(name):
            return getattr(self.__dict__["text_config"], name)
        raise AttributeError(f"'{type(self).__name__}' has no attribute '{name}'")

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_inner(name):
            setattr(self.__dict__["text_config"], name, value)
        else:
            super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Build from a dict as any configuration; arguments such as use_cache=False are set in `text_config`."""
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        # What the file holds is no choice of the caller's: the field is set in text_config alone.
        own_arguments = {name: value for name, value in kwargs.items() if name != "tie_word_embeddings"}
        config, unused = super().from_dict(config_dict, return_unused_kwargs=True, **own_arguments)
        own = {*cls.__annotations__, "name_or_path"}
        for name, value in kwargs.items():
            if name not in own and hasattr(config.text_config, name) and value != "auto":
                setattr(config.text_config, name, value)
                unused.pop(name, None)
        return (config, unused) if return_unused_kwargs else config


__all__ = ["DeltaCompressedConfig"]
