"""A lock on a folder: one process works in it at a time, and the lock of a killed process does not block others."""

import contextlib
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = "lock"


class FolderLock:
    """The lock on a folder, held through a file in it.

    The system releases it when the process ends, even if it is killed. Windows cannot remove or rename a locked file or
    a folder that holds one, so a folder that will be renamed must not be locked itself, but may be in a locked folder.
    Only Linux is tested.

    Attributes:
        folder: the locked folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = FileLock(folder / LOCK_FILE, thread_local=False)  # any thread may release it

    def take(self, wait: bool = False) -> bool:
        """Take the lock and return whether it is held now.

        If another process removes the lock file after it is opened and before it is locked, filelock tries again: it
        compares the locked file with the file at the path.

        Args:
            wait: wait until another process releases it.

        Raises:
            OSError: if the lock file cannot be made.
        """
        try:
            self._lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            return False
        return True

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._lock.is_locked

    def release(self) -> None:
        """Release the lock if it is held; the lock file may remain."""
        self._lock.release()

    def clear(self, keep: Path | None = None) -> None:
        """Remove everything in the folder except the lock file and `keep`.

        Raises:
            OSError: if something cannot be removed.
        """
        for path in self.folder.iterdir():
            if path == keep or path.name == LOCK_FILE:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def remove_folder(self) -> None:
        """Remove the locked folder, the lock file last, and release the lock; files that cannot be removed remain."""
        with contextlib.suppress(OSError):
            self.clear()
            # The lock is still held, so that a process that has just opened the file detects its removal. Windows
            # refuses the removal; there, filelock removes the file when the lock is released.
            (self.folder / LOCK_FILE).unlink()
        self.release()
        with contextlib.suppress(OSError):  # another process may already have made a new lock file
            self.folder.rmdir()
