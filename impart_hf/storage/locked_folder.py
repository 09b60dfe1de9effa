"""Folders for unfinished work. If their process is killed, the next one removes them."""

import contextlib
import glob
import tempfile
import weakref
from pathlib import Path

from .folder_lock import LOCK_FILE, FolderLock


class LockedFolder:
    """A new folder that is removed when it is closed, or, if its process was killed, by the next of the same prefix.

    A context manager that gives its path.

    Attributes:
        path: of the folder. It holds the lock, and what its owner puts there.
    """

    def __init__(self, parent: Path, prefix: str):
        """Make it, and remove those of the prefix that no process works in.

        Args:
            parent: folder that exists.
            prefix: of its name. Other folders with this prefix must not hold a file "lock".

        Raises:
            OSError: if it cannot be made.
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
        # Before the new lock file is locked, another process may take the folder for an abandoned one and remove it.
        with contextlib.suppress(FileNotFoundError):
            lock.take(wait=True)
            return lock


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{glob.escape(prefix)}*/{LOCK_FILE}"):
        lock = FolderLock(path.parent)
        try:
            if lock.take():
                lock.remove_folder()
        except OSError:  # another user's, or removed meanwhile
            continue
