"""Communication between the processes of a job started by `accelerate launch` or torchrun."""

import os
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

# Timeout of the other processes while the first works alone, for instance decomposes a large model's matrices.
_TIMEOUT = timedelta(days=7)


def is_first() -> bool:
    """Return whether this is the process that reports, writes and publishes."""
    return os.environ.get("RANK", "0") == "0"


def is_distributed() -> bool:
    """Return whether there is more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def connect(on_cpu: bool) -> None:
    """Set up communication with the other processes, if there are any, and assign each process its GPU."""
    if is_distributed():
        from accelerate import PartialState

        PartialState(cpu=on_cpu, timeout=_TIMEOUT)


def broadcast_from_first(value: T | None = None) -> T:
    """Return, in every process, the value that the first process passes to this call; waits for it."""
    from accelerate.utils import broadcast_object_list

    shared = [value]
    broadcast_object_list(shared)
    received = shared[0]
    assert received is not None
    return received
