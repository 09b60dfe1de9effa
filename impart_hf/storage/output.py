"""Checks of output folders."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from transformers.utils.hub import CHAT_TEMPLATE_DIR

from ..common.files import OutputError
from ..modeling.model_files import CheckpointError, HubOptions, repository_kind
from ..modeling.repository_kind import RepositoryKind

# Systems allow 255 bytes; unfinished work lies beside the output, in folders with longer names.
_LONGEST_NAME = 240


def check_output(output: str | Path, *, replaces_delta: bool = False) -> Path:
    """Return the absolute path of an output folder after checking that it can be made.

    Args:
        output: must be missing or an empty folder.
        replaces_delta: whether it may also be a delta repository, which will be replaced.

    Raises:
        OutputError: if it holds something else, or cannot be written.
    """
    path = Path(os.path.abspath(output))
    with named_errors(path):
        _check_place(path)
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise OutputError(f"{path} exists and is not a folder; choose another")
        if not path.exists() or not any(path.iterdir()):
            return path
        if not replaces_delta:
            raise OutputError(f"{path} exists and is not an empty folder; choose another")
        if not _is_delta_repository(path):
            raise OutputError(
                f"{path} exists and holds something that is not a delta repository; choose another folder"
            )
        if folders := sorted(p.name for p in path.iterdir() if p.is_dir() and p.name != CHAT_TEMPLATE_DIR):
            raise OutputError(f"{path} would be replaced, but holds the folder {folders[0]}; choose another folder")
    return path


def _is_delta_repository(folder: Path) -> bool:
    try:
        return repository_kind(str(folder), HubOptions()) is RepositoryKind.DELTA
    except CheckpointError:
        return False


def _check_place(path: Path) -> None:
    """Check that a folder can be made, or replaced by a rename, at this path."""
    if path == Path.cwd():
        raise OutputError(f"{path} is the current folder, which cannot be replaced; choose another")
    if os.path.ismount(path):
        raise OutputError(f"{path} is a mount point, which cannot be renamed; choose a folder inside it")
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise OutputError(f"{path}: the folder's name is longer than {_LONGEST_NAME} bytes; choose another")
    parent = existing_parent(path)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be written: {parent} is not a folder that you may write to")


def existing_parent(path: Path) -> Path:
    """Return the nearest existing folder, or file, above a path."""
    return next(parent for parent in path.parents if parent.exists())


@contextlib.contextmanager
def named_errors(output: Path) -> Iterator[None]:
    """Convert the system's errors, such as a name that is too long, to an OutputError that names the output."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}") from error


def check_visible(path: Path) -> None:
    """Check that this process sees what the first process of its job has made.

    Raises:
        OutputError: if not.
    """
    if path.parent.is_dir():
        os.listdir(path.parent)  # a network file system may remember that the path was missing
    if not path.exists():
        raise OutputError(
            f"{path}, which the first process made, cannot be seen here: the processes of a job need one file system; "
            "choose an output folder on it"
        )
