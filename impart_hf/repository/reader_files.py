"""The reader's source files that are copied into repositories."""

import shutil
from pathlib import Path

from ..modeling import __file__ as _reader_init

_READER = Path(_reader_init).parent

# The reader files that a width-pruned checkpoint needs to load with trust_remote_code=True.
_PRUNED_READER_FILES = ("configuration_pruned_llama.py", "modeling_pruned_llama.py", "pruned_llama_card.py")


def reader_files() -> list[Path]:
    """Return the Python files that are copied into every delta repository."""
    return sorted(p for p in _READER.glob("*.py") if p.name != "__init__.py")


def pruned_reader_files() -> list[Path]:
    """Return the Python files that are copied into every width-pruned checkpoint."""
    return [_READER / name for name in _PRUNED_READER_FILES]


def copy_pruned_reader(model_type: str, target: Path) -> None:
    """Copy the reader files into the folder of a checkpoint, if its model type is that of width-pruned models."""
    if model_type == "pruned_llama":
        for path in pruned_reader_files():
            shutil.copyfile(path, target / path.name)
