"""Finished pieces of work in a file, one JSON object a line, so that a run which was ended goes on where it was."""

import json
import os
import threading
from pathlib import Path
from typing import Any


class Journal:
    """Records by key, which are in the file as soon as they are added. Threads may share it.

    Several processes may add to one file: each record is one write at its end. A line that is no record, which a
    process left that was killed while it wrote, is passed over.
    """

    def __init__(self, path: Path | None):
        """Read what is there.

        Args:
            path: the file, which is made with the first record; None to keep records in memory alone.

        Raises:
            OSError: if the file cannot be read.
        """
        self._path, self._lock = path, threading.Lock()
        self._records: dict[str, Any] = {}
        lines = path.read_bytes().split(b"\n") if path is not None and path.exists() else []
        for line in lines:
            try:
                record = json.loads(line)
                self._records[record["key"]] = record
            except (ValueError, TypeError, KeyError):
                continue

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._records[key]

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Add a record, and flush it to disk."""
        record = {"key": key, **record}
        with self._lock:
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with open(self._path, "ab", buffering=0) as file:
                    # After the line that a killed process may have left unfinished.
                    start = b"\n" if file.tell() and not _ends_in_line(self._path) else b""
                    file.write(start + json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
                    os.fsync(file.fileno())
            self._records[key] = record


def _ends_in_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
