"""A pretended accelerator: finds, without a GPU, what would fail or be slow on one.

`register` makes the device type `pretended` known to torch, with two devices. Its tensors keep real values on the CPU, so
that everything computes as it does there, but they follow CUDA's rules: an operation whose tensors are on several
devices is refused (`MixedDevices`), but for copies, CPU tensors without axes in pointwise operations, and indices on
the CPU. NumPy cannot read them. What a thread asks of the devices is counted (`Counts`).

Autograd works on the first device only. It cannot see what a device computes differently (TF32, kernels that do not exist), how long it takes, or how much
memory it has. torch keeps a registered backend until its process ends, so use it in a process of its own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # torch's only way in Python

NAME, DEVICES = "pretended", 2

_here = threading.local()
_aten = torch.ops.aten
# A device cannot go on before the host knows their result, or the host before the device knows it.
_WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "unique_dim", "_unique2",
    "unique_consecutive", "repeat_interleave", "_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_qr",
}  # fmt: skip
_COPIES = {"copy_", "_to_copy"}
_INDEXED = {"index", "index_put_", "index_put", "_index_put_impl_"}
# These take a CPU tensor without axes for a number, as pointwise operations do.
_TAKE_NUMBERS = {"fill", "fill_", "masked_fill", "masked_fill_", *_INDEXED}
_FACTORIES = (
    "empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m",
    "full", "zeros", "ones", "rand", "rand.generator", "randn", "randn.generator", "randint", "randint.generator",
    "randint.low", "randint.low_generator", "randperm", "randperm.generator", "scalar_tensor", "tril_indices",
    "triu_indices",
)  # fmt: skip


class MixedDevices(RuntimeError):
    """An operation has tensors on several devices, as CUDA would refuse it."""


@dataclass
class Counts:
    """What a thread has asked of the devices.

    Attributes:
        launches: by device index, operations of ATen that compute or copy there, one each, however many kernels a real
            device runs for it (an eigendecomposition: many). Views and empty tensors cost none.
        waits: how often the host waited for a device: for a number, for the size of a result, for an error code, or
            for a blocking copy in either direction.
        to_device, to_host: bytes copied.
    """

    launches: list[int] = field(default_factory=lambda: [0] * DEVICES)
    waits: int = 0
    to_device: int = 0
    to_host: int = 0


@contextmanager
def counted() -> Iterator[Counts]:
    """Count what this thread asks of the devices in this context."""
    outer, _here.counts = _counts(), Counts()
    try:
        yield _here.counts
    finally:
        _here.counts = outer


def _counts() -> Counts:
    if not hasattr(_here, "counts"):
        _here.counts = Counts()
    return _here.counts


class PretendedTensor(torch.Tensor):
    """A tensor of the pretended device; `on_cpu` has its values."""

    on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor, device: torch.device) -> PretendedTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, on_cpu.size(), strides=on_cpu.stride(), storage_offset=on_cpu.storage_offset(), dtype=on_cpu.dtype,
            device=device,
        )  # fmt: skip
        made.on_cpu = on_cpu
        return made

    def __repr__(self) -> str:  # type: ignore[override]  # torch adds a parameter of its own
        return f"PretendedTensor({self.device}, {self.on_cpu})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert a tensor on {self.device} to numpy: copy it to the CPU first")

    def untyped_storage(self) -> Any:  # safetensors compares addresses
        return self.on_cpu.untyped_storage()

    def storage(self) -> Any:
        return self.on_cpu.storage()

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch names the first parameter otherwise
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _is_composed(operation):  # in inference mode and in other tensors' dispatch
            return operation.decompose(*args, **kwargs)
        name = operation._schema.name.removeprefix("aten::")
        leaves = tree_flatten((args, kwargs))[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if name in _COPIES:
            return _copy(operation, args, kwargs)
        device = _only_device(operation, name, tensors)
        _check_generators(leaves, device)
        if (asked := kwargs.get("device")) is not None:  # `zeros_like` and its kind
            device = _with_index(torch.device(asked))
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        _count(operation, name, args, tensors, device)
        real_args, real_kwargs = tree_map_only(cls, lambda tensor: tensor.on_cpu, (args, kwargs))
        out = operation(*real_args, **real_kwargs)
        written = {id(tensor.on_cpu): tensor for tensor in tensors if isinstance(tensor, cls)}
        for tensor in written.values():
            if tensor.on_cpu.shape != tensor.shape:
                raise NotImplementedError(f"{operation} changes the shape of its argument")

        def wrapped(result: torch.Tensor) -> torch.Tensor:
            if id(result) in written:
                return written[id(result)]
            return result if device.type != NAME else cls(result, device)

        return tree_map_only(torch.Tensor, wrapped, out)


@functools.cache
def _is_composed(operation: Any) -> bool:
    """Return whether an operation is made of others, and neither computes nor is counted itself."""
    return operation.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def _only_device(operation: Any, name: str, tensors: list[torch.Tensor]) -> torch.device:
    """Return the device on which an operation's tensors are, by CUDA's rules."""
    numbers = torch.Tag.pointwise in operation.tags or name in _TAKE_NUMBERS
    places = {
        tensor.device
        for at, tensor in enumerate(tensors)
        if not (tensor.device.type == "cpu" and ((numbers and tensor.dim() == 0) or (name in _INDEXED and at)))
    }
    if name in _INDEXED and not all(tensor.device.type != "cpu" for tensor in tensors[-1:] if name != "index"):
        places |= {tensor.device for tensor in tensors[-1:] if tensor.dim()}  # the values are no index
    if len(places) != 1:
        found = ", ".join(sorted(map(str, places)))
        raise MixedDevices(f"{operation}: expected all tensors to be on one device, found {found}")
    return places.pop()


def _check_generators(leaves: list[Any], device: torch.device) -> None:
    for leaf in leaves:
        if isinstance(leaf, torch.Generator) and leaf.device.type != device.type:
            raise MixedDevices(f"a generator is on {leaf.device}, the tensor on {device}")


def _count(operation: Any, name: str, args: Any, tensors: list[torch.Tensor], device: torch.device) -> None:
    counts = _counts()
    returns = operation._schema.returns
    is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in returns)
    if device.type == NAME and not is_view and not name.startswith(("empty", "new_empty")) and name != "detach":
        counts.launches[device.index] += 1
    masks = name in _INDEXED and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
    sized = name == "repeat_interleave" and len(args) > 1 and args[1] is not None
    from_host = [t for t in tensors if t.device.type == "cpu" and t.dim() and name in _INDEXED]
    if (name in _WAITS and not sized) or masks or from_host:
        counts.waits += 1
    counts.to_device += sum(tensor.nbytes for tensor in from_host)
    counts.to_host += tensors[0].nbytes if name == "_local_scalar_dense" else 0


def _copy(operation: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Copy between devices, or on one."""
    if operation._schema.name == "aten::_to_copy":
        source = args[0]
        asked = kwargs.pop("device", None)
        device = _with_index(torch.device(asked)) if asked is not None else source.device
        kwargs.pop("pin_memory", None)
        blocking = not kwargs.pop("non_blocking", False)
        if device.type == "meta":
            return torch.empty_like(source.on_cpu, device="meta", dtype=kwargs.get("dtype"))
        _count_copy(source, device, blocking)
        made = operation(_real(source), **kwargs)
        return made if device.type == "cpu" else PretendedTensor(made, device)
    target, source = args[:2]
    _count_copy(source, target.device, not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))
    _real(target).copy_(_real(source))
    return target


