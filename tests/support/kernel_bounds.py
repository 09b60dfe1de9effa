"""Triton's interpreter reads and writes raw addresses; here it is watched for any outside of a kernel's arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

from support.packed_records import DEVICE


class _Watch:
    """Stands around the interpreter's ways to load and to store."""

    def __init__(self) -> None:
        self.starts = self.stops = np.empty(0, np.uint64)

    def launched(self, original: Any) -> Any:
        def call(executor: Any, *args: Any, **options: Any) -> Any:
            tensors = [a for a in args if hasattr(a, "data_ptr") and a.numel()]
            bounds = sorted((a.data_ptr(), a.data_ptr() + a.numel() * a.element_size()) for a in tensors)
            self.starts, self.stops = np.array(bounds, np.uint64).reshape(-1, 2).T
            return original(executor, *args, **options)

        return call

    def touched(self, original: Any, mask_at: int) -> Any:
        def call(builder: Any, pointers: Any, *args: Any) -> Any:
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            addresses = np.broadcast_to(pointers.data, np.shape(args[mask_at].data))[args[mask_at].data]
            owner = np.searchsorted(self.starts, addresses, "right") - 1
            inside = (owner >= 0) & (addresses + np.uint64(size) <= self.stops[owner])
            assert inside.all(), "a kernel reads or writes outside of its arguments"
            return original(builder, pointers, *args)

        return call


@contextmanager
def watched_kernels() -> Iterator[None]:
    """While this is open, a kernel that leaves its arguments fails; on a device nothing is watched."""
    if DEVICE.type != "cpu":
        yield
        return
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    watch = _Watch()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    with (
        patch.object(GridExecutor, "__call__", watch.launched(GridExecutor.__call__)),
        patch.object(InterpreterBuilder, "create_masked_load", watch.touched(load, 0)),
        patch.object(InterpreterBuilder, "create_masked_store", watch.touched(store, 1)),
    ):
        yield
