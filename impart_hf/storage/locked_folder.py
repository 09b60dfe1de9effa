"""Folders for what is not yet finished, which do not outlive their process by long, even if it is killed."""

import fcntl
import glob
import os
import shutil
import tempfile
from pathlib import Path

_LOCK = "lock"


class LockedFolder:
    """A new folder that is removed when it is closed, or, if its process was killed, by the next of the same prefix.

    A context manager that gives its path.

    Attributes:
        path: of the folder. It holds the lock, and what its owner puts there.
    """

    def __init__(self, parent: Path, prefix: str):
        """Make it, and remove those of the prefix that nobody is at work in.

        Args:
            parent: folder that is there.
            prefix: of its name. What else has it must not hold a file "lock".

        Raises:
            OSError: if it cannot be made.
        """
        _remove_left(parent, prefix)
        self._folder = tempfile.TemporaryDirectory(dir=parent, prefix=prefix, ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        # Taken before it has the name by which others look for it.
        new = self.path / f"new-{_LOCK}"
        self._lock = new.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.rename(new, self.path / _LOCK)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._folder.cleanup()
        self._lock.close()


def _remove_left(parent: Path, prefix: str) -> None:
    for lock in parent.glob(f"{glob.escape(prefix)}*/{_LOCK}"):
        try:
            with lock.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent)
        except OSError:  # in use, or another user's
            continue
