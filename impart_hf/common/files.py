"""Writing files atomically: whole or not at all."""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path


class OutputError(OSError):
    """An output folder that cannot be written, or that holds something that must not be replaced."""


def sync_path(path: Path) -> None:
    """Flush a file's contents or a folder's entries, so that a rename in it survives a power cut."""
    on_windows = sys.platform == "win32"
    if on_windows and path.is_dir():  # Windows opens no folders, and flushes their entries itself
        return
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end the file is flushed and renamed to `path`."""
    temporary = path.with_suffix(".writing")
    try:
        yield temporary
        sync_path(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def file_states(paths: Iterable[Path]) -> list[list[str | int]]:
    """Return path, size and time of change of the files among these paths, to tell whether one has changed."""
    return [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(paths) if p.is_file()]


def write_json(path: Path, value: object) -> None:
    """Write JSON and flush it to disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
