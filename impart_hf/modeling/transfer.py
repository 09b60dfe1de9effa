"""Copies from the CPU's memory to an accelerator: through pinned memory, and one ahead of the work on the device.

CUDA copies ordinary memory through a small pinned buffer of its own and lets the caller wait. Through pinned memory of
ours, the caller goes on as soon as the bytes are in a buffer. Dtypes are converted on the device: fewer bytes go over.
On a CPU, and on accelerators other than CUDA's, `to_device` does what `to(device)` does.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any

import torch

CHUNK_BYTES = 16 << 20  # of each of a thread's two pinned buffers
# Smaller tensors cost less time to copy than to stage.
_LEAST_BYTES = 64 << 10

_of_thread = threading.local()


class Staging:
    """Two pinned buffers through which one thread's tensors go to a device: one is filled while the other is sent."""

    def __init__(self, device: torch.device, chunk_bytes: int = CHUNK_BYTES):
        """Allocate the buffers.

        Args:
            device: with its index.
            chunk_bytes: size of a buffer.
        """
        self.device, self.chunk_bytes = device, chunk_bytes
        self._chunks = [self.new_chunk() for _ in range(2)]
        self._sent: list[Any] = [None, None]  # what to wait for before a buffer is filled again
        self._turn = 0

    def new_chunk(self) -> torch.Tensor:
        """Return a pinned buffer."""
        return torch.empty(self.chunk_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def sent(self) -> Any:
        """Return an event that occurs when the copies that this thread has asked for are done."""
        return torch.cuda.current_stream(self.device).record_event()

    def fits(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor can go through the buffers, a number of its last axes' rows at a time."""
        return tensor.dim() > 0 and 0 < tensor.shape[-1] * tensor.itemsize <= self.chunk_bytes

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy on the device of a tensor on the CPU that fits; it is ready for the thread's current stream."""
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        rows = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
        out = target.view(rows.shape)
        step = self.chunk_bytes // (rows.shape[1] * rows.itemsize)
        for part, place in zip(rows.split(step), out.split(step), strict=True):
            if (sent := self._sent[self._turn]) is not None:
                sent.synchronize()
            staged = self._chunks[self._turn][: part.numel() * part.itemsize].view(part.dtype).view(part.shape)
            staged.copy_(part)
            place.copy_(staged, non_blocking=True)
            self._sent[self._turn] = self.sent()
            self._turn = 1 - self._turn
        return target


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a tensor on a device, as `tensor.to(device)`; from the CPU to a CUDA device it goes by pinned memory."""
    device = torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu" or tensor.numel() * tensor.itemsize < _LEAST_BYTES:
        return tensor.to(device)
    device = with_index(device)
    stagings = _of_thread.__dict__.setdefault("stagings", {})
    if device not in stagings:
        stagings[device] = Staging(device)
    staging: Staging = stagings[device]
    return staging.copy(tensor) if staging.fits(tensor) else tensor.to(device)


def with_index(device: torch.device | str) -> torch.device:
    """Return a device with its index, which without one is that of the calling thread's current device."""
    return torch.empty(0, device=device).device


def ahead(
    names: Sequence[str],
    load: Callable[[str, torch.device], torch.Tensor],
    device: torch.device | str,
    fits: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names with tensors on a device; on an accelerator, each is loaded while the caller works on the one before.

    A tensor that has been yielded is not kept.

    Args:
        names: in the order in which they are yielded.
        load: returns a name's tensor on a device. For accelerators it is called in another thread. What it raises is
            raised at the name's turn.
        device: where the tensors go.
        fits: whether the device has room for a tensor beside the one before; otherwise it is loaded at its turn.
    """
    device = with_index(device)
    if device.type == "cpu":  # the file is mapped: there is nothing to wait for
        for name in names:
            yield name, load(name, device)
        return
    # On a stream of its own, a copy need not wait for what the caller has asked of the device.
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def job(name: str) -> tuple[torch.Tensor, Any]:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            return load(name, device), None if stream is None else stream.record_event()

    waiting: deque[Future[tuple[torch.Tensor, Any]]] = deque()
    with ThreadPoolExecutor(1) as thread:
        for number, name in enumerate(names, 1):
            if not waiting:
                waiting.append(thread.submit(job, name))
            wait(waiting)
            if number < len(names) and fits(names[number]):
                waiting.append(thread.submit(job, names[number]))
            yield name, _taken(waiting.popleft())


def _taken(loaded: Future[tuple[torch.Tensor, Any]]) -> torch.Tensor:
    """Return a tensor that another stream has copied, ready for this thread's current stream."""
    tensor, copied = loaded.result()
    if copied is not None:
        current = torch.cuda.current_stream(tensor.device)
        current.wait_event(copied)
        tensor.record_stream(current)  # its memory was allocated for the other stream
    return tensor


__all__ = ["CHUNK_BYTES", "Staging", "ahead", "to_device", "with_index"]
