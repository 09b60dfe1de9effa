"""Loading a delta repository as a model of the fine-tuned model's own class, with reconstructed weights."""

import copy
import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .checkpoints import HubOptions, fetch_file, pinned
from .configuration_delta_compressed import DeltaCompressedConfig
from .configuration_pruned_llama import PrunedLlamaConfig
from .delta_record import DeltaFormatError
from .delta_repository import DeltaRepository
from .modeling_pruned_llama import PrunedLlamaForCausalLM
from .repository_files import copy_repository, push_folder

logger = logging.get_logger(__name__)

_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
_NOT_FOR_THE_CONFIG = ("dtype", "torch_dtype", "quantization_config", "trust_remote_code")
_PUSH_ARGUMENTS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
_SAMPLES = 4096  # entries of a parameter that are kept to detect training
# Half the smallest positive float16: the most that a bfloat16 number changes by conversion to float16 and back.
_ROUNDING = 2.0**-25


class DeltaCompressedForCausalLM(PreTrainedModel):
    """A fine-tuned causal language model that was loaded from a compressed delta and its base model.

    `from_pretrained` returns an object whose class derives from this one and from the fine-tuned model's own (for
    instance `LlamaForCausalLM`). Its modules, parameter names and `config` are those of the fine-tuned model, so that
    generate, pipelines, PEFT, Trainer and torch.compile treat it as such. This class adds that saving writes the
    compressed repository again; `merge_and_unload` removes the addition.

    Attributes:
        delta_config: the repository's `DeltaCompressedConfig`.
    """

    config_class = DeltaCompressedConfig
    delta_config: DeltaCompressedConfig
    _inner_class: type[PreTrainedModel]
    _delta_source: tuple[str, HubOptions]
    _delta_samples: dict[str, tuple[torch.Size, int, torch.Tensor | None]]

    @classmethod
    def _from_config(cls, config, **kwargs):
        """Make the plain inner model with random weights, for AutoModelForCausalLM.from_config."""
        inner = config.text_config if config.model_type == DeltaCompressedConfig.model_type else config
        return inner_class(inner)._from_config(inner, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, base_model=None, **kwargs):
        """Load a delta repository as the fine-tuned model.

        Args:
            pretrained_model_name_or_path: local folder or Hub id of the delta repository.
            config: its configuration, if it has been read already.
            base_model: local folder or Hub id of the base model, instead of the recorded id and commit. Its tensors
                are always checked against the recorded checksums.
            kwargs: as for any model: dtype, device_map, max_memory, attn_implementation, quantization_config, …

        Raises:
            CheckpointError: if repository or base is missing, private or gated.
            DeltaFormatError: if the delta file is damaged.
            WrongBaseError: if the base is not the one that the delta was made against.
        """
        if kwargs.get("state_dict") is not None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        source = os.fspath(pretrained_model_name_or_path)
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        hub = {name: value for name, value in hub.items() if value is not None}
        options = pinned(source, HubOptions(**hub))
        hub |= {"revision": options.revision} if options.revision else {}
        adapter = dict(kwargs.pop("adapter_kwargs", None) or {})
        adapter_path, adapter_name = adapter.pop("_adapter_model_path", None), kwargs.pop("adapter_name", "default")
        # Not isinstance: transformers imports this class twice if it is remote code in a local folder.
        if getattr(config, "model_type", None) != DeltaCompressedConfig.model_type:
            # The configuration would store these options or refuse them.
            loading = {name: kwargs.pop(name) for name in _NOT_FOR_THE_CONFIG if name in kwargs}
            config, kwargs = DeltaCompressedConfig.from_pretrained(
                config or source, return_unused_kwargs=True, **hub, **kwargs
            )
            kwargs |= loading
        repository = DeltaRepository(source, config, options, base_model)
        inner = inner_class(config.text_config)
        if is_classifier(inner) != issubclass(cls, DeltaCompressedForSequenceClassification):
            auto_class = "AutoModelForSequenceClassification" if is_classifier(inner) else "AutoModelForCausalLM"
            raise ValueError(f"'{source}' holds a {inner.__name__}: load it with {auto_class}")
        model_class = _delta_class(inner)
        with_info = kwargs.pop("output_loading_info", False)
        model, info = model_class.from_pretrained(
            None,
            *model_args,
            config=config.text_config,
            state_dict=repository.lazy_state_dict(_decoding_device(kwargs.get("device_map"))),
            output_loading_info=True,
            **kwargs,
        )
        if info["missing_keys"]:  # transformers would continue with random weights
            raise DeltaFormatError(
                f"text_config of '{source}', with this call's arguments, describes a model with "
                f"{len(info['missing_keys'])} tensors that neither delta nor base has, such as "
                f"{min(info['missing_keys'])}"
            )
        model.name_or_path = model.config._name_or_path = source
        if kwargs.get("generation_config") is None and fetch_file(source, "generation_config.json", options):
            model.generation_config = GenerationConfig.from_pretrained(source, **hub)
        model.delta_config = config
        model._delta_source = (os.path.abspath(source) if os.path.isdir(source) else source, options)
        model._delta_samples = {name: _sample(parameter) for name, parameter in model.named_parameters()}
        if adapter_path is not None:  # an Auto class was given an adapter of this model
            model.load_adapter(adapter_path, adapter_name=adapter_name, adapter_kwargs=adapter)
        return (model, info) if with_info else model

    def weights_changed(self) -> bool:
        """Return whether the parameters have been trained, merged into or resized since they were loaded.

        Moving the model to another device or dtype does not count as a change.
        """
        now = dict(self.named_parameters())
        if now.keys() != self._delta_samples.keys():
            return True
        return any(_differs(self._delta_samples[name], parameter) for name, parameter in now.items())

    def save_pretrained(  # type: ignore[override]
        self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs
    ):
        """Write the compressed repository again, byte for byte.

        If the weights were trained after loading, the delta no longer describes them: the dense model is saved
        instead, with a warning. With adapters attached, the adapters are saved, as in transformers.

        Args:
            save_directory: folder to write to; made if missing.
            is_main_process, state_dict, push_to_hub, kwargs: as for any model; `push_to_hub=True` and `repo_id` push
                what was written. Sharding and variants apply to a dense model only.

        Raises:
            CheckpointError: if the repository that the model was loaded from no longer exists.
        """
        dense = {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub, **kwargs}
        if getattr(self, "_hf_peft_config_loaded", False):
            return super().save_pretrained(save_directory, **dense)
        if state_dict is not None or self.weights_changed():
            logger.warning(
                "The weights have changed since this model was loaded from a delta repository, so the dense model is "
                "saved; run `impart-hf compress` to make a delta repository of it."
            )
            return _forget_delta(copy.copy(self)).save_pretrained(save_directory, **dense)
        if not is_main_process:
            return
        copy_repository(*self._delta_source, Path(save_directory))
        if push_to_hub:
            self.push_to_hub(
                kwargs.get("repo_id") or Path(save_directory).name,
                **{name: kwargs[name] for name in _PUSH_ARGUMENTS if name in kwargs},
            )

    def push_to_hub(self, repo_id, *, max_shard_size="50GB", tags=None, **kwargs):  # type: ignore[override]
        """Upload the compressed repository with its model card; arguments as for any model.

        Args:
            repo_id: repository on the Hub, created if missing.
            max_shard_size: for the dense model, which is pushed if the weights were trained.
            tags: added to the model card's tags.
            kwargs: commit_message, commit_description, private, token, revision, create_pr.

        Returns:
            The commit's URL.
        """
        if self.weights_changed() or getattr(self, "_hf_peft_config_loaded", False):
            dense = _forget_delta(copy.copy(self))
            return dense.push_to_hub(repo_id, max_shard_size=max_shard_size, tags=tags, **kwargs)
        with tempfile.TemporaryDirectory() as folder:
            copy_repository(*self._delta_source, Path(folder))
            if tags:
                card = ModelCard.load(Path(folder, "README.md"))
                card.data.tags = sorted({*(card.data.tags or []), *tags})
                card.save(Path(folder, "README.md"))
            return push_folder(Path(folder), repo_id, **kwargs)

    def __reduce__(self):
        # A copy restarts its parameters' version counters, so changes must be detected now: without samples, the
        # copy counts as changed.
        state = {**self.__dict__, "_delta_samples": {}} if self.weights_changed() else self.__dict__
        return _restore, (self._inner_class,), state

    def __setstate__(self, state):
        super().__setstate__(state)
        parameters = dict(self.named_parameters())
        self._delta_samples = {
            name: (shape, _version(parameters[name]), entries)
            for name, (shape, _, entries) in self._delta_samples.items()
        }

    def merge_and_unload(self):
        """Turn this object into the plain fine-tuned model, for instance a `LlamaForCausalLM`, and return it.

        Like PEFT's method, it works in place and keeps the parameters.
        """
        _forget_delta(self)
        return self


