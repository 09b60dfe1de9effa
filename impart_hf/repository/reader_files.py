"""The reader's source files that travel in repositories."""

import shutil
from pathlib import Path

from ..modeling import __file__ as _reader_init

_READER = Path(_reader_init).parent


# What a width-pruned checkpoint needs of the reader to load with trust_remote_code=True.
_PRUNED_READER_FILES = ("configuration_pruned_llama.py", "modeling_pruned_llama.py", "pruned_llama_card.py")


def reader_files() -> list[Path]:
    """The Python files that travel in every delta repository."""
    return sorted(p for p in _READER.glob("*.py") if p.name != "__init__.py")


def pruned_reader_files() -> list[Path]:
    """The Python files that travel in every width-pruned checkpoint."""
    return [_READER / name for name in _PRUNED_READER_FILES]


def copy_pruned_reader(model_type: str, target: Path) -> None:
    """Put the Python files into a checkpoint's folder that its model type needs: none but a width-pruned model's."""
    if model_type == "pruned_llama":
        for path in pruned_reader_files():
            shutil.copyfile(path, target / path.name)
