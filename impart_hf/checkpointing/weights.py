"""The weights of a checkpoint folder: dense ones replaced by an exact delta, and got back from it.

The Trainer's other files, such as the optimizer's state, stay where they are. What makes a folder a delta repository is
its config.json, which is replaced by one rename; before it and after it the checkpoint is whole.
"""

import os
from pathlib import Path

from ..common.configs import model_config
from ..common.files import atomic_write, sync_path, write_json
from ..common.progress import Progress
from ..modeling.checkpoints import Checkpoint
from ..modeling.model_files import CheckpointError, HubOptions, read_json
from ..repository.open import open_repository
from ..storage.checkpoint_writer import write_weights
from ..storage.locked_folder import LockedFolder
from .folders import dense_files, has_weights, is_delta, unchanged_time
from .trained_tensors import FSDP_WEIGHTS, TrainedTensors, fsdp_names, write_fsdp_weights

# Which tensors FSDP's file had, if it was removed. Nothing that begins like this is copied into other repositories.
_FSDP_NAMES = "trainer_fsdp_names.json"
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


def place_delta(checkpoint: Path, delta: Path) -> None:
    """Move a delta repository of a dense checkpoint into its folder; the dense weights then lie beside it.

    Args:
        checkpoint: the folder that the Trainer wrote.
        delta: the repository, on the same file system; some of its files are left.
    """
    (checkpoint / _FSDP_NAMES).unlink(missing_ok=True)  # of a run whose steps are taken again, as the next
    if (checkpoint / FSDP_WEIGHTS).is_file():
        dense = Checkpoint(str(checkpoint), HubOptions())
        names = fsdp_names(checkpoint, TrainedTensors(dense, model_config(dense.config)))
        with atomic_write(checkpoint / _FSDP_NAMES) as path:
            write_json(path, names)
    for old in checkpoint.glob("delta_model*"):
        old.unlink()
    config = delta / "config.json"
    for path in sorted(delta.iterdir()):
        if path.is_file() and path != config:
            os.replace(path, checkpoint / path.name)
    sync_path(checkpoint)
    os.replace(config, checkpoint / config.name)
    sync_path(checkpoint)


def stand_in(checkpoint: Path, holder: Path) -> Path | None:
    """Return a dense model to compute with in place of a delta checkpoint, so that no chain has to be decoded.

    Args:
        checkpoint: a delta checkpoint.
        holder: an existing folder, in which the model's folder is made.

    Returns:
        The folder; None if no dense weights lie beside the delta, or if they have other names than its tensors.
    """
    if not (is_delta(checkpoint) and has_weights(checkpoint)):
        return None
    folder = holder / checkpoint.name  # the model card has this name
    folder.mkdir()
    for path in dense_files(checkpoint):
        os.symlink(os.path.abspath(path), folder / path.name)
    write_json(folder / "config.json", read_json(checkpoint / "config.json")["text_config"])
    dense, delta = Checkpoint(str(folder), HubOptions()), open_repository(str(checkpoint), HubOptions())
    forms = [{name: (model.shape(name), model.dtype(name)) for name in model.names()} for model in (dense, delta)]
    return folder if forms[0] == forms[1] and dense.stored_names() == delta.names() else None


def rest_on(delta: Path, base: str) -> None:
    """Let a delta, made with a stand-in as its base, record the delta checkpoint that this stood for."""
    config = read_json(delta / "config.json")
    write_json(
        delta / "config.json", config | {"base_model_name_or_path": os.path.abspath(base), "base_is_delta": True}
    )


def remove_dense(checkpoint: Path) -> None:
    """Remove the dense weights of a checkpoint that holds a delta; of others, nothing."""
    if not is_delta(checkpoint):
        return
    files = dense_files(checkpoint)
    if _removable(checkpoint):
        files += checkpoint.glob(FSDP_WEIGHTS)
    if files:
        with unchanged_time(checkpoint):
            for path in files:
                path.unlink()


def restore_dense(checkpoint: Path, base: str | None = None) -> None:
    """Write the dense weights of a delta checkpoint beside the delta, under the names that the model has in memory.

    Args:
        base: folder or Hub id of the base, instead of the recorded one.

    Raises:
        CheckpointError: if the base is missing.
        DeltaFormatError, WrongBaseError: if the delta is damaged, or the base is another.
        OutputError: if the disk has too little room.
    """
    if not is_delta(checkpoint):
        return
    names = _removable(checkpoint)
    lacks_fsdp = bool(names) and not (checkpoint / FSDP_WEIGHTS).is_file()
    if has_weights(checkpoint) and not lacks_fsdp:
        return
    with unchanged_time(checkpoint), LockedFolder(checkpoint, ".restoring-") as holder:
        repository = open_repository(str(checkpoint), HubOptions(), base)
        trained = TrainedTensors(repository, repository.text_config)
        write_weights(holder, trained.tensors.values(), _SHARD_SIZE, Progress(False), "Restoring")
        if lacks_fsdp:
            write_fsdp_weights(holder, names)
        for path in reversed([*dense_files(holder), *holder.glob(FSDP_WEIGHTS)]):  # the index last
            os.replace(path, checkpoint / path.name)
        sync_path(checkpoint)


def _removable(checkpoint: Path) -> dict[str, str]:
    """Return which of the model's tensors FSDP's file has; nothing if it must stay, or there never was one."""
    path = checkpoint / _FSDP_NAMES
    return read_json(path) if path.is_file() else {}
