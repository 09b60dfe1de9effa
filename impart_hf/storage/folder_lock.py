"""A lock on a folder: one process works in it at a time, and a killed process's lock does not block the next."""

import contextlib
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = "lock"


class FolderLock:
    """The lock on a folder, held through a file in it.

    The system releases it when the process ends, however it ends. Windows removes and renames no file that is locked,
    and no folder around it: a folder that is to be renamed must not be the locked one, but may lie in it. Only Linux is
    tested.

    Attributes:
        folder: what is locked.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = FileLock(folder / LOCK_FILE, thread_local=False)  # whichever thread took it, any may release it

    def take(self, wait: bool = False) -> bool:
        """Take the lock; whether it is held now.

        A lock file that its holder removes between our opening and locking it is not taken for a lock: filelock
        compares the locked file with what has its name.

        Args:
            wait: until another process releases it.

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
        """Whether this object holds it."""
        return self._lock.is_locked

    def release(self) -> None:
        """Release the lock, if it is held. The lock file may stay."""
        self._lock.release()

    def clear(self, keep: Path | None = None) -> None:
        """Remove everything in the folder but the lock file and `keep`.

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
        """Remove the locked folder, the lock file last, and release the lock; what cannot be removed stays."""
        with contextlib.suppress(OSError):
            self.clear()
            # While it is held, so that a process that has just opened it notices. Windows refuses that; there,
            # filelock removes the file when it is released.
            (self.folder / LOCK_FILE).unlink()
        self.release()
        with contextlib.suppress(OSError):  # another process may have made the next lock file already
            self.folder.rmdir()
