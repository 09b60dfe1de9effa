"""The processes of a job that `accelerate launch` or torchrun started, which share out work on one file system."""

import os
import platform
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from typing import Any, TypeVar

from .version import __version__

T = TypeVar("T")

# Timeout of processes that wait for another one, which may be decomposing a large model's last matrices.
_TIMEOUT = timedelta(days=7)


class ProcessError(Exception):
    """Work that failed in another process of the job, which the message names."""


_is_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Within this context, this process works as if it were the only one of the job."""
    global _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = False


def number() -> int:
    """Return this process's number, from 0; 0 without a job."""
    return 0 if _is_alone else int(os.environ.get("RANK", "0"))


def count() -> int:
    """Return the number of processes; 1 without a job."""
    return 1 if _is_alone else int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this is the process that reports, writes and publishes."""
    return number() == 0


def is_distributed() -> bool:
    """Return whether there is more than one process."""
    return count() > 1


def connect(on_cpu: bool) -> None:
    """Set up communication with the other processes, if there are any, and assign each process its GPU.

    Raises:
        ValueError: in the first process, if the processes run different versions; in the others, `ProcessError`.
    """
    if not is_distributed():
        return
    from accelerate import PartialState

    PartialState(cpu=on_cpu, timeout=_TIMEOUT)
    everywhere = together(_versions)
    in_first(lambda: check_versions(everywhere))


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"host": socket.gethostname(), "impart-hf": __version__, "Python": platform.python_version()} | packages


def check_versions(everywhere: list[dict[str, str]]) -> None:
    """Check that all processes run the same versions, because other versions may round differently.

    Args:
        everywhere: for each process, its host and its versions.

    Raises:
        ValueError: if a version differs.
    """
    for name in everywhere[0]:
        found = [versions[name] for versions in everywhere]
        if name != "host" and len(set(found)) > 1:
            other = next(n for n, value in enumerate(found) if value != found[0])
            raise ValueError(
                f"process 0 on {everywhere[0]['host']} runs {name} {found[0]}, process {other} on "
                f"{everywhere[other]['host']} runs {found[other]}: install the same versions everywhere"
            )


def each(work: Callable[[], T]) -> T:
    """Do work in every process, wait for all, and return this process's result.

    If it fails, the first process in which it does raises its error, and the others a `ProcessError` that names that
    one.

    Args:
        work: must not communicate itself.
    """
    return _done(work, lambda result: None)[0]


def together(work: Callable[[], T]) -> list[T]:
    """Do work as `each` does, and return all results, which must be picklable, in the order of the processes."""
    return _done(work, lambda result: result)[1]


def _done(work: Callable[[], T], sent: Callable[[T | None], T | None]) -> tuple[T, list[T]]:
    """Return this process's result, and what each process sends of its own."""
    failed: Exception | None = None
    result: Any = None
    if not is_distributed():
        result = work()
        return result, [result]
    from accelerate.utils import gather_object

    try:
        result = work()
    except Exception as error:
        failed = error
    own = sent(result), None if failed is None else f"{socket.gethostname()}: {failed}"
    try:
        outcomes = gather_object([own])
    except RuntimeError as error:  # the connection to a process that was killed is closed
        raise ProcessError("another process has ended: its launcher reports which") from error
    for other, (_, failure) in enumerate(outcomes):
        if failure is not None:
            if failed is not None and other == number():
                raise failed
            raise ProcessError(f"process {other} of {count()} failed on {failure}") from failed
    return result, [value for value, _ in outcomes]


def in_first(work: Callable[[], T]) -> T:
    """Do work in the first process alone, and return its result in every process; errors as for `together`."""
    return together(lambda: work() if is_first() else None)[0]  # type: ignore[return-value]


def share(items: Iterable[T], cost: Callable[[T], float]) -> list[T]:
    """Return this process's share of items: the most costly first, dealt out to the processes in turn."""
    return sorted(items, key=cost, reverse=True)[number() :: count()] if is_distributed() else list(items)


def from_first(value: T) -> T:
    """Return, in every process, the value that the first one passes."""
    return in_first(lambda: value)
