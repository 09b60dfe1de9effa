"""Scripts as modules, for the tests of scripts/."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def load_script(name: str) -> ModuleType:
    """The script `name` or `FOLDER/name` as a module; scripts import each other by bare name, as when they are run."""
    path = SCRIPTS / name
    sys.path.insert(0, str(path.parent))
    try:
        return importlib.import_module(path.name)
    finally:
        sys.path.remove(str(path.parent))
