"""Copies to a device: through two buffers, and one ahead."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from impart_hf.modeling import delta_repository, transfer
from impart_hf.modeling.model_files import HubOptions
from impart_hf.modeling.transfer import Staging, ahead, to_device, with_index
from impart_hf.repository.open import open_repository

CPU = torch.device("cpu")
ON_GPU = torch.cuda.is_available()


class Sent:
    """An event that is awaited; until then, the copy that it follows may not have been made."""

    def __init__(self, log: list[Any], buffer: int):
        self.log, self.buffer = log, buffer

    def synchronize(self) -> None:
        self.log.append(("wait", self.buffer))


class OnCpu(Staging):
    """The buffers with ordinary memory, and with events that write down when they are awaited."""

    def __init__(self, chunk_bytes: int):
        self.log: list[Any] = []
        super().__init__(CPU, chunk_bytes)

    def new_chunk(self) -> torch.Tensor:
        return torch.zeros(self.chunk_bytes, dtype=torch.uint8)

    def sent(self) -> Sent:
        self.log.append(("send", self._turn))
        return Sent(self.log, self._turn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(1,), (5, 7), (64, 8), (3, 6, 4), (0, 8), (17, 16)], ids=str)
def test_the_copy_is_the_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    staging = OnCpu(128)
    assert staging.fits(tensor)
    copies = [staging.copy(tensor), staging.copy(tensor)]
    for made in copies:
        assert made.dtype == dtype and torch.equal(made, tensor) and made.is_contiguous()


def test_a_part_of_a_matrix() -> None:
    """As a tensor-parallel plan takes it: its rows do not follow each other in memory."""
    matrix = torch.arange(24 * 48.0).view(24, 48)
    for part in (matrix[:, 8:24], matrix[3:9, 40:], matrix.t(), matrix[::2]):
        assert torch.equal(OnCpu(256).copy(part), part)


def test_a_buffer_is_filled_again_only_after_it_was_sent() -> None:
    staging = OnCpu(64)
    staging.copy(torch.arange(5 * 16).view(5, 16).to(torch.int32))
    sends = [("send", 0), ("send", 1)]
    assert staging.log == [*sends, ("wait", 0), ("send", 0), ("wait", 1), ("send", 1), ("wait", 0), ("send", 0)]
    staging.log.clear()
    staging.copy(torch.zeros(1, 16, dtype=torch.int32))
    assert staging.log == [("wait", 1), ("send", 1)], "the next tensor goes on with the other buffer"


def test_what_does_not_fit() -> None:
    staging = OnCpu(64)
    for tensor in (torch.tensor(1.0), torch.zeros(4, 17), torch.zeros(4, 0)):
        assert not staging.fits(tensor)


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.zeros(1 << 15)
    assert to_device(tensor, "cpu") is tensor
    assert to_device(tensor, "meta").device.type == "meta"
    thread = threading.get_ident()
    for name, found in ahead(["a", "b"], lambda name, device: tensor, "cpu"):
        assert found is tensor and threading.get_ident() == thread and name in "ab"


class Loads:
    """What is loaded, in order, with the thread that did it."""

    def __init__(self, wrong: str = ""):
        self.names: list[str] = []
        self.threads: set[int] = set()
        self.wrong, self.loaded = wrong, threading.Condition()

    def __call__(self, name: str, device: torch.device) -> torch.Tensor:
        if name == self.wrong:
            raise ValueError(name)
        self.threads.add(threading.get_ident())
        with self.loaded:
            self.names.append(name)
            self.loaded.notify_all()
        return torch.empty(2, device=device)

    def wait_for(self, name: str) -> bool:
        with self.loaded:
            return self.loaded.wait_for(lambda: name in self.names, timeout=60)


def test_the_next_one_is_loaded_meanwhile() -> None:
    """The meta device stands for an accelerator."""
    loads, names, seen = Loads(), ["b", "a", "d", "c"], []
    for number, (name, tensor) in enumerate(ahead(names, loads, "meta"), 1):
        assert tensor.device.type == "meta"
        seen.append(name)
        assert number == len(names) or loads.wait_for(names[number]), "it does not wait to be asked for"
        assert loads.names == names[: number + 1], "one ahead, and no more"
    assert seen == names and threading.get_ident() not in loads.threads and len(loads.threads) == 1
    assert list(ahead([], loads, "meta")) == []


def test_what_does_not_fit_beside_another_is_loaded_at_its_turn() -> None:
    loads, names = Loads(), ["a", "large", "b", "c"]
    for number, (name, _) in enumerate(ahead(names, loads, "meta", lambda name: name != "large"), 1):
        if name in ("large", "b"):
            assert loads.wait_for(names[number])
        assert loads.names == (names[:1] if name == "a" else names[: number + 1])
    assert loads.names == names


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_was_taken_is_not_kept(device: str) -> None:
    taken = []
    for _, tensor in ahead(["a", "b", "c"], Loads(), device):
        taken.append(weakref.ref(tensor))
        del tensor
        assert taken[-1]() is None


def test_a_repository_does_not_keep_the_base(tiny_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, bases = open_repository(str(tiny_repository), HubOptions()), []
    original = delta_repository.to_device

    def watched(tensor: torch.Tensor, device: Any) -> torch.Tensor:
        copy = original(tensor, device).clone()
        bases.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(delta_repository, "to_device", watched)
    expected = {name: opened.tensor(name) for name in opened.names()}
    bases.clear()
    for name, tensor in opened.tensors("cpu", list(reversed(opened.names()))):
        assert torch.equal(tensor, expected.pop(name))
        del tensor
        assert all(base() is None for base in bases), name
    assert not expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_error_is_raised_at_its_turn(device: str) -> None:
    taken = []
    with pytest.raises(ValueError, match="^c$"):
        for name, _ in ahead(["a", "b", "c", "d"], Loads("c"), device):
            taken.append(name)
    assert taken == ["a", "b"]


def test_a_caller_that_stops_early() -> None:
    before = threading.active_count()
    loads = Loads()
    tensors = ahead(["a", "b", "c"], loads, "meta")
    next(tensors)
    tensors.close()  # type: ignore[attr-defined]
    assert loads.names == ["a", "b"] and threading.active_count() == before


@pytest.mark.gpu
def test_on_a_device() -> None:
    """Pinned buffers, and the copies of another stream, under work that keeps both streams busy."""
    generator = torch.Generator().manual_seed(0)
    device = with_index("cuda" if ON_GPU else "cpu")
    rows = [1, 1000, 12345, 40000]
    tensors = {str(n): torch.randn(n, 1024, generator=generator).to(torch.bfloat16) for n in rows}
    side = 4096 if ON_GPU else 64
    busy = torch.randn(side, side, device=device)
    for name, found in ahead(list(tensors), lambda name, device: to_device(tensors[name], device), device):
        for _ in range(5):
            busy = torch.nn.functional.normalize(busy @ busy)
        assert found.device == device and torch.equal(found.float().cpu(), tensors[name].float())
        part = tensors[name][:, 100:700]
        assert torch.equal(to_device(part, device).cpu(), part)
    if ON_GPU:
        chunk = Staging(device).new_chunk()
        assert chunk.is_pinned() and chunk.numel() == transfer.CHUNK_BYTES
