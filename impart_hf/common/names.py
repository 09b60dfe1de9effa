"""Names of models in files that others read, without paths of this machine."""

import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def public_name(source: str) -> str:
    """Return a model's public name: a local folder's name without its path, or a Hub id without its revision."""
    return Path(os.path.abspath(source)).name if os.path.exists(source) else source.partition("@")[0]


def recorded_base(base: str, revision: str | None, base_name: str | None) -> tuple[str, str | None]:
    """Return what config.json records of a base: Hub id and commit, or a local folder's absolute path and None.

    Args:
        base: local folder or Hub id.
        revision: the base's commit, if it is on the Hub.
        base_name: Hub id to record instead of a folder.

    Raises:
        ValueError: if `base_name` is not a Hub id.
    """
    if base_name:
        try:
            validate_repo_id(base_name)
        except HFValidationError as error:
            raise ValueError(f"base_name: '{base_name}' is not a Hub id (owner/name)") from error
    if os.path.isdir(base):
        return (base_name, revision) if base_name else (os.path.abspath(base), None)
    return base_name or base, revision


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a Hub id, USER/NAME; a folder's path may have it too."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def is_on_hub(recorded: str) -> bool:
    """Return whether a recorded base is a Hub id, which others can download, and not a local folder's path."""
    return not os.path.isabs(recorded)
