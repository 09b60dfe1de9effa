"""Bytes of tensors that are alive, counted operation by operation: the same on every machine, for fake tensors too."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context manager that counts the bytes of the tensors that are made within it, in this thread.

    What an operation needs inside itself is not seen, nor what the allocator keeps.

    Attributes:
        now: bytes that are alive.
        peak: the largest value of `now` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        size, key = storage.nbytes(), storage._cdata
        self._known.add(key)
        weakref.finalize(storage, self._remove, key, size).atexit = False
        self.now += size
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
