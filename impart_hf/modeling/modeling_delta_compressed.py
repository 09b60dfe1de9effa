"""Loading a delta repository as a model of the fine-tuned model's own class, with reconstructed weights."""

import copy
import functools
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .checkpoints import config_for
from .configuration_delta_compressed import DeltaCompressedConfig
from .delta_record import DeltaFormatError
from .delta_repository import DeltaRepository
from .four_bit_weights import put_in_order
from .model_files import HubOptions, fetch_file, pinned
from .modeling_pruned import PRUNED_LANGUAGE_MODELS
from .repository_files import delta_digest, holds_delta, push_folder, repository_folder, save_repository
from .saved_configs import changed_configs
from .spread_models import is_spread, one_process_writes, true_in_any, values_are_dropped
from .weight_fingerprints import WeightFingerprints

logger = logging.get_logger(__name__)

_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
_NOT_FOR_THE_CONFIG = ("dtype", "torch_dtype", "quantization_config", "trust_remote_code")
_PUSH_ARGUMENTS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


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
    _delta_digest: str
    _delta_weights: WeightFingerprints

    @classmethod
    def _from_config(cls, config, **kwargs):
        """Make the plain inner model with random weights, for AutoModelForCausalLM.from_config."""
        inner = config.text_config if config.model_type == DeltaCompressedConfig.model_type else config
        model_class = inner_class(inner)
        return model_class._from_config(config_for(model_class, inner), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, base_model=None, **kwargs):
        """Load a delta repository as the fine-tuned model.

        Args:
            pretrained_model_name_or_path: local folder or Hub id of the delta repository.
            config: its configuration, if it has been read already.
            base_model: local folder or Hub id of the base model, instead of the recorded id and commit. Its tensors
                are always checked against the recorded checksums. Of a delta whose base is a delta repository, a dense
                model stands for the first base, a delta repository for the recorded one.
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
        if is_classifier(inner) and not issubclass(cls, DeltaCompressedForSequenceClassification):
            # It has no other head, so that no other class could be meant.
            logger.warning(f"'{source}' holds a {inner.__name__}: load it with AutoModelForSequenceClassification")
        elif not is_classifier(inner) and issubclass(cls, DeltaCompressedForSequenceClassification):
            raise ValueError(f"'{source}' holds a {inner.__name__}: load it with AutoModelForCausalLM")
        model_class = _delta_class(inner)
        with_info = kwargs.pop("output_loading_info", False)
        is_quantised = kwargs.get("quantization_config") is not None
        model, info = model_class.from_pretrained(
            None,
            *model_args,
            config=config_for(inner, config.text_config),
            state_dict=repository.lazy_state_dict(decoded=not values_are_dropped(is_quantised)),
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
        model._delta_digest = delta_digest(repository.file, config)
        model._delta_weights = WeightFingerprints(model)
        if adapter_path is not None:  # an Auto class was given an adapter of this model
            model.load_adapter(adapter_path, adapter_name=adapter_name, adapter_kwargs=adapter)
        return (model, info) if with_info else model

    def weights_changed(self) -> bool:
        """Return whether any weight has changed since the model was loaded: every number of every weight is compared.

        Moving the model to another device or dtype, copying, pickling or offloading it is no change. Weights that
        cannot be compared count as changed. Of a model that is spread over processes (`distributed_config`, `tp_plan`),
        each process compares its own part.
        """
        return self._delta_weights.differ(self)

    def _apply(self, fn, recurse=True):
        # Every method that casts or moves a model, or one that contains it, ends here.
        weights = self.__dict__.get("_delta_weights")
        return super()._apply(fn if weights is None else weights.watch(self, fn), recurse)

    def save_pretrained(  # type: ignore[override]
        self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs
    ):
        """Write the compressed repository again, byte for byte, with the configurations as they are now.

        Its weights, configurations and reader are written over what the folder holds. Tokenizer, model card and other
        files are copied only where the folder has none; if it has a tokenizer, that is kept whole.

        If the weights have changed since they were loaded, or cannot be compared, or if the repository that they were
        loaded from holds another model by now, the dense model is saved instead, with a warning. With adapters
        attached, the adapters are saved, as in transformers, with a warning if the weights below them have changed.

        A model that is spread over processes must be saved by all of them, as in transformers; the first one writes.

        Args:
            save_directory: folder to write to; made if missing.
            is_main_process, state_dict, push_to_hub, kwargs: as for any model; `push_to_hub=True` and `repo_id` push
                what was written. Sharding and variants apply to a dense model only.

        Raises:
            CheckpointError: if the repository that the model was loaded from no longer exists.
            OSError: if the folder cannot be written, for instance because the disk is full; it is then as it was.
            ValueError: if a changed configuration is not valid.
        """
        dense = {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub, **kwargs}
        if getattr(self, "_hf_peft_config_loaded", False):
            self._warn_of_adapters()
            return super().save_pretrained(save_directory, **dense)
        if state_dict is not None or true_in_any(self, self.weights_changed()):
            logger.warning(
                "The weights have changed since this model was loaded from a delta repository, so the dense model is "
                "saved; run `impart-hf compress` to make a delta repository of it."
            )
            return self._dense().save_pretrained(save_directory, **dense)
        if not is_main_process and not is_spread(self):
            return
        folder = repository_folder(*self._delta_source)
        if true_in_any(self, not self._is_still_in(folder)):
            return self._dense().save_pretrained(save_directory, **dense)
        with one_process_writes(self) as is_first:
            if is_first and is_main_process:
                save_repository(folder, Path(save_directory), changed_configs(self, folder))
        if push_to_hub:
            self.push_to_hub(
                kwargs.get("repo_id") or Path(save_directory).name,
                **{name: kwargs[name] for name in _PUSH_ARGUMENTS if name in kwargs},
            )

    def push_to_hub(self, repo_id, *, max_shard_size="50GB", tags=None, **kwargs):  # type: ignore[override]
        """Upload the compressed repository, with the configurations as they are now; arguments as for any model.

        As with any model, a card, a tokenizer or a licence that the repository on the Hub has is kept.

        Args:
            repo_id: repository on the Hub, created if missing.
            max_shard_size: for the dense model, which is pushed if the weights were trained.
            tags: added to the model card's tags.
            kwargs: commit_message, commit_description, private, token, revision, create_pr.

        Returns:
            The commit's URL; None in all processes but the first, if the model is spread over several.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            self._warn_of_adapters()
            return self._dense().push_to_hub(repo_id, max_shard_size=max_shard_size, tags=tags, **kwargs)
        if true_in_any(
            self, self.weights_changed() or not self._is_still_in(source := repository_folder(*self._delta_source))
        ):
            return self._dense().push_to_hub(repo_id, max_shard_size=max_shard_size, tags=tags, **kwargs)
        with one_process_writes(self) as is_first, tempfile.TemporaryDirectory() as folder:
            if not is_first:
                return None
            save_repository(source, Path(folder), changed_configs(self, source))
            return push_folder(Path(folder), repo_id, replaces_all=False, tags=tags, **kwargs)

    def _dense(self) -> PreTrainedModel:
        """Return a copy of the object, with the same parameters, that is saved as any model."""
        put_in_order(self)
        return _forget_delta(copy.copy(self))

    def _is_still_in(self, folder: Path) -> bool:
        """Return whether a folder still holds what this model was loaded from, with a warning if it does not."""
        if holds_delta(folder, self._delta_digest):
            return True
        logger.warning(
            f"'{folder}' holds another model now than when this model was loaded from it, so the dense model is "
            "saved; run `impart-hf compress` to make a delta repository of it."
        )
        return False

    def _warn_of_adapters(self) -> None:
        """Warn if an adapter that is saved alone would be applied to other weights than here."""
        if self._delta_weights.differ(self, new_count=False):
            logger.warning(
                f"The weights below the adapter have changed since this model was loaded from '{self._delta_source[0]}'"
                ", which the adapter will name as its base: only the adapter is saved. Remove it (delete_adapter) and "
                "save the model to a folder of its own first."
            )

    def __reduce__(self):
        return _restore, (self._inner_class,), self.__dict__

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
    """Return the model class that the fine-tuned model's configuration names.

    That is a language model's, one's for images and text, or a classifier's.

    Raises:
        ValueError: if transformers has no model that generates text for the configuration.
    """
    # By name: the Auto classes know it only if impart_hf is imported, and remote code may be imported twice.
    for model in PRUNED_LANGUAGE_MODELS:
        if text_config.model_type == model.config_class.model_type:
            return model
    candidates: list[Any] = []
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification):
        if auto_class is AutoModelForSequenceClassification and not candidates:
            raise ValueError(f"transformers has no causal language model for model_type '{text_config.model_type}'")
        known = auto_class._model_mapping.get(type(text_config), None)
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
    for name in ("delta_config", "_delta_source", "_delta_digest", "_delta_weights"):
        model.__dict__.pop(name, None)
    model.__class__ = model._inner_class  # type: ignore[assignment]
    return model


__all__ = ["DeltaCompressedForCausalLM", "DeltaCompressedForSequenceClassification"]
