"""Sidecar files: files copied unchanged from the fine-tune, such as tokenizer, generation config and licence."""

import shutil
from pathlib import Path

from ..modeling.checkpoints import HubOptions, fetch_file

_SIDECAR_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)


def sidecar_files(source: str, options: HubOptions) -> list[Path]:
    """Return the paths of the sidecar files that a local folder or Hub repository has."""
    paths = [fetch_file(source, name, options) for name in _SIDECAR_FILES]
    return [path for path in paths if path is not None]


def copy_sidecar_files(source: str, options: HubOptions, target: Path) -> None:
    """Copy the sidecar files of a local folder or Hub repository to a folder."""
    for path in sidecar_files(source, options):
        shutil.copyfile(path, target / path.name)
