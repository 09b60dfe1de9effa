"""The hidden folder in which a repository grows: resumable, locked, and published by one rename."""

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import IO

from .safetensors_writer import write_json

_PLAN = "plan.json"
# Beyond the records and the file made of them, a file system wants some room to breathe.
_SPARE_BYTES = 16 << 20


class OutputError(OSError):
    """An output folder that cannot be written, or that holds something that is not ours to replace."""


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(output: Path) -> None:
    """See that a folder is free: missing, empty, or a delta repository of ours.

    Raises:
        OutputError: if it is not.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputError(f"{output} exists and is not a folder")
    if not output.exists() or not any(output.iterdir()):
        return
    try:
        ours = json.loads((output / "config.json").read_text("utf-8")).get("model_type") == "delta_compressed"
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise OutputError(f"{output} exists and holds something that is not a delta repository; choose another folder")


class Workspace:
    """Where a compression keeps its work, beside the folder that it will become.

    `begin` starts or resumes, `put_record` keeps one finished tensor, `publish` makes the repository appear. A context
    manager: it holds a lock, so that two runs cannot write to one output, and removes itself once published.

    Attributes:
        output: the folder to be made.
        repository: the folder that `publish` renames to it.
    """

    def __init__(self, output: Path):
        """Check the output folder; nothing is made yet.

        Raises:
            OutputError: if it holds something that is not ours.
        """
        output = Path(os.path.abspath(output))
        check_output(output)
        self.output = output
        self.folder = output.parent / f".{output.name}.partial"
        self.repository = self.folder / "repository"
        self._lock: IO[str] | None = None

    def __enter__(self) -> "Workspace":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def begin(self, fingerprint: str, expected_bytes: int) -> bool:
        """Make the workspace, or take up the one that an earlier run of the same work left.

        Args:
            fingerprint: of everything that the result depends on; other work is discarded.
            expected_bytes: size of the repository.

        Returns:
            Whether earlier work is taken up.

        Raises:
            OutputError: if another process is at work there, or the disk has not enough room.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise OutputError(f"{self.output} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"another process is writing {self.output}") from error
        plan = self.folder / _PLAN
        resumes = plan.exists() and json.loads(plan.read_text("utf-8")).get("fingerprint") == fingerprint
        if not resumes:
            self._clear()
            needed = 2 * expected_bytes + _SPARE_BYTES
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                self.discard()
                raise OutputError(f"{self.output.parent} has {free} bytes free, {needed} are needed")
            write_json(plan, {"fingerprint": fingerprint})
        (self.folder / "records").mkdir(exist_ok=True)
        shutil.rmtree(self.repository, ignore_errors=True)
        self.repository.mkdir()
        return resumes

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def discard(self) -> None:
        """Remove the workspace."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def record_path(self, name: str) -> Path:
        """The file of a tensor's records; its name is a hash, for tensor names may be longer than file names."""
        return self.folder / "records" / hashlib.sha256(name.encode()).hexdigest()[:32]

    def has_record(self, name: str) -> bool:
        return self.record_path(name).exists()

    def put_record(self, name: str, data: bytes, notes: list[str]) -> None:
        """Keep a tensor's records, so that they are there as a whole or not at all."""
        path = self.record_path(name)
        write_json(path.with_suffix(".notes"), notes)
        temporary = path.with_suffix(".writing")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def notes(self, name: str) -> list[str]:
        """What the method said of a tensor."""
        return json.loads(self.record_path(name).with_suffix(".notes").read_text("utf-8"))

    def publish(self) -> None:
        """Let the repository appear at the output folder, replacing an older one, and remove the workspace."""
        sync_folder(self.repository)
        if self.output.exists():
            old = self.folder / "replaced"
            os.rename(self.output, old)
        os.rename(self.repository, self.output)
        sync_folder(self.output.parent)
        self.discard()
