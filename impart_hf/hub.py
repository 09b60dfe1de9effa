"""Publishing a delta repository or a pruned model."""

import os
from pathlib import Path

from .common.names import is_on_hub
from .modeling.checkpoints import CheckpointError, HubOptions, repository_kind
from .modeling.configuration_pruned_llama import PrunedLlamaConfig
from .modeling.delta_repository import DeltaFile, find_delta_files
from .modeling.repository_files import push_folder
from .modeling.repository_kind import RepositoryKind
from .pruning.checks import open_llama
from .repository.open import read_config
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
    """Upload a delta repository or a pruned model, after a look at whether others will be able to load it.

    Args:
        folder: a delta repository's folder, or that of a model from which layers, heads or channels were removed.
        repo_id: the repository on the Hub, created if missing.
        token: as for any upload; the saved login if None.
        private: whether a new repository is private.
        revision: branch to push to, created if missing; `main` if None.
        commit_message: of the commit.

    Returns:
        The commit's URL.

    Raises:
        CheckpointError: if the folder is neither, lacks files or tensors, or names a base that is a folder of this
            machine.
        DeltaFormatError: if its delta file is damaged.
        ValueError: if a pruned model's config.json describes none.
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
    """Whether a local folder or Hub repository is a model from which something was pruned, by its config.json.

    Raises:
        CheckpointError: if it has no config.json that can be read.
    """
    return repository_kind(source, options) is RepositoryKind.PRUNED


def _check_pruned_model(folder: str) -> None:
    """See that config.json and weights are whole and go together, and that they load without impart-hf."""
    checkpoint, _ = open_llama(folder)
    has_own_class = checkpoint.config["model_type"] == PrunedLlamaConfig.model_type
    wanted = [path.name for path in pruned_reader_files()] if has_own_class else []
    if wanted and not checkpoint.config.get("auto_map"):
        raise CheckpointError(
            f"config.json of '{folder}' has no auto_map: load the model and save it with save_pretrained"
        )
    for name in wanted:
        if not os.path.isfile(os.path.join(folder, name)):
            raise CheckpointError(f"'{folder}' lacks {name}: load the model and save it with save_pretrained")


def _check_delta_repository(folder: str | Path) -> None:
    config = read_config(str(folder), HubOptions())
    file = DeltaFile(find_delta_files(str(folder), HubOptions())[0])
    for name in file.names():
        file.read(name)
    if not is_on_hub(config.base_model_name_or_path):
        raise CheckpointError(
            f"the base of '{folder}' is recorded as the local folder {config.base_model_name_or_path}, which nobody "
            "else has: compress again with the base's Hub id, or with --base-name"
        )
