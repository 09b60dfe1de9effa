"""Writing a folder or a dense checkpoint atomically: whole or not at all."""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from ..common import processes
from ..common.files import OutputError, sync_path, write_json
from ..common.progress import Progress
from ..modeling.checkpoints import DTYPE_NAMES, all_finite
from ..modeling.checksums import tensor_bytes
from ..modeling.tensors import Tensors
from .locked_folder import LockedFolder
from .output import check_output, check_visible
from .safetensors_writer import Entry, SafetensorsFile, shard_entries

WEIGHTS = "model.safetensors"


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """Yield a hidden folder to fill; on success it is renamed to `output`, otherwise it is removed.

    Raises:
        OutputError: as for `check_output`, which is called at the beginning and at the end; or if the disk is full.
    """
    path = check_output(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with LockedFolder(path.parent, f".{path.name}.new-") as holder:
        folder = holder / path.name
        folder.mkdir()
        try:
            yield folder
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OutputError(f"the disk of {path.parent} is full, nothing was written; free some space") from error
        check_output(path)  # another process may have written it since
        for file in folder.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # some libraries write files that only their owner can read
            sync_path(file)
        sync_path(folder)
        if path.exists():
            path.rmdir()
        os.rename(folder, path)
        sync_path(path.parent)


@contextmanager
def new_folder_of_job(output: str | Path) -> Iterator[Path]:
    """Yield one hidden folder, as `new_folder` does, in all processes of a job."""
    with ExitStack() as stack:
        own = processes.each(lambda: stack.enter_context(new_folder(output)) if processes.is_first() else None)
        folder = processes.from_first(own)
        assert folder is not None
        processes.each(lambda: check_visible(folder))
        yield folder
        processes.in_first(stack.close)


class DenseTensor:
    """A tensor to be written, made when the file reaches it.

    Attributes:
        name, shape, dtype: as in the file.
        make: makes the tensor.
        checked: whether `make` checks the numbers, and gives NaN only where a base has it.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        make: Callable[[], torch.Tensor],
        checked: bool = False,
    ):
        self.name, self.shape, self.dtype, self.make, self.checked = name, shape, dtype, make, checked

    @property
    def size(self) -> int:
        """Size of its data, in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def dense_tensors(tensors: Tensors) -> list[DenseTensor]:
    """Return all tensors of a model for `write_weights`; each is made when it is written."""
    return [
        DenseTensor(name, tensors.shape(name), tensors.dtype(name), partial(tensors.tensor, name))
        for name in tensors.names()
    ]


def check_room(folder: Path, needed: int) -> None:
    """Check that the disk of a folder has room for weights.

    Raises:
        OutputError: if it has less than `needed` bytes.
    """
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OutputError(f"the disk has {free} bytes free, {needed} are needed for the weights")


def write_weights(
    folder: Path,
    tensors: Iterable[DenseTensor],
    max_shard_size: int | str,
    progress: Progress,
    title: str,
    *,
    together: bool = False,
    begin: Callable[[list[str]], None] | None = None,
) -> None:
    """Write model.safetensors, sharded with an index if it is large, with one tensor in memory at a time.

    Args:
        together: whether all processes of a job call this, with the same arguments, to share the tensors out.
        begin: told the names of the tensors that this process makes, in their order, before the first one is made.

    Raises:
        OutputError: if the disk has no room for the weights.
        ValueError: if `max_shard_size` is not a size, or a tensor is not finite or has not the stated shape and dtype.
    """
    tensors = list(tensors)
    needed = sum(tensor.size for tensor in tensors)
    first, each = (processes.in_first, processes.each) if together else (_alone, _alone)
    first(lambda: check_room(folder, needed))
    with progress.bar(needed, title) as bar:

        def data(tensor: DenseTensor) -> bytes:
            bar.show(tensor.name)
            made = tensor.make()
            if tuple(made.shape) != tensor.shape or made.dtype != tensor.dtype:
                raise ValueError(
                    f"{tensor.name} is {made.dtype} {list(made.shape)}, not {tensor.dtype} {list(tensor.shape)}"
                )
            if not tensor.checked and not all_finite(made):
                raise ValueError(f"{tensor.name} holds NaN or infinity: nothing was written")
            bar.update(tensor.size)
            return tensor_bytes(made).tobytes()

        entries = [
            Entry(t.name, DTYPE_NAMES[t.dtype], t.shape, t.size, partial(data, t))
            for t in sorted(tensors, key=lambda t: -t.dtype.itemsize)
        ]
        members, index = shard_entries(entries, WEIGHTS, max_shard_size)
        files = {name: SafetensorsFile(folder / name, held, {"format": "pt"}) for name, held in members.items()}

        def make() -> None:
            for file in files.values():
                file.make()
            if index is not None:
                write_json(folder / f"{WEIGHTS}.index.json", index)

        def fill() -> None:
            own = {entry.name for entry in (processes.share(entries, lambda e: e.size) if together else entries)}
            filled = {name: [entry for entry in held if entry.name in own] for name, held in members.items()}
            if begin is not None:
                begin([entry.name for held in filled.values() for entry in held])
            for name, held in filled.items():
                files[name].fill(held)

        first(make)
        each(fill)


def _alone(work: Callable[[], None]) -> None:
    work()
