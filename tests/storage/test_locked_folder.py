"""What a process that was killed has left beside its output is removed by the next one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from impart_hf.storage.checkpoint_writer import new_folder
from impart_hf.storage.locked_folder import LockedFolder

KILLED = """
import os, signal, sys
from impart_hf.storage.checkpoint_writer import new_folder
with new_folder(sys.argv[1]) as folder:
    (folder / "half.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.process
def test_a_killed_process_leaves_nothing_for_long(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    assert [p.name[:9] for p in tmp_path.iterdir()] == [".out.new-"]
    (tmp_path / ".out.partial").mkdir()  # a workspace of another kind
    (tmp_path / ".out.partial" / "lock").touch()
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole.txt").write_text("whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", "out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["whole.txt"]


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    with LockedFolder(tmp_path, "work-") as one:
        (one / "file").touch()
        with LockedFolder(tmp_path, "work-") as other:
            assert (one / "file").exists() and other.is_dir() and other != one
        assert not other.exists()
    assert not list(tmp_path.iterdir())
