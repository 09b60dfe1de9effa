"""Where an engine's files are: the model that it was started on, its base, and the deltas that it is to load."""

import os
from typing import TYPE_CHECKING

from ..modeling.checkpoints import Checkpoint, HubOptions, fetch_config
from ..modeling.delta_repository import DeltaRepository
from ..modeling.repository_kind import RepositoryKind, kind_of
from ..repository.open import open_repository

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# As `from_pretrained`'s base_model: a folder or Hub id to take the base from, instead of the recorded one.
BASE_MODEL_VARIABLE = "IMPART_HF_BASE_MODEL"


def hub_options(vllm_config: "VllmConfig", revision: str | None) -> HubOptions:
    """How the Hub is asked for a file at a revision: with the engine's own token and cache."""
    token, cache = vllm_config.model_config.hf_token, vllm_config.load_config.download_dir
    return HubOptions(revision, token=token, cache_dir=cache)


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
        self.options = hub_options(vllm_config, vllm_config.model_config.revision)
        config, folder = fetch_config(self.model, self.options)
        self.is_delta = kind_of(config) is RepositoryKind.DELTA
        self.base = self.open_model().base.folder if self.is_delta else folder

    def open_model(self) -> DeltaRepository:
        """The delta repository that the engine was started on, which must be one."""
        return open_repository(self.model, self.options, os.environ.get(BASE_MODEL_VARIABLE))

    def open_delta(self, repo: str, revision: str | None) -> DeltaRepository:
        """Any delta repository, on the engine's base."""
        return open_repository(repo, hub_options(self._vllm_config, revision), str(self.base))

    def open_base(self) -> Checkpoint:
        """The engine's base as a checkpoint."""
        return Checkpoint(str(self.base), HubOptions())
