"""Compression methods, one file each.

A method is a dataclass derived from `MethodConfig`, with a `name`, in a module of this folder. All modules here are
imported, so a new method needs only a new file: its settings become options of the command line, and its class is
public, here and in `impart_hf`.
"""

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

from .base import Encoded, EncodingTask, MethodConfig, Spectrum, method_class, method_names
from .delta_come import DeltaComeConfig
from .exact import ExactConfig
from .settings import Setting, setting, settings_of

if TYPE_CHECKING:  # names for the type checker
    from .bitdelta import BitDeltaConfig as BitDeltaConfig
    from .dare import DareConfig as DareConfig
    from .dare_qt import DareQtConfig as DareQtConfig
    from .impart import ImPartConfig as ImPartConfig
    from .impart_qt import ImPartQtConfig as ImPartQtConfig
    from .impart_rd import ImPartRdConfig as ImPartRdConfig
    from .lowrank import LowRankConfig as LowRankConfig

for _module in pkgutil.iter_modules(__path__):
    try:
        importlib.import_module(f"{__name__}.{_module.name}")
    except Exception as error:  # someone's file may fail in any way
        _file = Path(__path__[0], f"{_module.name}.py")
        raise ImportError(f"the method in {_file} cannot be imported: {type(error).__name__}: {error}") from error

for _method in map(method_class, method_names()):
    if "__dataclass_fields__" not in vars(_method):
        raise ImportError(f"the method {_method.__name__} in {_method.__module__} lacks the decorator @dataclass")

PUBLIC: dict[str, type] = {
    cls.__name__: cls for cls in map(method_class, method_names()) if cls.__module__.startswith(f"{__name__}.")
}
PUBLIC["ExactConfig"] = ExactConfig
globals().update(PUBLIC)

__all__ = [  # noqa: PLE0604
    "Encoded",
    "EncodingTask",
    "MethodConfig",
    "Setting",
    "Spectrum",
    "method_class",
    "method_for",
    "method_names",
    "setting",
    "settings_of",
    *PUBLIC,
]

# More bits and groups than Delta-CoMe's defaults, because an embedding's error does not average out over inputs.
_VOCABULARY = DeltaComeConfig(bits=(8, 4, 3, 2), groups=(1, 8, 32))


def method_for(method: MethodConfig, vocabulary: bool) -> MethodConfig:
    """Return the method that encodes a matrix: the user's, or Delta-CoMe for embeddings and output projection.

    Args:
        method: the user's method.
        vocabulary: whether the matrix has a row for every token.
    """
    if not vocabulary or method.embeddings == "method":
        return method
    return _VOCABULARY
