"""Room for a dense copy of the delta that is about to be loaded, so that the engine need not wait for its decoding."""

import os
import shutil
import tempfile
from pathlib import Path

from ..modeling.delta_repository import DeltaRepository
from ..reconstruct import reconstruct

SCRATCH_VARIABLE = "IMPART_HF_SCRATCH"


class Scratch:
    """A folder below the one that `IMPART_HF_SCRATCH` names; without that, nothing is decoded beforehand."""

    def __init__(self) -> None:
        """
        Raises:
            ValueError: if the variable names no folder that can be written to.
        """
        place = os.environ.get(SCRATCH_VARIABLE)
        self._folder: tempfile.TemporaryDirectory | None = None
        if place:
            if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
                raise ValueError(f"{SCRATCH_VARIABLE}: '{place}' is not a folder that can be written to")
            self._folder = tempfile.TemporaryDirectory(dir=place, prefix="impart-hf-", ignore_cleanup_errors=True)

    def prepare(self, repository: DeltaRepository) -> str | None:
        """Decode a whole repository; the folder of its dense copy, None where there is no room for one.

        Raises:
            OutputError: if the disk is too small.
            DeltaFormatError, WrongBaseError: if delta or base are not as they should be.
        """
        if self._folder is None:
            return None
        self.clear()
        copy = Path(self._folder.name, "copy")
        reconstruct(repository, copy)
        return str(copy)

    def clear(self) -> None:
        """Remove the dense copy, which an engine needs no longer once it has loaded it."""
        if self._folder is not None:
            shutil.rmtree(Path(self._folder.name, "copy"), ignore_errors=True)
