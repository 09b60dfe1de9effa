"""The hidden folder in which a repository grows: resumable, locked, and published by one rename."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from ..common.files import OutputError, sync_path, write_json, written_whole
from .folder_lock import LOCK_FILE, FolderLock
from .output import check_output, existing_parent, named_errors

_PLAN, _SCRATCH, _BUDGETS = "plan.json", "scratch", "budgets.json"
# Beyond the records and the file made of them, a file system wants some room to breathe.
_SPARE_BYTES = 16 << 20


def _fingerprint(plan: Path) -> str | None:
    """Of the work that a workspace was made for; None if it has no plan, or half of one."""
    try:
        return json.loads(plan.read_text("utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tells_of_full_disk(error: BaseException | None) -> bool:
    """Whether an error, from whatever library, says that there is no room for what was to be written."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors and torch.save have errors of their own
    texts = os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "file write failed"
    return isinstance(error, SafetensorError | RuntimeError) and any(text in str(error) for text in texts)


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
        output = check_output(output, replaces_delta=True)
        self.output = output
        self.folder = output.parent / f".{output.name}.partial"
        self.repository = self.folder / "repository"
        self._replaced = self.folder / "replaced"
        self._distilled = self.folder / "distilled"
        self._scratch: Path | None = None
        # In the folder beside the output, which is never renamed: what is renamed lies in it.
        self._lock = FolderLock(self.folder)
        with named_errors(output):
            self._check_folder()

    def _check_folder(self) -> None:
        """Check that the workspace can be made, or is one of ours that no other process works in."""
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise OutputError(f"{self.folder} is in the way: it is not a folder")
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return
        if not (self.folder / LOCK_FILE).is_file() and not (self.folder / _PLAN).is_file():
            raise OutputError(f"{self.folder} is in the way: it holds something that is not unfinished work of ours")
        self._take_lock()
        self._lock.release()

    def __enter__(self) -> "Workspace":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        resumable = (self.folder / _PLAN).exists()
        if self._lock.is_held and not resumable:
            self.discard()
        self._lock.release()
        if _tells_of_full_disk(error):
            kept = (
                f"what is finished is kept in {self.folder}, and the same command goes on from there once there is room"
            )
            raise OutputError(
                f"the disk of {self.output.parent} is full; {kept if resumable else 'nothing was written'}"
            ) from error

    def _take_lock(self) -> None:
        if not self._lock.is_held and not self._lock.take():
            raise OutputError(f"another process is writing {self.output}")

    def begin(self, fingerprint: str, expected_bytes: int, kept_bytes: int = 0) -> bool:
        """Make the workspace, or take up the one that an earlier run of the same work left.

        Args:
            fingerprint: of everything that the result depends on; other work is discarded.
            expected_bytes: size of the repository.
            kept_bytes: of what is kept beside it until it is published.

        Returns:
            Whether earlier work is taken up.

        Raises:
            OutputError: if another process is at work there, or the disk has not enough room.
        """
        needed = 2 * expected_bytes + kept_bytes + _SPARE_BYTES
        if not self.folder.exists():
            self._check_room(needed)
        self._make()
        if self._replaced.exists() and not self.output.exists():
            os.rename(self._replaced, self.output)  # killed between the two renames of `publish`
        shutil.rmtree(self._replaced, ignore_errors=True)  # killed after them
        plan = self.folder / _PLAN
        resumes = _fingerprint(plan) == fingerprint
        if not resumes:
            self._lock.clear(keep=self._scratch)
            self._check_room(needed)
            write_json(plan, {"fingerprint": fingerprint})
        (self.folder / "records").mkdir(exist_ok=True)
        shutil.rmtree(self._distilled, ignore_errors=True)  # made from all records at once: not resumed
        self._distilled.mkdir()
        shutil.rmtree(self.repository, ignore_errors=True)
        self.repository.mkdir()
        return resumes

    def scratch(self) -> Path:
        """An empty folder for what is needed until the workspace is published or left; takes the lock.

        Raises:
            OutputError: if another process is at work there.
        """
        self._make()
        self._scratch = self.folder / _SCRATCH
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir()
        return self._scratch

    def components(self) -> Path:
        """Where singular components are kept until the workspace is published; a resumed run finds them again."""
        return self.folder / "components"

    def budgets(self, make: Callable[[], dict[str, list[int]]]) -> dict[str, list[int]]:
        """The bytes of every tensor's matrices: made once, as matrices that are decomposed anew may give others."""
        path = self.folder / _BUDGETS
        if not path.exists():
            found = make()
            with written_whole(path) as temporary:
                write_json(temporary, found)
        return json.loads(path.read_text("utf-8"))

    def checkpoints(self) -> Path:
        """Where the state of training is kept until the workspace is published; a resumed run finds it again."""
        return self.folder / "checkpoints"

    def _make(self) -> None:
        with named_errors(self.output):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(existing_parent(self.folder)).free
        if free < needed:
            self.discard()
            raise OutputError(f"{self.output.parent} has {free} bytes free, {needed} are needed")

    def discard(self) -> None:
        """Remove the workspace, the lock last: it marks the rest of an interrupted removal as ours."""
        self._scratch = None
        if self._lock.is_held:
            self._lock.remove_folder()

    def _record_path(self, name: str) -> Path:
        """The file of a tensor's records; its name is a hash, for tensor names may be longer than file names."""
        return self.folder / "records" / hashlib.sha256(name.encode()).hexdigest()[:32]

    def record_path(self, name: str) -> Path:
        """The file of a tensor's records, the distilled ones if there are."""
        path = self._record_path(name)
        distilled = self._distilled / path.name
        return distilled if distilled.exists() else path

    def has_record(self, name: str) -> bool:
        return self._record_path(name).exists()

    def put_record(self, name: str, data: bytes, notes: list[str]) -> None:
        """Keep a tensor's records, so that they are there as a whole or not at all."""
        path = self._record_path(name)
        write_json(path.with_suffix(".notes"), notes)
        with written_whole(path) as temporary:
            temporary.write_bytes(data)

    def put_distilled(self, name: str, data: bytes) -> None:
        """Let other records stand for a tensor in this run; a later one begins from the first again."""
        (self._distilled / self._record_path(name).name).write_bytes(data)

    def notes(self, name: str) -> list[str]:
        """What the method said of a tensor."""
        return json.loads(self._record_path(name).with_suffix(".notes").read_text("utf-8"))

    def publish(self) -> None:
        """Let the repository appear at the output folder, replacing an older one, and remove the workspace.

        Raises:
            OutputError: if something that is not ours has come to the output folder meanwhile.
        """
        check_output(self.output, replaces_delta=True)
        sync_path(self.repository)
        if self.output.exists():
            os.rename(self.output, self._replaced)
        os.rename(self.repository, self.output)
        sync_path(self.output.parent)
        self.discard()
