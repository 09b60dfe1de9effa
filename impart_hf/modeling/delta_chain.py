"""Chains: a delta repository whose base is a delta repository, and so on (docs/FORMAT.md, "Chains")."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from .checkpoints import TIED_OUTPUT, Checkpoint, ties_embeddings
from .delta_record import DeltaFormatError
from .model_files import HubOptions
from .tensors import Tensors
from .transfer import to_device

MOST_DELTAS = 32  # in a chain
_SHOWN = 5  # names of a chain that a message has at most


class DecodedTensors(Tensors, Protocol):
    """The tensors of a delta repository."""

    @property
    def chain(self) -> list[Any]:
        """The delta repository and those that it rests on."""

    def tensor_and_checksum(self, name: str) -> tuple[torch.Tensor, int]:
        """Return a tensor on the CPU, and its checksum."""


@dataclass(frozen=True)
class Descent:
    """The delta repositories from the one that is opened down to one of its bases.

    Attributes:
        sources: their folders and Hub ids.
        places: the same in a spelling that each repository has once: with its commit, or without links.
    """

    sources: tuple[str, ...] = ()
    places: tuple[tuple[str | None, ...], ...] = ()

    def to(self, source: str, options: HubOptions) -> "Descent":
        """Return these repositories with one more.

        Raises:
            DeltaFormatError: if it is one of them, or one too many.
        """
        if os.path.isdir(source):
            place: tuple[str | None, ...] = (os.path.realpath(os.path.join(source, options.subfolder)),)
        else:
            place = (source, options.revision, options.subfolder)
        longer = Descent((*self.sources, source), (*self.places, place))
        if place in self.places:
            raise DeltaFormatError(f"the delta '{source}' rests on itself: {longer}")
        if len(longer.sources) > MOST_DELTAS:
            raise DeltaFormatError(
                f"{longer} is a chain of more than {MOST_DELTAS} deltas, the longest there may be: write one of them "
                "against the first base (impart-hf flatten), and make the next ones from that"
            )
        return longer

    def __str__(self) -> str:
        names = [f"'{source}'" for source in self.sources]
        if len(names) > _SHOWN:
            names[_SHOWN - 2 : -2] = [f"{len(names) - _SHOWN + 1} others"]
        return " on ".join(names)


class DeltaBase:
    """A delta repository as the base of another: its fine-tuned tensors; has `Checkpoint`'s interface.

    Attributes:
        repository: the delta repository.
        source, options: its folder or Hub id, and how its files are found.
        config: what config.json of the dense fine-tuned model holds.
        folder: the folder that holds the repository's files.
        folders: this one and those of all that it rests on.
        tied: whether the output projection shares the input embeddings.
        weight_bytes: size of all tensors, in bytes.
    """

    def __init__(
        self,
        repository: DecodedTensors,
        options: HubOptions,
        config: dict[str, Any],
        folder: Path,
        tied: bool | None = None,
    ):
        """Present a delta repository.

        Args:
            repository: a `DeltaRepository`.
            config: the content of its config.json.
            folder: the folder that holds its files.
            tied: whether a stored output projection is ignored, as for `Checkpoint`; None takes it from the
                fine-tuned model's configuration.
        """
        self.repository, self.source, self.options = repository, repository.source, options
        self.config: dict[str, Any] = config["text_config"]
        self.folder = folder
        self.folders = {folder, *(link.base.folder for link in repository.chain)}
        self.tied = ties_embeddings(self.config) if tied is None else tied
        sizes = ((torch.Size(self.shape(name)).numel(), self.dtype(name)) for name in self.stored_names())
        self.weight_bytes = sum(count * dtype.itemsize for count, dtype in sizes)

    def names(self) -> list[str]:
        """Return the tensors' names, sorted: without a tied output projection."""
        return [name for name in self.stored_names() if not (self.tied and name == TIED_OUTPUT)]

    def stored_names(self) -> list[str]:
        """Return the names of all tensors that it stands for, sorted."""
        return self.repository.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; only headers are read."""
        return self.repository.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype; only headers are read."""
        return self.repository.dtype(name)

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the tensor on a device. It is decoded on the CPU, where all of its bases are."""
        return to_device(self.repository.tensor(name), device)

    def tensor_and_checksum(self, name: str) -> tuple[torch.Tensor, int]:
        """Return the tensor on the CPU, and its checksum."""
        return self.repository.tensor_and_checksum(name)


BaseModel: TypeAlias = Checkpoint | DeltaBase
