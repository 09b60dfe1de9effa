"""The output folder of a recipe: a folder for each stage, what is finished, and the lock against a second run."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from ..common.files import OutputError, atomic_write, write_json
from ..modeling.model_files import CheckpointError, read_json
from ..storage.folder_lock import LOCK_FILE, FolderLock
from ..storage.output import check_output, named_errors
from .recipe import KINDS, RecipeError

STATE, STAGES = "state.json", "stages"
_VERSION = 2
# The folder of a stage, or the hidden one in which it is made.
_STAGE_FOLDER = re.compile(rf"\.?(?P<name>\d\d-({'|'.join(KINDS)}))(\..*)?")


class RunFolder:
    """The output folder of a recipe.

    What is known of finished stages is in state.json, by their names. A stage that is not named there is unfinished,
    whatever its folder holds.

    Attributes:
        path: the folder.
        entries: what state.json holds, by the stages' names; "model" stands for the recipe's model.
    """

    def __init__(self, output: str | Path, model: str):
        """Read what an earlier run has finished; nothing is made.

        Args:
            output: the folder.
            model: the recipe's model, as the recipe names it.

        Raises:
            OutputError: if the folder holds something else than the output of a recipe for this model, or cannot be
                written.
            RecipeError: if its state cannot be read.
        """
        self.path, self._model = Path(os.path.abspath(output)), model
        self._lock = FolderLock(self.path)
        if not self._is_resumed():
            check_output(self.path)
        self.entries: dict[str, dict[str, Any]] = self._read()

    def _is_resumed(self) -> bool:
        """Return whether the folder is a recipe's output, be it one whose run was killed when it had just begun."""
        if not self.path.is_dir():
            return False
        return (self.path / STATE).is_file() or {path.name for path in self.path.iterdir()} == {LOCK_FILE}

    def _read(self) -> dict[str, dict[str, Any]]:
        if not (self.path / STATE).is_file():
            return {}
        try:
            state = read_json(self.path / STATE)
        except CheckpointError as error:
            raise RecipeError(f"{error}: choose another output folder") from error
        entries = state.get("stages")
        if state.get("format_version") != _VERSION or not isinstance(entries, dict):
            raise RecipeError(f"{self.path / STATE} is of another version of impart-hf: choose another output folder")
        if state.get("model") != self._model:  # whose stages are all of no use, and would be removed
            raise OutputError(
                f"{self.path} holds the stages of a recipe for {state.get('model')!r}, not for {self._model!r}: choose "
                "another output folder, or remove this one"
            )
        return entries

    def __enter__(self) -> RunFolder:
        """Take the lock, and read the state again, which another run may have changed.

        Raises:
            OutputError: if another process works in the folder.
        """
        with named_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._lock.take():
                raise OutputError(f"another process is running a recipe in {self.path}: wait for it")
        self.entries = self._read()
        self._write()
        (self.path / STAGES).mkdir(exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def stage(self, name: str) -> Path:
        """Return the folder of a stage."""
        return self.path / STAGES / name

    def put(self, name: str, entry: dict[str, Any]) -> None:
        """Store what is known of a stage."""
        self.entries[name] = entry
        self._write()

    def keep(self, finished: set[str], names: set[str]) -> list[str]:
        """Forget all stages but the finished ones, and remove what they left.

        Args:
            finished: names of the stages whose entries hold.
            names: names of all stages of the recipe: work on them that was interrupted stays, to be resumed.

        Returns:
            The names of the stages that were forgotten.
        """
        forgotten = sorted(set(self.entries) - finished)
        self.entries = {name: entry for name, entry in self.entries.items() if name in finished}
        self._write()
        for path in (self.path / STAGES).iterdir():
            match = _STAGE_FOLDER.fullmatch(path.name)
            if match is not None and match["name"] not in (names if path.name.startswith(".") else finished):
                shutil.rmtree(path)
        return forgotten

    def remove(self, name: str) -> None:
        """Remove the folder of a stage, which stays finished."""
        shutil.rmtree(self.stage(name), ignore_errors=True)

    def _write(self) -> None:
        with atomic_write(self.path / STATE) as path:
            write_json(path, {"format_version": _VERSION, "model": self._model, "stages": self.entries})


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a model's folder but its card, which states this size."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
