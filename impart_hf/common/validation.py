"""Checks of settings: numbers and sizes."""

import math
import re


def check_whole_number(least: int, **values: object) -> None:
    """Check that settings are whole numbers of at least `least`.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_positive(**values: object) -> None:
    """Check that settings are finite numbers above 0.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def check_seed(seed: object) -> None:
    """Check that a number is a seed for every library: a whole number from 0 to 2**32 - 1.

    Raises:
        ValueError: if it is not.
    """
    check_whole_number(0, seed=seed)
    if isinstance(seed, int) and seed >= 1 << 32:
        raise ValueError(f"seed must be below 2**32, got {seed}")


def check_number(name: str, value: object) -> None:
    """Check that a setting is a number.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")


def shard_bytes(max_shard_size: int | str) -> int:
    """Return the option `max_shard_size`, the largest size of a file, in bytes; errors as for `size_bytes`."""
    return size_bytes(max_shard_size, "max_shard_size")


def size_bytes(size: int | str, name: str) -> int:
    """Return a size in bytes.

    Args:
        size: a number, or a string such as "5GB" or "500MB".
        name: the setting's name, for the error.

    Raises:
        ValueError: if it is neither a number of bytes above 0 nor such a string.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(size).strip().upper())
    count = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if count < 1:
        raise ValueError(
            f'{name} must be a number of bytes or a string such as "5GB" (K, M, G or T: thousands), got {size!r}'
        )
    return count


def byte_budget(max_bytes: int | str | None) -> int | None:
    """Return the option `max_bytes`, the byte budget, as a number of bytes, or None; errors as for `size_bytes`."""
    return None if max_bytes is None else size_bytes(max_bytes, "max_bytes")
