"""Scratch space for a dense copy of the delta that is loaded next, so that the engine need not wait for decoding."""

import os
import shutil
from logging import getLogger
from pathlib import Path

from ..modeling.delta_repository import DeltaRepository
from ..modeling.model_files import CheckpointError
from ..repository.reconstruct import reconstruct
from ..storage.locked_folder import LockedFolder

SCRATCH_VARIABLE = "IMPART_HF_SCRATCH"
_PREFIX, _COPY = "impart-hf-", "copy"


class Scratch:
    """A folder inside the one that `IMPART_HF_SCRATCH` names; without that variable nothing is decoded in advance."""

    def __init__(self) -> None:
        """Make the folder, and remove the folders of servers that were killed.

        Raises:
            ValueError: if the variable does not name a folder that can be written to.
        """
        place = os.environ.get(SCRATCH_VARIABLE)
        self._folder: LockedFolder | None = None  # locked as long as this process lives
        if place:
            if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
                raise ValueError(f"{SCRATCH_VARIABLE}: '{place}' is not a folder that can be written to")
            self._folder = LockedFolder(Path(place), _PREFIX)

    def prepare(self, repository: DeltaRepository) -> str | None:
        """Decode a whole repository, and return the folder of its dense copy; None if there is no space for it.

        Raises:
            CheckpointError, DeltaFormatError, WrongBaseError: if delta or base is missing, damaged or changed.
        """
        if self._folder is None:
            return None
        self.clear()
        copy = self._folder.path / _COPY
        try:
            reconstruct(repository, copy)
        except CheckpointError:
            raise
        except OSError as error:
            getLogger("vllm.impart_hf").warning(
                "%s cannot hold a dense copy, so the engine decodes the delta itself: %s", copy.parent, error
            )
            return None
        return str(copy)

    def clear(self) -> None:
        """Remove the dense copy, which is not needed after the engine has loaded it."""
        if self._folder is not None:
            shutil.rmtree(self._folder.path / _COPY, ignore_errors=True)
