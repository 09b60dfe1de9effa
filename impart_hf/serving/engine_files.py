"""Where an engine's files are: the model that it was started on, its base, and the deltas that it is to load."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ..modeling.checkpoints import Checkpoint, HubOptions, fetch_config
from ..modeling.delta_repository import DeltaRepository
from ..modeling.repository_kind import RepositoryKind, kind_of
from ..repository.open import open_repository

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig, VllmConfig

# As `from_pretrained`'s base_model: a folder or Hub id to take the base from, instead of the recorded one.
BASE_MODEL_VARIABLE = "IMPART_HF_BASE_MODEL"


def hub_options(model_config: "ModelConfig", load_config: "LoadConfig", revision: str | None) -> HubOptions:
    """How the Hub is asked for a file at a revision: with the engine's own token and cache."""
    return HubOptions(revision, token=model_config.hf_token, cache_dir=load_config.download_dir)


def open_served(model: str, options: HubOptions) -> DeltaRepository:
    """A delta repository that an engine is started on, with the base that it records or that the environment names.

    Raises:
        CheckpointError, DeltaFormatError, WrongBaseError: if it is not one, or is damaged.
    """
    return open_repository(model, options, os.environ.get(BASE_MODEL_VARIABLE))


def decoded_tensors(repository: DeltaRepository, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Every fine-tuned tensor with its name, one at a time, checked, decoded on `device` (on the CPU for meta)."""
    for name in repository.names():
        yield name, repository.tensor(name, "cpu" if device.type == "meta" else device)


class EngineFiles:
    """The files of the model that an engine was started on.

    Attributes:
        model, options: that model, a folder or Hub id, and how it is found.
        is_delta: whether it is a delta repository.
        base: local folder of its base model, from the Hub's cache if need be; of the model itself if it is no delta.
    """

    def __init__(self, vllm_config: "VllmConfig"):
        """Look at the model that the engine was started on.

        Raises:
            CheckpointError, DeltaFormatError, WrongBaseError: if it is not as it should be any more.
        """
        self._vllm_config = vllm_config
        self.model = vllm_config.model_config.model
        self.options = self.hub_options(vllm_config.model_config.revision)
        config, folder = fetch_config(self.model, self.options)
        self.is_delta = kind_of(config) is RepositoryKind.DELTA
        self.base = self.open_model().base.folder if self.is_delta else folder

    def open_model(self) -> DeltaRepository:
        """The delta repository that the engine was started on, which must be one."""
        return open_served(self.model, self.options)

    def open_delta(self, repo: str, revision: str | None) -> DeltaRepository:
        """Any delta repository, on the engine's base."""
        return open_repository(repo, self.hub_options(revision), str(self.base))

    def hub_options(self, revision: str | None) -> HubOptions:
        """How the Hub is asked for a file at a revision."""
        return hub_options(self._vllm_config.model_config, self._vllm_config.load_config, revision)

    def open_base(self) -> Checkpoint:
        """The engine's base as a checkpoint."""
        return Checkpoint(str(self.base), HubOptions())
