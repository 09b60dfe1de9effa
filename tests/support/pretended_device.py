"""A pretended accelerator: finds, without a GPU, what would fail or be slow on one.

`register` makes the device type `pretended` known to torch, with two devices. Its tensors keep real values on the CPU,
so that everything computes as it does there, but they follow CUDA's rules: an operation whose tensors are on several
devices is refused (`MixedDevices`), but for copies, CPU tensors without axes in pointwise operations, and indices on
the CPU. NumPy cannot read them. What a thread asks of the devices is counted (`Counts`).

It cannot see what a device computes differently (TF32, kernels that do not exist), how long it takes, or how much
memory it has. Autograd works on the first device only. torch keeps a registered backend until its process ends, so use
it in a process of its own.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # torch's only way in Python

from impart_hf.modeling.packed_tables import KERNELS_VARIABLE

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


@contextmanager
def with_kernels() -> Iterator[None]:
    """In this context Triton's kernels are used on the devices, by its interpreter; each is one launch."""
    from triton.runtime.interpreter import GridExecutor

    interpret = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **options: Any) -> Any:
        places = {arg.device for arg in args if isinstance(arg, torch.Tensor)}
        if len(places) != 1:
            raise MixedDevices(f"a kernel's tensors are on {sorted(map(str, places))}")
        _counts().launches[places.pop().index] += 1
        return interpret(executor, *map(_on_cpu, args), **options)

    with patch.object(GridExecutor, "__call__", launch), patch.dict(os.environ, {KERNELS_VARIABLE: "always"}):
        yield


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

    def __deepcopy__(self, memo: dict[int, Any]) -> PretendedTensor:
        made = self.detach().clone().requires_grad_(self.requires_grad)
        made._is_param = getattr(self, "_is_param", False)  # by which torch knows a parameter of another class
        memo[id(self)] = made
        return made

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
        kind = _kind(operation)
        if kind.composed:  # in inference mode and in the dispatch of other tensors
            return operation.decompose(*args, **kwargs)
        if kind.name in _COPIES:
            return _copy(operation, args, kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        device = _only_device(operation, kind, tensors)
        _check_generators(leaves, device)
        _count(kind, args, tensors, device)
        args, kwargs = structure.unflatten([_on_cpu(leaf) for leaf in leaves])
        if (asked := kwargs.get("device")) is not None:  # `zeros_like` and its kind
            device, kwargs["device"] = _with_index(torch.device(asked)), torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        out = operation(*args, **kwargs)
        written = {id(tensor.on_cpu): tensor for tensor in tensors if isinstance(tensor, cls)}
        for tensor in written.values():
            if tensor.on_cpu.shape != tensor.shape:
                raise NotImplementedError(f"{operation} changes the shape of its argument")

        def wrapped(result: torch.Tensor) -> torch.Tensor:
            if id(result) in written:
                return written[id(result)]
            return result if device.type != NAME else cls(result, device)

        return wrapped(out) if isinstance(out, torch.Tensor) else tree_map_only(torch.Tensor, wrapped, out)


class _Kind(NamedTuple):
    """What is known of an operation: whether it is made of others, gives a view, or takes numbers as CPU tensors."""

    name: str
    composed: bool
    view: bool
    takes_numbers: bool


@functools.cache
def _kind(operation: Any) -> _Kind:
    name = operation._schema.name.removeprefix("aten::")
    aliases = [each.alias_info for each in operation._schema.returns if each.alias_info is not None]
    return _Kind(
        name,
        operation.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd),
        any(not alias.is_write for alias in aliases),
        torch.Tag.pointwise in operation.tags or name in _TAKE_NUMBERS,
    )


def _only_device(operation: Any, kind: _Kind, tensors: list[torch.Tensor]) -> torch.device:
    """Return the device on which an operation's tensors are, by CUDA's rules."""
    if len({tensor.device for tensor in tensors}) == 1:
        return tensors[0].device
    indices = tensors[1:] if kind.name == "index" else tensors[1:-1] if kind.name in _INDEXED else []
    places = set()
    for tensor in tensors:
        is_number = kind.takes_numbers and tensor.dim() == 0
        if tensor.device.type != "cpu" or not (is_number or any(tensor is index for index in indices)):
            places.add(tensor.device)
    if len(places) != 1:
        found = ", ".join(sorted(map(str, places)))
        raise MixedDevices(f"{operation}: expected all tensors to be on one device, found {found}")
    return places.pop()


def _check_generators(leaves: list[Any], device: torch.device) -> None:
    for leaf in leaves:
        if isinstance(leaf, torch.Generator) and leaf.device.type != device.type:
            raise MixedDevices(f"a generator is on {leaf.device}, the tensor on {device}")


def _count(kind: _Kind, args: Any, tensors: list[torch.Tensor], device: torch.device) -> None:
    if device.type != NAME:
        return
    counts, name = _counts(), kind.name
    if not kind.view and not name.startswith(("empty", "new_empty")):
        counts.launches[device.index] += 1
    masks = name in _INDEXED and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
    sized = name == "repeat_interleave" and len(args) > 1 and args[1] is not None
    from_host = [tensor for tensor in tensors if name in _INDEXED and tensor.device.type == "cpu" and tensor.dim()]
    counts.waits += (name in _WAITS and not sized) or masks or bool(from_host)
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
        made = operation(_on_cpu(source), **kwargs)
        return made if device.type == "cpu" else PretendedTensor(made, device)
    target, source = args[:2]
    _count_copy(source, target.device, not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))
    _on_cpu(target).copy_(_on_cpu(source))
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


def _on_cpu(value: Any) -> Any:
    return value.on_cpu if isinstance(value, PretendedTensor) else value


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

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, _here.device = self.current_device(), device.index
        try:
            yield
        finally:
            _here.device = before

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
