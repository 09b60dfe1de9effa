"""A job in several processes, as `accelerate launch` and torchrun start them."""

import os
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

# How long the others wait for what the first does alone, such as decomposing a large model's matrices
_PATIENCE = timedelta(days=7)


def is_first() -> bool:
    """Whether this process reports, writes and publishes."""
    return os.environ.get("RANK", "0") == "0"


def several() -> bool:
    """Whether there are other processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def connect(on_cpu: bool) -> None:
    """Meet the other processes, if there are any."""
    if several():
        from accelerate import PartialState

        PartialState(cpu=on_cpu, timeout=_PATIENCE)


def from_first(value: T | None = None) -> T:
    """What the first process hands to this call, in every process; waits for it."""
    from accelerate.utils import broadcast_object_list

    shared = [value]
    broadcast_object_list(shared)
    found = shared[0]
    assert found is not None
    return found