class DeltaCompressedForSequenceClassification(DeltaCompressedForCausalLM):
    """A classifier or reward model that was loaded from a compressed delta and its base model.

    `AutoModelForSequenceClassification.from_pretrained` returns one. Everything is as for causal language models.
    """


def inner_class(text_config: PreTrainedConfig) -> Any:
    """Return the model class that the fine-tuned model's configuration names: a language model's or a classifier's.

    Raises:
        ValueError: if transformers has no causal language model for the configuration.
    """
    # By name: the Auto classes know it only if impart_hf is imported, and remote code may be imported twice.
    if text_config.model_type == PrunedLlamaConfig.model_type:
        return PrunedLlamaForCausalLM
    candidates: list[Any] = []
    for auto_class in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        known = auto_class._model_mapping.get(type(text_config), None)
        if known is None and not candidates:
            raise ValueError(f"transformers has no causal language model for model_type '{text_config.model_type}'")
        candidates += [] if known is None else known if isinstance(known, (list, tuple)) else [known]
    architectures = getattr(text_config, "architectures", None) or []
    return next((c for c in candidates if c.__name__ in architectures), candidates[0])


def is_classifier(inner: type[PreTrainedModel]) -> bool:
    """Return whether a model class is a sequence classifier, as reward models are."""
    return inner.__name__.endswith("ForSequenceClassification")


