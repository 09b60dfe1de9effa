"""Peak memory of this process, as counted by the operating system."""

import ctypes
import threading
from pathlib import Path

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Return the bytes of this process's memory without mapped files (RssAnon).

    Weights that are mapped from files are page cache, which the system can drop.

    Raises:
        OSError: on systems other than Linux, which do not report it.
    """
    for line in _STATUS.read_text().splitlines() if _STATUS.exists() else ():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: peak memory can be measured on Linux only")


def return_freed_memory() -> None:
    """Return freed memory to the system, if the C library can: its reuse would not show as growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


class PeakMemory:
    """Context manager that samples this process's anonymous memory every few milliseconds.

    Attributes:
        bytes: the largest growth within the context.
        grown: the growth at the end of the context.

    Raises:
        OSError: on entering, as `anonymous_bytes` does.
    """

    def __init__(self, interval: float = 0.003):
        self.bytes, self._interval, self._done = 0, interval, threading.Event()

    def __enter__(self) -> "PeakMemory":
        self._start = anonymous_bytes()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self.bytes = max(self.bytes, anonymous_bytes() - self._start)

    def __exit__(self, *_: object) -> None:
        self.grown = anonymous_bytes() - self._start
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, self.grown)
