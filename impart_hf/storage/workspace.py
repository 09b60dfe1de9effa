"""The hidden folder in which a repository is made: resumable, locked, and published by one rename."""

import errno
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from ..common import processes
from ..common.files import OutputError, sync_path, write_json
from .checked_files import checked_bytes, read_checked, write_checked
from .folder_lock import LOCK_FILE, FolderLock
from .output import check_output, check_visible, existing_parent, named_errors

_PLAN, _SCRATCH, _BUDGETS, _SCAN, _SPECTRA = "plan.json", "scratch", "budgets.json", "scan.json", "spectra"
_TAKEN, _DISTILLED, _SENSITIVITIES = "taken", "distilled", "sensitivities.json"
# Free space required in addition to the records and the file that is made of them.
_SPARE_BYTES = 16 << 20


def _json_of(path: Path, make: Callable[[], Any]) -> Any:
    """Return the content of a file, which is made by `make` unless it is there and whole."""
    data = read_checked(path)
    if data is None:
        data = json.dumps(make()).encode()
        path.parent.mkdir(exist_ok=True)
        write_checked(path, data)
    return json.loads(data)


def _fingerprint(plan: Path) -> str | None:
    """Return the fingerprint in a workspace's plan; None if the plan is missing or damaged."""
    try:
        return json.loads(plan.read_text("utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error of any library means that the disk is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors and torch.save raise their own errors.
    texts = os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "file write failed"
    return isinstance(error, SafetensorError | RuntimeError) and any(text in str(error) for text in texts)


def needed_bytes(expected_bytes: int, kept_bytes: int) -> int:
    """Return the free space that a workspace needs: for the records, the files made of them, and what else it keeps.

    Args:
        expected_bytes: size of the repository, in bytes.
        kept_bytes: size of further files, in bytes.
    """
    return 2 * expected_bytes + kept_bytes + _SPARE_BYTES


class Workspace:
    """The folder of a compression's unfinished work, beside its output folder.

    `begin` starts or resumes, `put_record` stores the records of one tensor, `publish` renames the repository to the
    output folder. It is a context manager that holds a lock, so that two runs cannot write to one output, and it is
    removed after publishing.

    The processes of a job make one together: the first one holds the lock, makes and removes folders, and publishes.
    All store records.

    Attributes:
        output: the output folder.
        repository: the folder that `publish` renames to the output folder.
    """

    def __init__(self, output: Path, parent: "Workspace | None" = None):
        """Check the output folder without making anything.

        Args:
            output: the output folder.
            parent: the workspace that this one is a part of: its spectra, of the same pair, are used and added to.

        Raises:
            OutputError: if it or the workspace's folder holds something else than work of impart-hf, or is in use.
        """
        output = check_output(output, replaces_delta=True)
        self.output = output
        self.folder = output.parent / f".{output.name}.partial"
        self.repository = self.folder / "repository"
        self._replaced = self.folder / "replaced"
        self._spectra = (self if parent is None else parent).folder / _SPECTRA
        self._whole: set[Path] = set()  # files that this process has written, or found to be whole
        self._scratch: Path | None = None
        # The lock is in the workspace, which is never renamed: only folders in it are.
        self._lock = FolderLock(self.folder)
        processes.in_first(self._check_folder)

    def _check_folder(self) -> None:
        """Check that the workspace can be made, or is one that no other job works in."""
        with named_errors(self.output):
            self._check_contents()

    def _check_contents(self) -> None:
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise OutputError(f"{self.folder} is in the way and is not a folder: remove it")
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return
        if not (self.folder / LOCK_FILE).is_file() and not (self.folder / _PLAN).is_file():
            raise OutputError(f"{self.folder} is in the way and is not unfinished work of impart-hf: move it")
        self._take_lock()
        self._lock.release()

    def __enter__(self) -> "Workspace":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._scratch is not None and processes.is_first():
            shutil.rmtree(self._scratch, ignore_errors=True)
        resumable = (self.folder / _PLAN).exists()
        if self._lock.is_held and not resumable:
            self.discard()
        self._lock.release()
        if _is_disk_full(error):
            kept = f"finished work is kept in {self.folder}: free some space and give the same command again to resume"
            nothing = "nothing was written: free some space"
            raise OutputError(f"the disk of {self.output.parent} is full; {kept if resumable else nothing}") from error

    def _take_lock(self) -> None:
        if not self._lock.is_held and not self._lock.take():
            raise OutputError(f"another process is writing {self.output}: wait for it, or choose another folder")

    def begin(self, fingerprint: str, expected_bytes: int, kept_bytes: int = 0) -> bool:
        """Make the workspace, or resume the work of an earlier run with the same fingerprint.

        Args:
            fingerprint: fingerprint of everything that the result depends on; work with another one is discarded.
            expected_bytes: size of the repository, in bytes.
            kept_bytes: size of further files that the workspace keeps until it is published, in bytes.

        Returns:
            Whether earlier work is resumed.

        Raises:
            OutputError: if another process is writing the output, the disk has too little room, or not all processes of
                the job see the folder.
        """
        resumes = processes.in_first(lambda: self._begin(fingerprint, expected_bytes, kept_bytes))
        # A name that no other folder holds.
        mark = self.folder / _TAKEN / processes.from_first(uuid.uuid4().hex)
        processes.in_first(mark.touch)
        processes.each(lambda: check_visible(mark))
        return resumes

    def _begin(self, fingerprint: str, expected_bytes: int, kept_bytes: int) -> bool:
        needed = needed_bytes(expected_bytes, kept_bytes)
        if not self.folder.exists():
            self._check_room(needed)
        self._make()
        if self._replaced.exists() and not self.output.exists():
            os.rename(self._replaced, self.output)  # a run was killed between the two renames of `publish`
        shutil.rmtree(self._replaced, ignore_errors=True)  # a run was killed after both renames
        plan = self.folder / _PLAN
        resumes = _fingerprint(plan) == fingerprint
        if not resumes:
            self._lock.clear(keep=self._scratch)
            self._check_room(needed)
            write_json(plan, {"fingerprint": fingerprint})
        shutil.rmtree(self.folder / _TAKEN, ignore_errors=True)
        for folder in ("records", "notes", _TAKEN):
            (self.folder / folder).mkdir(exist_ok=True)
        self._spectra.mkdir(exist_ok=True)
        # Distillation starts again from the stored records.
        for path in (self.folder / _DISTILLED, self.repository):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        return resumes

    def take(self, work: str, name: str) -> bool:
        """Return whether this process is to do a piece of work, which is so for the first process that asks.

        Args:
            work: a kind of work, such as "records".
            name: the tensor's name.
        """
        if not processes.is_distributed():
            return True
        try:
            self._file(_TAKEN, f"{work} {name}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def scratch(self) -> Path:
        """Take the lock and return an empty folder for files that are needed until the workspace is closed.

        Raises:
            OutputError: if another process is writing the output.
        """
        self._scratch = self.folder / _SCRATCH
        processes.in_first(self._make_scratch)
        return self._scratch

    def _make_scratch(self) -> None:
        self._make()
        assert self._scratch is not None
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir()

    def scan(self, state: Any) -> list[dict[str, Any]] | None:
        """Return the scan that an earlier run stored for models in this state, or None."""
        data = read_checked(self.folder / _SCAN)
        stored = {} if data is None else json.loads(data)
        return stored["tensors"] if stored.get("state") == state else None

    def put_scan(self, state: Any, tensors: list[dict[str, Any]]) -> None:
        """Store what was read of both models; all in types that JSON can hold.

        Args:
            state: changes if the models do.
            tensors: an entry for each tensor.
        """
        write_checked(self.folder / _SCAN, json.dumps({"state": state, "tensors": tensors}).encode())

    def has_spectra(self, name: str) -> bool:
        return self._is_stored(_SPECTRA, name)

    def put_spectra(self, name: str, spectra: np.ndarray) -> None:
        """Store what is known of the singular values of a tensor's matrices, float64 of two dimensions."""
        data = io.BytesIO()
        np.save(data, spectra)
        self._put(_SPECTRA, name, data.getvalue())

    def spectra(self, name: str) -> np.ndarray:
        """Return what `put_spectra` stored."""
        return np.load(io.BytesIO(self._stored(_SPECTRA, name)), allow_pickle=False)

    def budgets(self, make: Callable[[], dict[str, list[int]]]) -> dict[str, list[int]]:
        """Return the byte budgets of every tensor's matrices, made by `make` unless an earlier run stored them."""
        return _json_of(self.folder / _BUDGETS, make)

    def sensitivities(self, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Return what errors in each tensor count for, made by `make` unless it is stored beside the spectra."""
        return _json_of(self._spectra / _SENSITIVITIES, make)

    def states(self) -> Path:
        """Return the folder for hidden states, kept until the workspace is published; a resumed run uses it."""
        return self.folder / "states"

    def checkpoints(self) -> Path:
        """Return the folder for the state of training, kept until the workspace is published; a resumed run uses it."""
        return self.folder / "checkpoints"

    def components(self) -> Path:
        """Return the folder for singular components, kept until the workspace is published; a resumed run uses it."""
        return self.folder / "components"

    def candidates(self) -> Path:
        """Return the folder for repositories to choose from, kept until the workspace is published."""
        return self.folder / "candidates"

    def adopt(self, repository: Path) -> None:
        """Make a finished repository, in a folder of this workspace, the one that `publish` renames."""
        self.repository.rmdir()
        os.rename(repository, self.repository)

    def _make(self) -> None:
        with named_errors(self.output):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(existing_parent(self.folder)).free
        if free < needed:
            self.discard()
            raise OutputError(f"{self.output.parent} has {free} bytes free, {needed} are needed: free some space")

    def discard(self) -> None:
        """Remove the workspace, the lock last: it marks the rest of an interrupted removal as impart-hf's."""
        self._scratch = None
        if self._lock.is_held:
            self._lock.remove_folder()

    def _file(self, folder: str, name: str) -> Path:
        """Return a tensor's file in a folder, named by a hash because tensor names may be too long for files."""
        place = self._spectra if folder == _SPECTRA else self.folder / folder
        return place / hashlib.sha256(name.encode()).hexdigest()[:32]

    def _put(self, folder: str, name: str, data: bytes) -> None:
        path = self._file(folder, name)
        write_checked(path, data)
        self._whole.add(path)

    def _stored(self, folder: str, name: str) -> bytes:
        data = read_checked(self._file(folder, name))
        if data is None:
            raise OutputError(f"{self._file(folder, name)} was removed or changed while it was needed: start again")
        return data

    def _is_stored(self, folder: str, name: str) -> bool:
        """Return whether a tensor's file is there and whole; it is read at most once."""
        path = self._file(folder, name)
        if path not in self._whole and read_checked(path) is not None:
            self._whole.add(path)
        return path in self._whole

    def has_record(self, name: str) -> bool:
        return self._is_stored("notes", name) and self._is_stored("records", name)

    def put_record(self, name: str, data: bytes, about: dict[str, Any]) -> None:
        """Store a tensor's records, and what is known of them beside their bytes, in types that JSON can hold."""
        self._put("notes", name, json.dumps(about).encode())
        self._put("records", name, data)

    def record(self, name: str) -> bytes:
        """Return a tensor's records: the distilled ones if there are any."""
        distilled = self._file(_DISTILLED, name)
        return distilled.read_bytes() if distilled.exists() else self._stored("records", name)

    def record_bytes(self, name: str) -> int:
        """Return the size of what `record` returns, in bytes, without reading it."""
        distilled = self._file(_DISTILLED, name)
        return distilled.stat().st_size if distilled.exists() else checked_bytes(self._file("records", name))

    def put_distilled(self, name: str, data: bytes) -> None:
        """Store distilled records, which replace a tensor's records in this run only."""
        self._file(_DISTILLED, name).write_bytes(data)

    def about(self, name: str) -> dict[str, Any]:
        """Return what `put_record` stored beside a tensor's records."""
        return json.loads(self._stored("notes", name))

    def publish(self) -> None:
        """Rename the repository to the output folder, replacing an older one, and remove the workspace.

        Raises:
            OutputError: if the output folder now holds something else than a delta repository.
        """
        check_output(self.output, replaces_delta=True)
        sync_path(self.repository)
        if self.output.exists():
            os.rename(self.output, self._replaced)
        os.rename(self.repository, self.output)
        sync_path(self.output.parent)
        self.discard()
