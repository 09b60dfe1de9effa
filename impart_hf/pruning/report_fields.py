"""Checked reading of an importance report's fields and files, any of which may be damaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..modeling.model_files import read_json


class DamagedError(ValueError):
    """Damage in a report's files; the message says what is wrong."""


def read_report(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except OSError as error:
        raise DamagedError(str(error)) from error


def checked_whole(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
        raise DamagedError(f"{name} is {value!r:.40}, not a whole number above 0")
    return value


def checked_flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if not isinstance(value, bool):
        raise DamagedError(f"{name} is {value!r:.40}, not true or false")
    return value


def checked_number(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value < math.inf:
            return float(value)
    except OverflowError:
        pass
    raise DamagedError(f"{name} is {value!r:.40}, not a finite number from 0")


def checked_text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise DamagedError(f"{name} is {value!r:.40}, not a text")
    return value


def checked_names(fields: Mapping[str, Any], name: str, known: Set[str]) -> tuple[str, ...]:
    values = fields.get(name)
    if not isinstance(values, list) or not all(isinstance(value, str) and value in known for value in values):
        raise DamagedError(f"{name} is {values!r:.40}, not a list of {', '.join(sorted(known))}")
    return tuple(values)


def open_vectors(path: Path, dtype: str, sizes: Mapping[str, int]) -> Any:
    """Open a safetensors file that must hold vectors of these sizes and nothing else; no data are read yet."""
    try:
        file = safe_open(str(path), framework="np")
        found = {name: file.get_slice(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path.name} cannot be read: {error}") from error
    if found.keys() != sizes.keys():
        raise DamagedError(f"{path.name} does not hold the expected entries")
    for name, entry in found.items():
        if entry.get_dtype() != dtype or entry.get_shape() != [sizes[name]]:
            raise DamagedError(
                f"{path.name}: {name} is {entry.get_dtype()} {entry.get_shape()}, not {dtype} [{sizes[name]}]"
            )
    return file
