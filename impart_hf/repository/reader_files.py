"""The reader's source files that are copied into repositories."""

import shutil
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..modeling import __file__ as _reader_init
from ..modeling.configuration_pruned import PRUNED_CONFIGS
from ..modeling.model_files import CheckpointError

_READER = Path(_reader_init).parent

# The reader files that a width-pruned checkpoint needs to load with trust_remote_code=True.
_PRUNED_READER_FILES = ("configuration_pruned.py", "modeling_pruned.py", "pruned_card.py")
# Their names when LLaMA alone could be pruned; such checkpoints have their own copies.
_FORMER_READER_FILES = ("configuration_pruned_llama.py", "modeling_pruned_llama.py", "pruned_llama_card.py")

# By this file it is known that a repository has the reader, and not code of its own under the same names.
_OF_THE_READER = "modeling_delta_compressed.py"


def reader_files() -> list[Path]:
    """Return the Python files that are copied into every delta repository."""
    return sorted(p for p in _READER.glob("*.py") if p.name != "__init__.py")


def pruned_reader_files() -> list[Path]:
    """Return the Python files that are copied into every width-pruned checkpoint."""
    return [_READER / name for name in _PRUNED_READER_FILES]


def is_reader_file(name: str, names: Container[str]) -> bool:
    """Return whether a file of a repository is one of the reader's.

    Args:
        name: the file's.
        names: of all files of the repository.
    """
    for files in (_PRUNED_READER_FILES, _FORMER_READER_FILES):
        if name in files and all(each in names for each in files):  # others may have a modeling_pruned.py of their own
            return True
    return _OF_THE_READER in names and name in {path.name for path in reader_files()}


def refuse_reader_names(source: str, names: Iterable[str]) -> None:
    """Check that none of the files to copy into a delta repository has the name of a reader file.

    Raises:
        CheckpointError: naming the first that has.
    """
    taken = {path.name for path in reader_files()}
    if clashes := sorted(name for name in names if name.lower() in taken):
        raise CheckpointError(
            f"'{source}' has code of its own in {clashes[0]}, and a delta repository has a file of that name: rename "
            "it, and where it is imported"
        )


def with_pruned_reader(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Copy the reader files into the folder of a checkpoint, if its model type is that of width-pruned models.

    Args:
        config: the checkpoint's config.json.

    Returns:
        The config.json to write; its `auto_map` names the files.
    """
    family = PRUNED_CONFIGS.get(config.get("model_type", ""))
    if family is None:
        return dict(config)
    for path in pruned_reader_files():
        shutil.copyfile(path, folder / path.name)
    return {**config, "auto_map": family.auto_classes()}
