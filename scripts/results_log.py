"""The results file of a study, by which it goes on where it was stopped, and the documents that its report is in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class Log:
    """The results file, whose lines describe pairs and runs.

    Attributes:
        lines: all lines; all must have been made with the same settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], option: str):
        """Read the file, if it exists.

        Args:
            settings: what all lines have in common.
            option: the script's option that names the file's folder.

        Raises:
            ValueError: if the file was made with other settings.
        """
        self._path, self._settings = path, dict(settings)
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            data = path.read_bytes()
            if not data.endswith(b"\n"):  # a killed run left an incomplete last line
                path.write_bytes(data[: data.rfind(b"\n") + 1])
            self.lines = read_lines(path)
        for line in self.lines:
            if line["settings"] != self._settings:
                raise ValueError(
                    f"{path} was made with {line['settings']}, not {self._settings}: give another {option}"
                )

    def append(self, line: Mapping[str, Any]) -> None:
        line = {**line, "settings": self._settings}
        self.lines.append(line)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def has(self, key: Mapping[str, Any]) -> bool:
        """Return whether a line has all of these fields."""
        return any(key.items() <= line.items() for line in self.lines)

    def about(self, pair: str) -> dict[str, Any] | None:
        """Return the description of a pair, if there is one."""
        return next((line["about"] for line in self.lines if line["pair"] == pair and "about" in line), None)


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between a document's two markers, `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    Raises:
        ValueError: if the document lacks them.
    """
    begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
    before, found, rest = path.read_text("utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{path} lacks the markers {begin} and {end}")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