@functools.cache
def _delta_class(inner: Any) -> Any:
    """Return the class derived from ours and the inner class; cached, so that two loads give objects of one type.

    It has the inner class's name and module, because transformers reads them: to rename or merge weights (GPT-NeoX),
    to choose a cache (Mamba), and to distinguish custom code from its own.
    """
    members = {
        "config_class": inner.config_class,
        "_auto_class": inner._auto_class,
        "_inner_class": inner,
        "__module__": inner.__module__,
    }
    ours = DeltaCompressedForSequenceClassification if is_classifier(inner) else DeltaCompressedForCausalLM
    return type(inner.__name__, (ours, inner), members)


def _restore(inner: Any) -> PreTrainedModel:
    """Make an empty object of the derived class for pickle, which cannot find a class made at run time."""
    cls = _delta_class(inner)
    return cls.__new__(cls)


def _forget_delta(model: DeltaCompressedForCausalLM) -> PreTrainedModel:
    """Turn the object into one of its plain inner class."""
    for name in ("delta_config", "_delta_source", "_delta_samples"):
        model.__dict__.pop(name, None)
    model.__class__ = model._inner_class  # type: ignore[assignment]
    return model


def _decoding_device(device_map: Any) -> torch.device:
    """Return the device to decode on: an accelerator if the model will use one (transformers moves each tensor)."""
    targets = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    for target in targets:
        if isinstance(target, int) or target in ("auto", "balanced", "balanced_low_0", "sequential"):
            accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            return torch.device("cpu") if accelerator is None else accelerator
        if target is not None and target != "disk" and torch.device(target).type not in ("cpu", "meta"):
            return torch.device(target)
    return torch.device("cpu")


def _version(parameter: torch.Tensor) -> int:
    """Return torch's count of in-place writes to the tensor, or 0 if torch does not count them."""
    return 0 if parameter.is_inference() else parameter._version


def _sample(parameter: torch.Tensor) -> tuple[torch.Size, int, torch.Tensor | None]:
    """Return what detects changes of a parameter: its shape, version and evenly spaced entries."""
    version = _version(parameter)
    if parameter.device.type == "meta" or not parameter.is_floating_point() or type(parameter.data) is not torch.Tensor:
        return parameter.shape, version, None  # offloaded or quantised: its entries cannot be read
    flat = parameter.detach().reshape(-1)
    return parameter.shape, version, flat[:: max(1, flat.numel() // _SAMPLES)].cpu().clone()


def _differs(before: tuple[torch.Size, int, torch.Tensor | None], parameter: torch.Tensor) -> bool:
    shape, version, entries = _sample(parameter)
    if shape != before[0] or version > before[1]:
        return True
    if entries is None or before[2] is None:
        return False
    return not torch.allclose(before[2].to(entries.dtype), entries, rtol=0, atol=_ROUNDING)


__all__ = ["DeltaCompressedForCausalLM", "DeltaCompressedForSequenceClassification"]
