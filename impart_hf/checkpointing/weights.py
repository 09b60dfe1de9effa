"""The weights of a checkpoint folder: dense ones replaced by an exact delta, and got back from it.

The Trainer's other files, such as the optimizer's state, stay where they are. What makes a folder a delta repository is
its config.json, which is replaced by one rename; before it and after it the checkpoint is whole.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..common.files import atomic_write, sync_path, write_json
from ..common.progress import Progress
from ..modeling.checkpoints import Checkpoint
from ..modeling.model_files import CheckpointError, HubOptions, read_json
from ..modeling.tensors import Tensors
from ..repository.open import open_repository
from ..storage.checkpoint_writer import DenseTensor, write_weights
from ..storage.locked_folder import LockedFolder
from .folders import dense_files, has_weights, is_delta, unchanged_time
from .fsdp import FSDP_WEIGHTS, same_tensors, write_fsdp_weights

# What restoring must know besides the delta. Nothing that begins like this is copied into other repositories.
_NAMES = "trainer_weights.json"
_SHARD_SIZE = "5GB"


def check_dense(checkpoint: Path) -> None:
    """Check that the Trainer has written dense weights.

    Raises:
        CheckpointError: if not.
    """
    if not has_weights(checkpoint):
        raise CheckpointError(
            f"the Trainer wrote no model.safetensors into {checkpoint}, of which a delta could be made: with DeepSpeed "
            "ZeRO-3 set stage3_gather_16bit_weights_on_model_save, with FSDP the state dict type FULL_STATE_DICT"
        )


def place_delta(checkpoint: Path, delta: Path, base: str, own_names: Callable[[], dict[str, str | None]]) -> None:
    """Move a delta repository of a dense checkpoint into its folder; the dense weights then lie beside it.

    Args:
        checkpoint: the folder that the Trainer wrote.
        delta: the repository, on the same file system; some of its files are left.
        base: folder or Hub id of the base.
        own_names: returns the checkpoint's names of the repository's tensors, None for one in another form; called if
            the names differ.

    Raises:
        CheckpointError: if the Trainer could not read what would be restored.
    """
    dense, repository = Checkpoint(str(checkpoint), HubOptions()), open_repository(str(delta), HubOptions(), base)
    names = _names(dense, repository, own_names)
    fsdp = same_tensors(checkpoint)
    with atomic_write(checkpoint / _NAMES) as path:
        write_json(path, {"names": names, "fsdp": fsdp})
    for old in checkpoint.glob("delta_model*"):  # of a run whose steps are taken again
        old.unlink()
    config = delta / "config.json"
    for path in sorted(delta.iterdir()):
        if path.is_file() and path != config:
            os.replace(path, checkpoint / path.name)
    sync_path(checkpoint)
    os.replace(config, checkpoint / config.name)
    sync_path(checkpoint)


def _names(dense: Checkpoint, delta: Tensors, own_names: Callable[[], dict[str, str | None]]) -> dict[str, str]:
    """Return the dense checkpoint's names of the delta's tensors; nothing if they are the same.

    Raises:
        CheckpointError: if a tensor has another form in the two.
    """
    if dense.names() == delta.names():
        return {}
    names = own_names()
    for name in delta.names():
        own = names.get(name)
        if own is None or (dense.shape(own), dense.dtype(own)) != (delta.shape(name), delta.dtype(name)):
            raise CheckpointError(
                f"the base of '{dense.source}' has {name} in another form than the Trainer saves it: load the base, "
                "save it with this version of transformers, and give that folder as the base"
            )
    return {name: own for name, own in names.items() if own is not None}


def remove_dense(checkpoint: Path) -> None:
    """Remove the dense weights of a checkpoint that holds a delta; of others, nothing."""
    if not is_delta(checkpoint):
        return
    files = dense_files(checkpoint)
    if _about(checkpoint).get("fsdp"):
        files += checkpoint.glob(FSDP_WEIGHTS)
    if files:
        with unchanged_time(checkpoint):
            for path in files:
                path.unlink()


def restore_dense(checkpoint: Path, base: str | None = None) -> None:
    """Write the dense weights of a delta checkpoint beside the delta, under the names that the Trainer gave them.

    Args:
        base: folder or Hub id of the base, instead of the recorded one.

    Raises:
        CheckpointError: if the base is missing.
        DeltaFormatError, WrongBaseError: if the delta is damaged, or the base is another.
        OutputError: if the disk has too little room.
    """
    if not is_delta(checkpoint):
        return
    about = _about(checkpoint)
    names, fsdp = about.get("names") or {}, about.get("fsdp") or {}
    lacks_fsdp = bool(fsdp) and not (checkpoint / FSDP_WEIGHTS).is_file()
    if has_weights(checkpoint) and not lacks_fsdp:
        return
    with unchanged_time(checkpoint), LockedFolder(checkpoint, ".restoring-") as holder:
        repository = open_repository(str(checkpoint), HubOptions(), base)
        tensors = [
            DenseTensor(
                names.get(name, name), repository.shape(name), repository.dtype(name),
                partial(repository.tensor, name), checked=True,
            )
            for name in repository.names()
        ]  # fmt: skip
        write_weights(holder, tensors, _SHARD_SIZE, Progress(False), "Restoring")
        if lacks_fsdp:
            write_fsdp_weights(holder, fsdp)
        for path in reversed([*dense_files(holder), *holder.glob(FSDP_WEIGHTS)]):  # the index last
            os.replace(path, checkpoint / path.name)
        sync_path(checkpoint)


def _about(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / _NAMES
    return read_json(path) if path.is_file() else {}
