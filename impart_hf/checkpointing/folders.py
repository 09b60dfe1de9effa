"""The folders in which transformers' Trainer keeps its checkpoints: which are whole, and which rest on which."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..common.names import is_on_hub
from ..modeling.checkpoints import Checkpoint
from ..modeling.model_files import CheckpointError, HubOptions, read_json
from ..modeling.repository_kind import RepositoryKind, kind_of

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
STATE = "trainer_state.json"
DENSE_INDEX = "model.safetensors.index.json"


def checkpoint_of(output_dir: str | Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")


def is_checkpoint_name(folder: Path) -> bool:
    """Return whether a folder has a name that the Trainer gives to checkpoints."""
    return _NAME.fullmatch(Path(os.path.abspath(folder)).name) is not None


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints in the Trainer's output folder by their steps; none if there is no such folder."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def is_delta(checkpoint: Path) -> bool:
    """Return whether a checkpoint holds an exact delta."""
    try:
        return kind_of(read_json(checkpoint / "config.json")) is RepositoryKind.DELTA
    except CheckpointError:
        return False


def dense_files(checkpoint: Path) -> list[Path]:
    """Return the files of dense weights, the index first: without it, or the only file, they count for nothing."""
    names = (DENSE_INDEX, "model.safetensors", "model-*-of-*.safetensors")
    return [path for name in names for path in sorted(checkpoint.glob(name))]


def has_weights(checkpoint: Path) -> bool:
    """Return whether a checkpoint has dense weights, as the Trainer looks for them."""
    return any((checkpoint / name).is_file() for name in (DENSE_INDEX, "model.safetensors"))


def is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end.

    The Trainer writes weights first and its state last; but in a step that is taken again, that of before is there.
    """
    try:
        TrainerState.load_from_json(str(checkpoint / STATE))
        if not is_delta(checkpoint):
            Checkpoint(str(checkpoint), HubOptions())  # whose files must be as long as their headers say
    except (OSError, ValueError, TypeError):
        return False
    return True


def chain_of(checkpoint: Path) -> list[Path]:
    """Return a delta checkpoint and the local delta repositories that it rests on; nothing for a dense checkpoint."""
    chain: list[Path] = []
    while is_delta(checkpoint) and checkpoint not in chain:
        chain.append(checkpoint)
        base = str(read_json(checkpoint / "config.json")["base_model_name_or_path"])
        if is_on_hub(base):
            break
        checkpoint = Path(base)
    return chain


def rotate(output_dir: str | Path, keep: int, best: str | None) -> None:
    """Remove old checkpoints, as the Trainer's `save_total_limit` does, but none that a kept one rests on.

    Args:
        keep: how many of the newest to keep.
        best: a checkpoint to keep besides.
    """
    found = checkpoints_in(output_dir)
    kept = [*found[-keep:], *([Path(best)] if best else [])]
    needed = {os.path.realpath(path) for checkpoint in kept for path in (checkpoint, *chain_of(checkpoint))}
    for checkpoint in reversed(found):  # what rests on another goes before it, in case this is interrupted
        if os.path.realpath(checkpoint) not in needed:
            shutil.rmtree(checkpoint)


@contextlib.contextmanager
def unchanged_time(folder: Path) -> Iterator[None]:
    """Give a folder its time of modification back: the Trainer removes the oldest checkpoints by it."""
    times = folder.stat()
    yield
    os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))
