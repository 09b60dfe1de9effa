"""What models and texts are called in files that others read: never by where they lie on this machine."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def public_name(source: str) -> str:
    """A model's name for others: of a local folder its own name without its path, of a Hub id the id, no revision."""
    return Path(os.path.abspath(source)).name if os.path.exists(source) else source.partition("@")[0]


def text_name(source: str | os.PathLike | Sequence[Any]) -> str:
    """What a record says of a text's origin: a file's name without its folder, a data set's, or how many texts."""
    if not isinstance(source, str | os.PathLike):
        return f"{len(source)} texts"
    return Path(os.path.abspath(source)).name if os.path.exists(source) else os.fspath(source)


def recorded_base(base: str, revision: str | None, base_name: str | None) -> tuple[str, str | None]:
    """What config.json records of a base: Hub id and commit, or the absolute path of a local folder and None.

    Args:
        base: local folder or Hub id.
        revision: its commit, if it is on the Hub.
        base_name: the id to record instead of a folder.

    Raises:
        ValueError: if that cannot be an id.
    """
    if base_name:
        try:
            validate_repo_id(base_name)
        except HFValidationError as error:
            raise ValueError(f"base_name: '{base_name}' is not a Hub id (owner/name)") from error
    if os.path.isdir(base):
        return (base_name, revision) if base_name else (os.path.abspath(base), None)
    return base_name or base, revision


def is_on_hub(recorded: str) -> bool:
    """Whether a base that config.json records can be had by others: a local folder is recorded by its path."""
    return not os.path.isabs(recorded)
