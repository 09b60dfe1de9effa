"""Scratch space for dense copies of deltas, so that the engine need not wait for decoding.

Without a limit the copy of the delta that is loaded next is all there is, and it goes after the swap. With
`IMPART_HF_SCRATCH_LIMIT`, copies stay for further swaps; the least recently used go when they would exceed it.
"""

import os
import shutil
from logging import getLogger
from pathlib import Path

from ..common.validation import size_bytes
from ..common.weight_bytes import weight_bytes
from ..modeling.delta_repository import DeltaRepository
from ..modeling.model_files import CheckpointError
from ..modeling.repository_files import delta_digest
from ..repository.reconstruct import reconstruct
from ..storage.locked_folder import LockedFolder

SCRATCH_VARIABLE, LIMIT_VARIABLE = "IMPART_HF_SCRATCH", "IMPART_HF_SCRATCH_LIMIT"
_PREFIX = "impart-hf-"


class Scratch:
    """A folder inside the one that `IMPART_HF_SCRATCH` names; without that variable nothing is decoded in advance."""

    def __init__(self, wanted: bool = True) -> None:
        """Make the folder, and remove the folders of servers that were killed.

        Args:
            wanted: False to decode nothing in advance whatever the environment says.

        Raises:
            ValueError: if a variable does not name a folder that can be written to, or a number of bytes.
        """
        place, limit = os.environ.get(SCRATCH_VARIABLE) if wanted else None, os.environ.get(LIMIT_VARIABLE)
        self._folder: LockedFolder | None = None  # locked as long as this process lives
        self._limit = size_bytes(limit, LIMIT_VARIABLE) if limit else 0
        self._sizes: dict[Path, int] = {}  # bytes of each copy, the least recently used first
        if place:
            if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
                raise ValueError(f"{SCRATCH_VARIABLE}: '{place}' is not a folder that can be written to")
            self._folder = LockedFolder(Path(place), _PREFIX)

    def prepare(self, repository: DeltaRepository) -> str | None:
        """Return the folder of a repository's dense copy, decoded now if there is none; None if there is no space.

        Raises:
            CheckpointError, DeltaFormatError, WrongBaseError: if delta or base is missing, damaged or changed.
        """
        if self._folder is None:
            return None
        # The digest is of the delta and of its base, so that a copy of other files is never taken.
        copy = self._folder.path / delta_digest(repository.file, repository.config)[:32]
        if copy in self._sizes:
            self._sizes[copy] = self._sizes.pop(copy)
            return str(copy)
        size = weight_bytes(repository)
        self._remove_oldest(self._limit - size)
        try:
            reconstruct(repository, copy)
        except CheckpointError:
            raise
        except OSError as error:
            getLogger("vllm.impart_hf").warning(
                "%s cannot hold a dense copy, so the engine decodes the delta itself: %s", copy.parent, error
            )
            return None
        self._sizes[copy] = size
        return str(copy)

    def clear(self) -> None:
        """Remove the copies that the limit does not allow, after the engine has loaded one."""
        self._remove_oldest(self._limit)

    def _remove_oldest(self, most: int) -> None:
        """Remove copies, the least recently used first, until the others have at most so many bytes."""
        while self._sizes and sum(self._sizes.values()) > most:
            oldest = next(iter(self._sizes))
            shutil.rmtree(oldest, ignore_errors=True)
            del self._sizes[oldest]
