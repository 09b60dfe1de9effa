"""Differences summed over tensors: of a layer, of a kind of module, of all."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .tensor_diff import TensorDiff, dtype_name


@dataclass(frozen=True)
class Group:
    """The sum of some tensors' differences.

    Attributes:
        label: the kind of module, the layer's number, or "total".
        tensors, changed_tensors: how many there are, and how many of them are not equal.
        entries, changed: entries of the parts that both models have, and how many of them changed.
        nonfinite: how many that are NaN or infinite in one of the two changed.
        added_rows: rows beyond the base's.
        relative_norm: of tensors that changed, the norm of the difference over the base's: the mean, by entries.
        exact_bytes: estimated bytes of an exact store of the differences.
        dense_bytes: bytes of the fine-tune's tensors.
    """

    label: str
    tensors: int
    changed_tensors: int
    entries: int
    changed: int
    nonfinite: int
    added_rows: int
    relative_norm: float
    exact_bytes: int
    dense_bytes: int

    @classmethod
    def of(cls, label: str, tensors: Sequence[TensorDiff]) -> "Group":
        """Sum up tensors."""
        norms = [(t.relative_norm, t.entries) for t in tensors if t.changed and t.relative_norm is not None]
        weight = sum(entries for _, entries in norms)
        return cls(
            label=label,
            tensors=len(tensors),
            changed_tensors=sum(not t.is_equal for t in tensors),
            entries=sum(t.entries for t in tensors),
            changed=sum(t.changed for t in tensors),
            nonfinite=sum(t.nonfinite for t in tensors),
            added_rows=sum(t.added_rows for t in tensors),
            relative_norm=sum(norm * entries for norm, entries in norms) / weight if weight else 0.0,
            exact_bytes=sum(t.exact_bytes for t in tensors),
            dense_bytes=sum(t.dense_bytes for t in tensors),
        )

    @property
    def share(self) -> float:
        """The share of entries that changed."""
        return self.changed / self.entries if self.entries else 0.0

    @property
    def bits(self) -> float:
        """Bits of the exact store per entry that the fine-tune has."""
        return 8 * self.exact_bytes / self.entries if self.entries else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"changed_share": self.share, "bits": self.bits}


def other_dtypes(tensors: Iterable[TensorDiff]) -> dict[str, int]:
    """Return how many tensors have another dtype than their base's, by "BASE to FINE-TUNE"."""
    changes = [f"{dtype_name(t.base_dtype)} to {dtype_name(t.dtype)}" for t in tensors if t.base_dtype != t.dtype]
    return {change: changes.count(change) for change in dict.fromkeys(changes)}


def by_kind(tensors: Iterable[TensorDiff]) -> list[Group]:
    """Return the sums over kinds of modules, the largest first."""
    groups = _grouped(tensors, lambda tensor: tensor.kind)
    return sorted(groups, key=lambda group: (-group.dense_bytes, group.label))


def by_layer(tensors: Iterable[TensorDiff]) -> list[Group]:
    """Return the sums over layers in their order, and then over what is in none."""
    tensors = sorted(tensors, key=lambda tensor: math.inf if tensor.layer is None else tensor.layer)
    return _grouped(tensors, layer_label)


def layer_label(tensor: TensorDiff) -> str:
    """Return the number of a tensor's layer as it is shown."""
    return "no layer" if tensor.layer is None else str(tensor.layer)


def _grouped(tensors: Iterable[TensorDiff], label: Callable[[TensorDiff], str]) -> list[Group]:
    members: dict[str, list[TensorDiff]] = {}
    for tensor in tensors:
        members.setdefault(label(tensor), []).append(tensor)
    return [Group.of(name, own) for name, own in members.items()]
