"""Checksums of a model's weights, by which it is known exactly whether they have changed since the model was loaded."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

from .checksums import content_checksum
from .four_bit_weights import codes_and_scales, is_four_bit

# What a weight holds: dtype, shape and checksum; of a tensor that is made of others, their fingerprints instead of the
# checksum; of a weight without data, on the meta device, None.
Fingerprint: TypeAlias = tuple[torch.dtype, tuple[int, ...], Any]
_SCALES = ".absmax"  # suffix of the scales of a 4-bit weight
_ROUNDED_SCALES = torch.bfloat16  # what bitsandbytes makes of them on some CPUs


class WeightFingerprints:
    """What every parameter and buffer of a model may hold without having changed: its values, or casts of them.

    A pickle or a copy of it serves a copy of the model.
    """

    def __init__(self, model: PreTrainedModel):
        """Take the checksums of all weights; they are read once."""
        self._known: dict[str, set[Fingerprint]] = {}
        for name, tensor in _weights(model):
            forms = [tensor, tensor.to(_ROUNDED_SCALES)] if name.endswith(_SCALES) else [tensor]
            prints = [_fingerprint(form) for form in forms]
            self._known[name] = {each for each in prints if each is not None and each[2] is not None}

    def differ(self, model: PreTrainedModel, *, new_count: bool = True) -> bool:
        """Return whether any weight has other values than it had, or cannot be compared; all are read once.

        Args:
            new_count: whether weights that the model did not have, such as an adapter's, count as changed.
        """
        found = set()
        for name, tensor in _weights(model):
            if not new_count and name not in self._known:
                continue
            if not self._holds(name, tensor):
                return True
            found.add(name)
        return found != self._known.keys()

    def watch(self, model: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
        """Return a function that does as `convert` and remembers what an unchanged weight becomes by it.

        Args:
            model: whose weights will be converted, before that.
            convert: moves or casts a tensor.
        """
        names: dict[int, list[str]] = {}
        for listed in (model.named_parameters, model.named_buffers):
            for name, tensor in listed(remove_duplicate=False):
                names.setdefault(id(tensor), []).append(_name_without_adapters(name))

        def converted(tensor: torch.Tensor) -> torch.Tensor:
            made = convert(tensor)
            emptied = made.device.type == "meta" != tensor.device.type
            if emptied or torch.promote_types(made.dtype, tensor.dtype) != made.dtype:
                held = _local(tensor.detach())
                for name in names.get(id(tensor), ()):
                    if self._holds(name, held):
                        # From the tensor, not from the result: `convert` may do anything.
                        form = held.to("meta" if emptied else held.device, made.dtype)
                        if (cast := _fingerprint(form)) is not None:
                            self._known[name].add(cast)
            return made

        return converted

    def _holds(self, name: str, tensor: Any) -> bool:
        """Return whether a tensor has the known values of a weight."""
        known = self._known.get(name, set())
        now = _fingerprint(tensor)
        if now is None:
            return False
        if now in known:
            return True
        if now[2] is None or not tensor.is_floating_point():
            return False
        # An exact cast, which is not watched, can be undone: from bfloat16 to float32, for instance.
        dtypes = {dtype for dtype, shape, _ in known if shape == now[1] and dtype.is_floating_point} - {tensor.dtype}
        return any(
            torch.equal((back := tensor.to(dtype)).to(tensor.dtype), tensor) and _fingerprint(back) in known
            for dtype in dtypes
        )


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Yield the name and content of every parameter and saved buffer, and of what quantised layers keep beside them.

    Tied weights come once under each of their names. A weight that accelerate offloaded is read from where it lies. Of
    a weight that is spread over processes (tensor parallel, FSDP) this process's part comes.
    """
    for module in model.modules():
        # FSDP gathers a module's weights for its forward pass, and this makes them parts again, as for `state_dict`.
        for hook in module._state_dict_pre_hooks.values():
            hook(module, "", False)
    for prefix, module in model.named_modules(remove_duplicate=False):
        prefix = f"{prefix}." if prefix else ""
        entries: dict[str, Any] = {}
        if is_four_bit(module):
            for name, tensor in module.named_parameters(recurse=False):
                entries[name] = tensor
            entries["weight"], entries["weight" + _SCALES] = codes_and_scales(module.weight)
        else:
            # What `state_dict` gathers of each module. It is not called itself, because of 4-bit weights.
            module._save_to_state_dict(entries, "", False)
        for name, tensor in entries.items():
            yield _name_without_adapters(prefix + name), _local(_loaded(model, prefix + name, tensor))


def _local(tensor: Any) -> Any:
    """Return this process's part of a tensor that is spread over processes; other tensors as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _loaded(model: PreTrainedModel, name: str, tensor: Any) -> Any:
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "meta":
        return tensor
    try:
        return load_offloaded_parameter(model, name)
    except (ValueError, AttributeError, KeyError, TypeError):  # it was not offloaded
        return tensor


def _name_without_adapters(name: str) -> str:
    """Return a weight's name as it was before PEFT wrapped its layer."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _fingerprint(tensor: Any) -> Fingerprint | None:
    """Return what a tensor holds, or None if that cannot be read."""
    if not isinstance(tensor, torch.Tensor):
        return None
    if tensor.device.type == "meta":
        return tensor.dtype, tuple(tensor.shape), None
    if hasattr(tensor, "__tensor_flatten__"):  # made of other tensors, for instance quantised by torchao
        parts = tuple(_fingerprint(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return None if None in parts else (tensor.dtype, tuple(tensor.shape), parts)
    try:
        return tensor.dtype, tuple(tensor.shape), content_checksum(tensor)
    except (RuntimeError, TypeError, ValueError):  # a kind of tensor without data of its own
        return None


__all__ = ["WeightFingerprints"]
