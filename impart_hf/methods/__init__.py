"""Compression methods: one file each, found by name."""

from ..coding.svd import Svd
from .base import Encoded, MethodConfig, Spectrum, method_class, method_fields, method_names, parse_setting
from .bitdelta import BitDeltaConfig
from .dare import DareConfig
from .dare_qt import DareQtConfig
from .delta_come import DeltaComeConfig
from .impart import ImPartConfig
from .impart_qt import ImPartQtConfig
from .impart_rd import ImPartRdConfig
from .lowrank import LowRankConfig

__all__ = [
    "BitDeltaConfig",
    "DareConfig",
    "DareQtConfig",
    "DeltaComeConfig",
    "Encoded",
    "ImPartConfig",
    "ImPartQtConfig",
    "ImPartRdConfig",
    "LowRankConfig",
    "MethodConfig",
    "Spectrum",
    "Svd",
    "method_class",
    "method_fields",
    "method_for",
    "method_names",
    "parse_setting",
]


# More bits and more steps than Delta-CoMe's own: an embedding's error is not averaged over many inputs.
_VOCABULARY = DeltaComeConfig(bits=(8, 4, 3, 2), groups=(1, 8, 32))


def method_for(method: MethodConfig, vocabulary: bool) -> MethodConfig:
    """The method that encodes a matrix: the user's, or Delta-CoMe for embeddings and output projection.

    Args:
        vocabulary: whether the matrix has a row for every token.
    """
    if not vocabulary or method.embeddings == "method":
        return method
    return _VOCABULARY
