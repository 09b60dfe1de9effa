"""Compression methods: one file each, found by name."""

from .base import Encoded, MethodConfig, method_class, method_fields, method_names
from .dare import DareConfig
from .impart import ImPartConfig
from .lowrank import LowRankConfig, method_for

__all__ = [
    "DareConfig",
    "Encoded",
    "ImPartConfig",
    "LowRankConfig",
    "MethodConfig",
    "method_class",
    "method_fields",
    "method_for",
    "method_names",
]