def _count_copy(source: torch.Tensor, device: torch.device, blocking: bool) -> None:
    counts = _counts()
    for place in {source.device, device}:
        if place.type == NAME:
            counts.launches[place.index] += 1
    if "cpu" in (source.device.type, device.type):
        counts.waits += blocking
        if device.type == "cpu":
            counts.to_host += source.nbytes
        else:
            counts.to_device += source.nbytes


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.on_cpu if isinstance(tensor, PretendedTensor) else tensor


def _with_index(device: torch.device) -> torch.device:
    """Return a device with an index: where there is none, the thread's current device."""
    if device.type != NAME:
        return device
    index = torch.get_device_module(NAME).current_device() if device.index is None else device.index
    if not 0 <= index < DEVICES:
        raise RuntimeError(f"there are {DEVICES} pretended devices, not one with index {index}")
    return torch.device(NAME, index)


class _Backend:
    """What torch, accelerate and transformers ask of a device module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return DEVICES

    def current_device(self) -> int:
        return getattr(_here, "device", 0)

    def set_device(self, device: Any) -> None:
        _here.device = device if isinstance(device, int) else torch.device(device).index or 0

    def synchronize(self, device: Any = None) -> None:
        _counts().waits += 1

    def empty_cache(self) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def register() -> None:
    """Make the device known to this process's torch; once."""
    _setup_privateuseone_for_python_backend(NAME, _Backend())
    library = torch.library.Library("aten", "IMPL", "PrivateUse1")
    for name in _FACTORIES:
        packet, _, overload = name.partition(".")
        library.impl(name, _factory(getattr(getattr(_aten, packet), overload or "default"), packet))
    # `torch.tensor(…, device=…)` keeps the copy that it makes from PretendedTensor.
    library.impl("copy_", lambda *args: _copy(_aten.copy_.default, args, {}))
    _libraries.append(library)


_libraries: list[Any] = []  # torch forgets what a library registered when the library is collected


def _factory(operation: Any, name: str) -> Any:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = _with_index(torch.device(kwargs["device"]))
        _check_generators([*args, *kwargs.values()], device)
        kwargs |= {"device": torch.device("cpu"), "pin_memory": False}
        if not name.startswith("empty"):
            _counts().launches[device.index] += 1
        return PretendedTensor(operation(*args, **kwargs), device)

    return make
