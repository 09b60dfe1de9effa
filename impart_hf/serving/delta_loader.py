"""Loading a delta repository into one of vLLM's models: base plus decoded delta, tensor by tensor."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ..modeling.model_files import repository_kind
from ..modeling.repository_kind import RepositoryKind
from .completeness import check_complete
from .engine_files import decoded_tensors, hub_options, open_served

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

LOAD_FORMAT = "impart_hf"
_REPLACED_FORMATS = ("auto", "hf", "safetensors")
_DUMMY_FORMAT = "dummy"  # random weights, without reading any file


@register_model_loader(LOAD_FORMAT)
class DeltaLoader(DefaultModelLoader):
    """vLLM's default loader, which reads the tensors of a delta repository from base and delta instead of its files.

    Other models, such as a draft model or a checkpoint from which weights are reloaded, are loaded as usual.
    """

    def __init__(self, load_config: LoadConfig):
        super().__init__(replace(load_config, load_format="auto"))

    def get_all_weights(
        self, model_config: "ModelConfig", model: torch.nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the tensors of a model, by name, one at a time.

        Raises:
            CheckpointError, DeltaFormatError, WrongBaseError: if delta or base is missing, damaged or changed.
        """
        options = hub_options(model_config, self.load_config, model_config.revision)
        if repository_kind(model_config.model, options) is not RepositoryKind.DELTA:
            return super().get_all_weights(model_config, model)
        self.counter_before_loading_weights = time.perf_counter()  # vLLM logs the time that has passed since
        repository = open_served(model_config.model, options)
        check_complete(repository, repository.text_config)
        return decoded_tensors(repository, next(model.parameters()).device)

    def download_model(self, model_config: "ModelConfig") -> None:
        options = hub_options(model_config, self.load_config, model_config.revision)
        if repository_kind(model_config.model, options) is RepositoryKind.DELTA:
            open_served(model_config.model, options)
        else:
            super().download_model(model_config)


class _LoadsDelta(VerifyAndUpdateConfig):
    """The class that vLLM asks to check an engine's settings if its model is a delta repository."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Set the load format to that of `DeltaLoader`.

        Raises:
            ValueError: if the engine's settings do not allow a delta repository.
        """
        super().verify_and_update_config(vllm_config)
        remedy = "write the dense checkpoint with `impart-hf reconstruct` and serve that"
        load_format = vllm_config.load_config.load_format
        if load_format not in (LOAD_FORMAT, _DUMMY_FORMAT, *_REPLACED_FORMATS):
            raise ValueError(
                f"a delta repository cannot be loaded with --load-format {load_format}: leave it out, or {remedy}"
            )
        if vllm_config.model_config.runner_type != "generate":
            raise ValueError(
                f"a delta repository can only generate, not serve --runner {vllm_config.model_config.runner_type}: "
                f"leave it out, or {remedy}"
            )
        if load_format in _REPLACED_FORMATS:
            vllm_config.load_config.load_format = LOAD_FORMAT


def delta_settings(own: Any) -> Any:
    """Return the class that vLLM asks to check the settings of a delta repository's engine.

    Args:
        own: vLLM's class for the fine-tuned model's architecture, which is asked too; None if there is none.
    """
    return _LoadsDelta if own is None else type(f"Delta{own.__name__}", (_LoadsDelta, own), {})
