"""Products of float32 matrices in full precision, whatever precision the process has chosen."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0  # how many contexts are open, in all threads
_before: Any = None  # the process's setting, to be restored when the last one is closed


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute matrix products of float32 in float32, in this context or in a function that this decorates.

    TF32 (which, for instance, TrainingArguments sets for the whole process) has errors of 2e-4: too many for
    singular values below 1 % of the largest, for Hessians, and for a delta (docs/FORMAT.md, "Rounding"). The setting is
    one for all threads, so products that other threads compute meanwhile are in full precision too.
    """
    global _inside, _before
    with _lock:
        if not _inside:
            _before = _setting()
            _set(_full())
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _set(_before)


def _backends() -> list[Any]:
    """Return the objects with torch's settings; none before torch 2.9, which has one setting for all."""
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return backends if all(hasattr(backend, "fp32_precision") for backend in backends) else []


def _full() -> Any:
    return ["ieee" for _ in _backends()] or "highest"


def _setting() -> Any:
    return [backend.fp32_precision for backend in _backends()] or torch.get_float32_matmul_precision()


def _set(setting: Any) -> None:
    if isinstance(setting, str):
        torch.set_float32_matmul_precision(setting)
        return
    for backend, precision in zip(_backends(), setting, strict=True):
        backend.fp32_precision = precision


__all__ = ["full_float32"]
