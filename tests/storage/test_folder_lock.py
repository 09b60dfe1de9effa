"""One process at a time works in a folder, and none waits for a process that was killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from impart_hf.storage.folder_lock import FolderLock

HOLDER = """
import sys
from pathlib import Path
from impart_hf.storage.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print(lock.take(), flush=True)
sys.stdin.read()
"""


def test_a_folder_is_locked_for_other_processes_until_its_holder_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    lock = FolderLock(tmp_path)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        assert not lock.take() and not lock.is_held
    finally:
        holder.kill()
        holder.communicate()
    assert lock.take() and lock.is_held


def test_a_folder_is_removed_while_it_is_locked(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    lock, other = FolderLock(folder), FolderLock(folder)
    folder.mkdir()
    (folder / "sub").mkdir()
    (folder / "sub" / "file").touch()
    (folder / "link").symlink_to(tmp_path)
    (folder / "kept").touch()
    assert lock.take() and not other.take()
    lock.clear(keep=folder / "kept")
    assert sorted(path.name for path in folder.iterdir()) == ["kept", "lock"]
    lock.remove_folder()
    assert not lock.is_held and not list(tmp_path.iterdir())
    lock.remove_folder()  # of which nothing is left
    folder.mkdir()
    assert other.take()
