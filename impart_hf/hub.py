"""Publishing a delta repository or a pruned model on the Hub."""

import os
from pathlib import Path

from .common.names import is_on_hub
from .modeling.configuration_pruned import is_pruned_type
from .modeling.delta_file import DeltaFile, find_delta_files
from .modeling.delta_repository import read_config
from .modeling.model_files import CheckpointError, HubOptions, repository_kind
from .modeling.repository_files import push_folder
from .modeling.repository_kind import RepositoryKind
from .pruning.checks import open_decoder
from .repository.reader_files import pruned_reader_files


def push(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload a delta repository or a pruned model, after checking that others can load it.

    Args:
        folder: folder of a delta repository, or of a model from which layers, heads or channels were removed.
        repo_id: the repository on the Hub, created if missing.
        token: as for any upload; the saved login if None.
        private: whether a new repository is private.
        revision: branch to push to, created if missing; `main` if None.
        commit_message: message of the commit.

    Returns:
        The commit's URL.

    Raises:
        CheckpointError: if the folder holds neither kind of model, lacks files or tensors, or names a base that is a
            local folder.
        DeltaFormatError: if its delta file is damaged.
        ValueError: if a pruned model's config.json is not valid.
    """
    if not os.path.isdir(folder):
        raise CheckpointError(f"'{folder}' is not a folder")
    if is_pruned_model(str(folder), HubOptions()):
        _check_pruned_model(str(folder))
        message = commit_message or "Upload pruned model"
    else:
        _check_delta_repository(folder)
        message = commit_message or "Upload delta repository"
    return push_folder(Path(folder), repo_id, token=token, private=private, revision=revision, commit_message=message)


def is_pruned_model(source: str, options: HubOptions) -> bool:
    """Return whether a local folder or Hub repository is a pruned model, judged by its config.json.

    Raises:
        CheckpointError: if config.json is missing or cannot be read.
    """
    return repository_kind(source, options) is RepositoryKind.PRUNED


def _check_pruned_model(folder: str) -> None:
    """Check that config.json and weights are complete and match, and that the model loads without impart-hf."""
    checkpoint, _ = open_decoder(folder)
    has_own_class = is_pruned_type(checkpoint.config["model_type"])
    reader_files = [path.name for path in pruned_reader_files()] if has_own_class else []
    if reader_files and not checkpoint.config.get("auto_map"):
        raise CheckpointError(
            f"config.json of '{folder}' has no auto_map: load the model and save it with save_pretrained"
        )
    for name in reader_files:
        if not os.path.isfile(os.path.join(folder, name)):
            raise CheckpointError(f"'{folder}' lacks {name}: load the model and save it with save_pretrained")


def _check_delta_repository(folder: str | Path) -> None:
    config = read_config(str(folder), HubOptions())
    file = DeltaFile(find_delta_files(str(folder), HubOptions())[0])
    for name in file.names():
        file.read(name)
    if not is_on_hub(config.base_model_name_or_path):
        raise CheckpointError(
            f"the base of '{folder}' is recorded as the local folder {config.base_model_name_or_path}, which others "
            "do not have: compress again with the base's Hub id, or with --base-name"
        )
