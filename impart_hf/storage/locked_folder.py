"""Temporary folders for unfinished work, which a later process removes if their own process was killed."""

import contextlib
import glob
import tempfile
import weakref
from pathlib import Path

from .folder_lock import LOCK_FILE, FolderLock


class LockedFolder:
    """A new folder that is removed when it is closed, or, if its process was killed, by the next one with its prefix.

    It is a context manager that yields the folder's path.

    Attributes:
        path: the folder; it holds the lock file and the owner's files.
    """

    def __init__(self, parent: Path, prefix: str):
        """Make the folder, and remove folders with the same prefix that no process works in.

        Args:
            parent: an existing folder.
            prefix: prefix of the folder's name. Other folders with this prefix must not hold a file "lock".

        Raises:
            OSError: if the folder cannot be made.
        """
        _remove_abandoned(parent, prefix)
        lock = _new_locked_folder(parent, prefix)
        self.path = lock.folder
        self._close = weakref.finalize(self, lock.remove_folder)  # also at the end of the process

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder."""
        self._close()


def _new_locked_folder(parent: Path, prefix: str) -> FolderLock:
    while True:
        lock = FolderLock(Path(tempfile.mkdtemp(dir=parent, prefix=prefix)))
        # Until the lock is taken, another process may consider the folder abandoned and remove it: try again.
        with contextlib.suppress(FileNotFoundError):
            lock.take(wait=True)
            return lock


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{glob.escape(prefix)}*/{LOCK_FILE}"):
        lock = FolderLock(path.parent)
        try:
            if lock.take():
                lock.remove_folder()
        except OSError:  # it belongs to another user, or has just been removed
            continue
