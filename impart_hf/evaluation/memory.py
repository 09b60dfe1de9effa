"""Peak memory of this process, as the operating system counts it."""

import ctypes
import threading
from pathlib import Path

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Memory of this process that is no mapped file (RssAnon): mapped weights are page cache and can be dropped.

    Raises:
        OSError: on a system that does not say (only Linux does).
    """
    for line in _STATUS.read_text().splitlines() if _STATUS.exists() else ():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: peak memory can be measured on Linux only")


def return_freed_memory() -> None:
    """Hand memory that was freed back to the system, where the C library can: it would be used again unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


class PeakMemory:
    """Context manager: `bytes` is the largest growth of anonymous memory within it, sampled every few milliseconds.

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
        self.grown = anonymous_bytes() - self._start  # what is still held at the end
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, self.grown)
