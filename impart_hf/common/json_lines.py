"""A file of JSON lines that grows by whole lines, so that a run which was killed goes on from what it holds."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return a file's lines. A last line without its end, which a killed run left, is not one of them.

    Raises:
        ValueError: naming file and line, if a line is not an object.
    """
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            content = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}, line {number}, is not a JSON object")
        lines.append(content)
    return lines


class JsonLines:
    """A file of JSON lines to which this process appends.

    Attributes:
        lines: its lines, as read and appended.
    """

    def __init__(self, path: Path):
        """Read the file, if it exists, and cut off an incomplete last line.

        Raises:
            ValueError: as `read_json_lines`.
        """
        self._path = path
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            self.lines = read_json_lines(path)
            data = path.read_bytes()
            if not data.endswith(b"\n"):
                path.write_bytes(data[: data.rfind(b"\n") + 1])

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line, and flush it to disk."""
        with self._path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(dict(line))
