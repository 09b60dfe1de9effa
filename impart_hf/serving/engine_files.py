"""An engine's files: the model that it was started on, the model's base, and the deltas to load."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..modeling.checkpoints import Checkpoint
from ..modeling.delta_repository import BASE_MODEL_VARIABLE, DeltaRepository
from ..modeling.model_files import CheckpointError, HubOptions, fetch_config, fetch_file, read_json
from ..modeling.repository_kind import RepositoryKind, kind_of
from ..repository.open import open_repository

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig, VllmConfig

# Set to 1, it lets an engine's adapters be deltas (`packed_batches.py`).
PACKED_VARIABLE = "IMPART_HF_PACKED"
# For these files the engine continues to use those that it was started with.
_KEPT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def hub_options(model_config: "ModelConfig", load_config: "LoadConfig", revision: str | None) -> HubOptions:
    """Return the options for reading a revision from the Hub with the engine's token and cache."""
    return HubOptions(revision, token=model_config.hf_token, cache_dir=load_config.download_dir)


def open_served(model: str, options: HubOptions) -> DeltaRepository:
    """Open a delta repository that an engine is started on, with the recorded base or the one in the environment.

    Raises:
        CheckpointError, DeltaFormatError, WrongBaseError: if it is not a delta repository, or is damaged.
    """
    return open_repository(model, options, os.environ.get(BASE_MODEL_VARIABLE))


def decoded_tensors(
    repository: DeltaRepository, device: torch.device, names: Sequence[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Return fine-tuned tensors with their names, all unless some are named, one at a time.

    They are decoded on `device` (on the CPU for meta).
    """
    return repository.tensors("cpu" if device.type == "meta" else device, names)


class EngineFiles:
    """The files of the model that an engine was started on.

    Attributes:
        model, options: that model, a folder or Hub id, and how to read it.
        folder: local folder of its files, in the Hub's cache if it is not local.
        is_delta: whether it is a delta repository.
        base: local folder of its base, in the Hub's cache if it is not local; of the model itself if it is dense, of
            the first base if it is a chain of deltas.
    """

    def __init__(self, vllm_config: "VllmConfig"):
        """Read the model that the engine was started on.

        Raises:
            CheckpointError, DeltaFormatError, WrongBaseError: if it is missing, damaged or changed by now.
        """
        self._vllm_config = vllm_config
        self.model = vllm_config.model_config.model
        self.options = self.hub_options(vllm_config.model_config.revision)
        config, self.folder = fetch_config(self.model, self.options)
        self.is_delta = kind_of(config) is RepositoryKind.DELTA
        self.base = self.open_model().chain[-1].base.folder if self.is_delta else self.folder

    def open_model(self) -> DeltaRepository:
        """Open the delta repository that the engine was started on; it must be one."""
        return open_served(self.model, self.options)

    def open_delta(self, repo: str, revision: str | None) -> DeltaRepository:
        """Open any delta repository, with the engine's base; of a chain of deltas, that is the first base."""
        return open_repository(repo, self.hub_options(revision), str(self.base))

    def hub_options(self, revision: str | None) -> HubOptions:
        """Return the options for reading a revision from the Hub."""
        return hub_options(self._vllm_config.model_config, self._vllm_config.load_config, revision)

    def open_base(self) -> Checkpoint:
        """Open the engine's base as a checkpoint."""
        return Checkpoint(str(self.base), HubOptions())

    def notes(self, repo: str, options: HubOptions) -> list[str]:
        """Return a note for each file of a delta that the engine does not use, although it differs from its own."""
        notes = []
        for filename in _KEPT_FILES:
            own = _content(fetch_file(self.model, filename, self.options))
            other = _content(fetch_file(repo, filename, options))
            if own != other:
                notes.append(f"{filename} differs: the engine continues to use that of '{self.model}'")
        return notes


def _content(path: Path | None) -> Any:
    if path is None:
        return None
    if not path.name.endswith("_config.json"):
        return path.read_bytes()
    try:
        content = read_json(path)
    except CheckpointError:
        return None  # vLLM continues without it, too
    if path.name == "tokenizer_config.json":
        return content.get("chat_template")  # differences in the rest hardly ever matter
    return {k: v for k, v in content.items() if k not in ("_from_model_config", "transformers_version")}
