"""What differs between a tensor and the one that it rests on."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..compression.scan import TensorPlan, element_count
from ..methods import Spectrum
from ..modeling.checkpoints import DTYPE_NAMES
from ..repository.parts import IMAGES, layer_of, module_kind


@dataclass(frozen=True)
class TensorDiff:
    """What differs between a tensor of a fine-tune and the base's, once that is rounded to the fine-tune's dtype.

    Attributes:
        name: its name in the base's files.
        shape: shape of the part that both have.
        base_dtype, dtype: the dtypes of the base's and of the fine-tune's.
        vocabulary: whether it has a row for every token.
        changed: number of entries of that part whose bits differ.
        changed_rows: number of rows with such an entry; None of tensors with fewer than two axes.
        nonfinite: number of changed entries that are NaN or infinite in one of the two; they count for no norm.
        added_rows: number of rows beyond the base's.
        norm, base_norm: Frobenius norms of the difference and of the base's part.
        largest: the largest change.
        bits: estimated bits per entry of that part if the difference is stored exactly.
        stable_rank: squared norm over the square of the largest singular value, a mean over matrices that changed; None
            of what is no floating-point matrix, or if singular values were left out.
        leading: by number of leading components, their share of the squared norm; empty where `stable_rank` is None.
        spectra: of every matrix that changed, in a stack too.
    """

    name: str
    shape: tuple[int, ...]
    base_dtype: torch.dtype
    dtype: torch.dtype
    vocabulary: bool
    changed: int
    changed_rows: int | None
    nonfinite: int
    added_rows: int
    norm: float
    base_norm: float
    largest: float
    bits: float
    stable_rank: float | None = None
    leading: dict[int, float] = field(default_factory=dict)
    spectra: tuple[Spectrum, ...] = field(default=(), repr=False)

    @property
    def kind(self) -> str:
        """The kind of module that it belongs to."""
        return module_kind(self.name, len(self.shape))

    @property
    def layer(self) -> int | None:
        """The number of its layer; None if it is in none, or in an image encoder's."""
        return None if self.kind == IMAGES else layer_of(self.name)

    @property
    def entries(self) -> int:
        return element_count(self.shape)

    @property
    def is_equal(self) -> bool:
        """Whether all values are the base's; the dtype may be another."""
        return not self.changed and not self.added_rows

    @property
    def relative_norm(self) -> float | None:
        """The norm of the difference over the base's; None if that is 0 and the difference is not."""
        return self.norm / self.base_norm if self.base_norm else None if self.norm else 0.0

    @property
    def dense_bytes(self) -> int:
        """Bytes of the fine-tune's tensor, added rows included."""
        return self.entries * self.dtype.itemsize + self.added_bytes

    @property
    def added_bytes(self) -> int:
        return self.added_rows * element_count(self.shape[1:]) * self.dtype.itemsize

    @property
    def exact_bytes(self) -> int:
        """Estimated bytes of an exact store; added rows are stored as they are."""
        return math.ceil(self.bits * self.entries / 8) + self.added_bytes

    def plan(self) -> TensorPlan:
        """Return how a compression that encodes matrices treats it, without its budget and checksums."""
        kind = "encoded" if self.spectra else "kept" if self.changed else "equal"
        return TensorPlan(self.name, kind, self.shape, self.dtype, self.vocabulary, self.added_rows)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the singular values, in types that JSON can hold."""
        return {
            "name": self.name,
            "kind": self.kind,
            "layer": self.layer,
            "shape": list(self.shape),
            "base_dtype": dtype_name(self.base_dtype),
            "dtype": dtype_name(self.dtype),
            "entries": self.entries,
            "changed": self.changed,
            "changed_share": self.changed / self.entries if self.entries else 0.0,
            "changed_rows": self.changed_rows,
            "nonfinite": self.nonfinite,
            "added_rows": self.added_rows,
            "norm": self.norm,
            "relative_norm": self.relative_norm,
            "largest": self.largest,
            "bits": self.bits,
            "exact_bytes": self.exact_bytes,
            "dense_bytes": self.dense_bytes,
            "stable_rank": self.stable_rank,
            "leading": {str(count): share for count, share in self.leading.items()},
        }


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name in safetensors, or torch's where deltas do not know it."""
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))
