"""What a compression method is: a configuration that can encode one matrix's delta into a given number of bytes."""

import abc
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ..coding.svd import Svd, leading_svd
from ..common.validation import check_number

_METHODS: dict[str, type["MethodConfig"]] = {}


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
            (docs/benchmarks.md).
    """

    name: ClassVar[str]
    quantises: ClassVar[bool] = False  # whether it can use the second moments of a layer's inputs
    uncalibrated: ClassVar[str] = "none: rounded"  # what it does without such, for the records
    factored: ClassVar[bool] = False  # whether it works on the singular components
    shares_budget: ClassVar[bool] = False  # whether one budget is spread over all matrices by their spectra
    random: ClassVar[bool] = True  # whether the seed makes a difference: whether entries are dropped

    compression_ratio: float = 32.0
    seed: int = 0
    embeddings: str = "lowrank"

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
        if self.embeddings not in ("lowrank", "method"):
            raise ValueError(f'embeddings must be "lowrank" or "method", got {self.embeddings!r}')

    def encode(
        self,
        delta: torch.Tensor,
        max_bytes: int,
        mask_seed: int,
        *,
        hessian: torch.Tensor | None = None,
        svd: Svd = leading_svd,
        vocabulary: bool = False,
    ) -> Encoded:
        """Encode one matrix's delta into a record of at most `max_bytes` bytes.

        Args:
            delta: float32 of shape (m, n), finite and not all zero, on the device where the work is to be done.
            max_bytes: at least `least_bytes(m, n)`.
            mask_seed: the record's 32-bit mask seed.
            hessian: float32 (n, n), the second moments X X^T / tokens of the layer's inputs, or None; methods that
                do not quantise have no use for it.
            svd: gives the delta's leading singular components, as `leading_svd` does.
            vocabulary: whether the matrix has a row for every token.
        """
        return self._encode(EncodingTask(delta, max_bytes, mask_seed, hessian, svd, vocabulary))

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


def method_fields() -> Iterator[tuple[str, list[dataclasses.Field], list[str]]]:
    """Every setting of any method beyond the shared ones: name, and fields and names of the methods that have it."""
    shared = {f.name for f in dataclasses.fields(MethodConfig)}
    owners: dict[str, tuple[list[dataclasses.Field], list[str]]] = {}
    for name in method_names():
        for field in dataclasses.fields(_METHODS[name]):
            if field.name not in shared:
                fields, names = owners.setdefault(field.name, ([], []))
                fields.append(field)
                names.append(name)
    for field_name, (fields, names) in owners.items():
        yield field_name, fields, names


def parse_setting(method: type[MethodConfig], name: str, text: str) -> Any:
    """A setting's value from the command line, by the type of its default; several numbers are separated by commas.

    Raises:
        ValueError: if the text does not stand for such a value.
    """
    default: Any = next(f.default for f in dataclasses.fields(method) if f.name == name)
    try:
        if isinstance(default, tuple):
            return tuple(int(part) for part in text.split(",") if part.strip())
        return text if isinstance(default, str) else type(default)(text)
    except ValueError as error:
        kind = {tuple: "whole numbers separated by commas", int: "a whole number"}.get(type(default), "a number")
        raise ValueError(f"{name} must be {kind}, got {text!r}") from error
