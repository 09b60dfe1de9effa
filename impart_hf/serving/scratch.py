"""Room for a dense copy of the delta that is about to be loaded, so that the engine need not wait for its decoding."""

import os
import shutil
from logging import getLogger
from pathlib import Path

from ..modeling.checkpoints import CheckpointError
from ..modeling.delta_repository import DeltaRepository
from ..repository.reconstruct import reconstruct
from ..storage.locked_folder import LockedFolder

SCRATCH_VARIABLE = "IMPART_HF_SCRATCH"
_PREFIX, _COPY = "impart-hf-", "copy"


class Scratch:
    """A folder below the one that `IMPART_HF_SCRATCH` names; without that, nothing is decoded beforehand."""

    def __init__(self) -> None:
        """Make the folder, and remove those of servers that were killed.

        Raises:
            ValueError: if the variable names no folder that can be written to.
        """
        place = os.environ.get(SCRATCH_VARIABLE)
        self._folder: LockedFolder | None = None  # held as long as this process lives
        if place:
            if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
                raise ValueError(f"{SCRATCH_VARIABLE}: '{place}' is not a folder that can be written to")
            self._folder = LockedFolder(Path(place), _PREFIX)

    def prepare(self, repository: DeltaRepository) -> str | None:
        """Decode a whole repository; the folder of its dense copy, None where there is no room for one.

        Raises:
            CheckpointError, DeltaFormatError, WrongBaseError: if delta or base are not as they should be.
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
            getLogger("vllm.impart_hf").warning("No room in %s, the engine decodes itself: %s", copy.parent, error)
            return None
        return str(copy)

    def clear(self) -> None:
        """Remove the dense copy, which an engine needs no longer once it has loaded it."""
        if self._folder is not None:
            shutil.rmtree(self._folder.path / _COPY, ignore_errors=True)
