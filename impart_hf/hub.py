"""Publishing a delta repository."""

import os
from pathlib import Path

from .modeling.checkpoints import CheckpointError, HubOptions
from .modeling.delta_repository import DeltaFile, find_delta_files
from .modeling.repository_files import push_folder
from .reconstruct import read_config


def push(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload a delta repository, after a look at whether others will be able to load it.

    Args:
        folder: a delta repository's folder.
        repo_id: the repository on the Hub, created if missing.
        token: as for any upload; the saved login if None.
        private: whether a new repository is private.
        revision: branch to push to, created if missing; `main` if None.
        commit_message: of the commit.

    Returns:
        The commit's URL.

    Raises:
        CheckpointError: if the folder is no delta repository, or its base is a folder of this machine.
        DeltaFormatError: if its delta file is damaged.
    """
    if not os.path.isdir(folder):
        raise CheckpointError(f"'{folder}' is not a folder")
    config = read_config(str(folder), HubOptions())
    file = DeltaFile(find_delta_files(str(folder), HubOptions())[0])
    for name in file.names():
        file.read(name)
    if os.path.isabs(config.base_model_name_or_path):
        raise CheckpointError(
            f"the base of '{folder}' is recorded as the local folder {config.base_model_name_or_path}, which nobody "
            "else has: compress again with the base's Hub id, or with --base-name"
        )
    return push_folder(
        Path(folder), repo_id, token=token, private=private, revision=revision, commit_message=commit_message
    )
