"""Copying a delta repository's files to another folder, and uploading them to the Hub."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

from .checkpoints import CheckpointError, HubOptions
from .delta_repository import find_delta_files

logger = logging.get_logger(__name__)

_UNNAMED = "REPO_ID"  # a card's placeholder for the Hub id, until the repository is published


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> str:
    """Upload a delta repository's folder to the Hub in one commit, without files that the Hub already has.

    Returns:
        The commit's URL.

    Raises:
        CheckpointError: if the Hub cannot be reached.
        HfHubHTTPError: if the Hub refuses the upload.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with _with_named_card(folder, repo_id) as named:
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=named,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or "Upload delta repository",
                commit_description=commit_description,
            )
    except HfHubHTTPError:  # the Hub's answer says what is wrong
        raise
    except Exception as error:  # the HTTP library's own errors, whichever library huggingface_hub uses
        if not type(error).__module__.startswith("http"):
            raise
        raise CheckpointError(f"the Hub cannot be reached, nothing was published: {error}") from error


@contextmanager
def _with_named_card(folder: Path, repo_id: str) -> Iterator[Path]:
    """Yield the folder to publish, in which the card's loading example names the repository."""
    card = folder / "README.md"
    text = card.read_text("utf-8") if card.is_file() else ""
    if _UNNAMED not in text:
        yield folder
        return
    with tempfile.TemporaryDirectory() as holder:
        named = Path(holder, "named")
        shutil.copytree(folder, named, copy_function=_link)
        (named / card.name).unlink()
        (named / card.name).write_text(text.replace(_UNNAMED, repo_id), "utf-8")
        yield named


def _link(source: str, target: str) -> None:
    try:
        os.symlink(os.path.abspath(source), target)
    except OSError:  # the system has no links
        shutil.copyfile(source, target)


def copy_repository(source: str, options: HubOptions, target: Path) -> None:
    """Copy a delta repository's files (in its top folder, not hidden) to `target`, each atomically.

    Raises:
        CheckpointError: if the source no longer exists.
    """
    if os.path.isabs(source) or os.path.isdir(source):
        folder = Path(source, options.subfolder)
    else:
        find_delta_files(source, options)  # raises a clear error if the repository cannot be read
        if options.local_files_only or is_offline_mode():
            logger.warning(f"The Hub is offline: only the files of '{source}' in the local cache are saved.")
        prefix = f"{options.subfolder}/" if options.subfolder else ""
        snapshot = snapshot_download(
            source,
            revision=options.revision,
            token=options.token,
            cache_dir=options.cache_dir,
            local_files_only=options.local_files_only,
            allow_patterns=f"{prefix}*",
        )
        folder = Path(snapshot, options.subfolder)
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")) if folder.exists() else []
    if not any(p.name == "config.json" for p in files):
        raise CheckpointError(f"the delta repository '{source}' that this model was loaded from no longer exists")
    target.mkdir(parents=True, exist_ok=True)
    if target.resolve() == folder.resolve():
        return
    for path in files:
        with tempfile.NamedTemporaryFile(dir=target, prefix=".", delete=False) as temporary:
            with path.open("rb") as original:
                shutil.copyfileobj(original, temporary)
            temporary.flush()
            os.fsync(temporary.fileno())
        os.chmod(temporary.name, 0o644)
        os.replace(temporary.name, target / path.name)
