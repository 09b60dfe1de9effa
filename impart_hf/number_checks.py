"""Checks of settings that are numbers."""

import math


def check_whole(least: int, **values: object) -> None:
    """See that settings are whole numbers from `least` on.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number from {least} on, got {value!r}")


def check_positive(**values: object) -> None:
    """See that settings are finite numbers above 0.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a number above 0, got {value!r}")


def check_seed(seed: object) -> None:
    """See that every library can be seeded with a number.

    Raises:
        ValueError: if not.
    """
    check_whole(0, seed=seed)
    if isinstance(seed, int) and seed >= 1 << 32:
        raise ValueError(f"seed must be below 2**32, got {seed}")
