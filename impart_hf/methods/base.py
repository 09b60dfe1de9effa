"""What a compression method is: a configuration that can encode one matrix's delta into a given number of bytes.

The command line reads methods and their settings from here at every start: neither this module nor one with a method
imports torch before a matrix is encoded.
"""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..common.validation import check_number
from .settings import EMBEDDINGS, setting

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..coding.svd import Svd

_METHODS: dict[str, type[MethodConfig]] = {}


@dataclass(frozen=True)
class Encoded:
    """A record's bytes, and what the user should be told about how they came to be."""

    data: bytes
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncodingTask:
    """The arguments of `MethodConfig.encode`."""

    delta: torch.Tensor
    max_bytes: int
    mask_seed: int
    hessian: torch.Tensor | None
    svd: Svd
    vocabulary: bool


@dataclass(frozen=True)
class Spectrum:
    """What is known of a matrix (m, n) when bytes are spread over a model.

    Attributes:
        sigma: float64 (r,), the leading singular values of its delta; empty if the fine-tune left it alone.
        rows, columns: m and n.
        energy: the squared Frobenius norm of the delta.
        vocabulary: whether it has a row for every token.
        weight: what its squared errors count for, in those of other matrices of its kind.
    """

    sigma: np.ndarray
    rows: int
    columns: int
    energy: float
    vocabulary: bool = False
    weight: float = 1.0


@dataclass
class MethodConfig(abc.ABC):
    """Settings that every method has.

    Attributes:
        compression_ratio: bytes of the fine-tuned checkpoint over bytes of the delta repository; above 1.
        seed: seed of the masks, 0 to 2**32 - 1. Same inputs and seed, same bytes.
        embeddings: how changed embeddings and output projection are compressed, to the same ratio: "lowrank" by their
            leading singular components at 8 to 2 bits, "method" by the method itself. The papers leave them
            uncompressed; masks on them hit single tokens instead of averaging out, and cost several times the quality
            (docs/results.md).
    """

    name: ClassVar[str]
    quantises: ClassVar[bool] = False  # whether it can use the second moments of a layer's inputs
    uncalibrated: ClassVar[str] = "none: rounded"  # what it does without such, for the records
    factored: ClassVar[bool] = False  # whether it works on the singular components
    shares_budget: ClassVar[bool] = False  # whether one budget is spread over all matrices by their spectra
    random: ClassVar[bool] = True  # whether the seed makes a difference: whether entries are dropped

    compression_ratio: float = setting(32.0, "checkpoint bytes over repository bytes, above 1", option="ratio")
    seed: int = setting(0, "seed of the masks, 0 to 2**32 - 1")
    embeddings: str = setting(
        "lowrank",
        f"how embeddings are compressed, {' or '.join(EMBEDDINGS)}: by their leading components, or as all else",
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            _METHODS[cls.name] = cls

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        check_number("compression_ratio", self.compression_ratio)
        if not 1 < self.compression_ratio < float("inf"):
            raise ValueError(f"compression_ratio must be above 1, got {self.compression_ratio}")
        self.compression_ratio = float(self.compression_ratio)  # so that 32 and 32.0 are written alike
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, got {self.seed!r}")
        if self.embeddings not in EMBEDDINGS:
            raise ValueError(f'embeddings must be "lowrank" or "method", got {self.embeddings!r}')

    def encode(
        self,
        delta: torch.Tensor,
        max_bytes: int,
        mask_seed: int,
        *,
        hessian: torch.Tensor | None = None,
        svd: Svd | None = None,
        vocabulary: bool = False,
    ) -> Encoded:
        """Encode one matrix's delta into a record of at most `max_bytes` bytes.

        Args:
            delta: float32 of shape (m, n), finite and not all zero, on the device where the work is to be done.
            max_bytes: at least `least_bytes(m, n)`.
            mask_seed: the record's 32-bit mask seed.
            hessian: float32 (n, n), the second moments X X^T / tokens of the layer's inputs, or None; methods that
                do not quantise have no use for it.
            svd: gives the delta's leading singular components, as `leading_svd` does, which is used if it is None.
            vocabulary: whether the matrix has a row for every token.
        """
        from ..coding.svd import leading_svd

        return self._encode(EncodingTask(delta, max_bytes, mask_seed, hessian, svd or leading_svd, vocabulary))

    @abc.abstractmethod
    def _encode(self, task: EncodingTask) -> Encoded:
        """What `encode` does, with its arguments."""

    @abc.abstractmethod
    def least_bytes(self, rows: int, columns: int) -> int:
        """The size of the smallest record that makes sense for a matrix of this shape."""

    def rank_for(self, spectrum: np.ndarray, rows: int, columns: int, max_bytes: int) -> int:
        """How many components a factored method stores, estimated from the leading singular values (see `RankRule`)."""
        raise NotImplementedError(f"{self.name} does not work on singular components")

    def allocate(self, spectra: list[Spectrum], max_bytes: int) -> list[int]:
        """The bytes of every matrix's record, together `max_bytes` at most. For methods with `shares_budget`."""
        raise NotImplementedError(f"{self.name} spreads no budget")

    def check_shapes(self, shapes: list[tuple[int, int]]) -> None:
        """See that the settings make sense for matrices of these shapes.

        Raises:
            ValueError: if they do not.
        """
        return None  # most methods fit any matrix

    def to_dict(self) -> dict[str, Any]:
        """The method's name and all its settings, as config.json keeps them."""
        return {"name": self.name, **dataclasses.asdict(self)}


def method_names() -> list[str]:
    """Names of all methods, as used in config files and on the command line."""
    return sorted(_METHODS)


def method_class(name: str) -> type[MethodConfig]:
    """The configuration class of a method.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in _METHODS:
        raise ValueError(f"unknown method '{name}'; known are {', '.join(method_names())}")
    return _METHODS[name]
