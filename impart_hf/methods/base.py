"""The base class of compression methods: a configuration that encodes one matrix's delta into a given number of bytes.

The command line imports all methods at every start, so neither this module nor a method's imports torch before a matrix
is encoded.
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

    from ..coding.records import MeasuredRecord
    from ..coding.svd import Svd

_METHODS: dict[str, type[MethodConfig]] = {}

# The note on a matrix whose vectors were rounded for inputs that are estimated from its delta.
GUESSED = "inputs guessed from the delta"


@dataclass(frozen=True)
class Encoded:
    """A record with its errors, and notes for the user on how it was made."""

    record: MeasuredRecord
    notes: tuple[str, ...] = ()

    @property
    def data(self) -> bytes:
        """The record's bytes."""
        return self.record.data


@dataclass(frozen=True)
class EncodingTask:
    """What is to be encoded: the arguments of `MethodConfig.encode`; `transposed` is False without a Hessian."""

    delta: torch.Tensor
    max_bytes: int
    mask_seed: int
    hessian: torch.Tensor | None
    svd: Svd
    sigma: np.ndarray | None
    relative_norm: float | None
    vocabulary: bool
    transposed: bool


@dataclass(frozen=True)
class Spectrum:
    """Properties of a matrix (m, n) by which the byte budget of a model is allocated.

    Attributes:
        sigma: float64, all or the leading singular values of its delta, falling; 0 or left out where it has none.
        rows, columns: m and n.
        energy: the squared Frobenius norm of the delta.
        vocabulary: whether it has a row for every token.
        weight: weight of its squared errors, relative to other matrices of its kind.
        relative_norm: the delta's Frobenius norm over the fine-tuned matrix's, if it is known.
    """

    sigma: np.ndarray
    rows: int
    columns: int
    energy: float
    vocabulary: bool = False
    weight: float = 1.0
    relative_norm: float | None = None


@dataclass
class MethodConfig(abc.ABC):
    """A compression method and its settings; the fields here are settings of every method.

    Attributes:
        compression_ratio: bytes of the fine-tuned checkpoint over bytes of the delta repository; above 1.
        seed: seed of the masks, 0 to 2**32 - 1. The same inputs and seed give the same bytes.
        embeddings: how changed embeddings and output projection are compressed, to the same ratio: "lowrank" by their
            leading singular components at 8 to 2 bits, "method" by the method itself. The papers leave them
            uncompressed. Masks on them affect single tokens instead of averaging out, and multiply the loss of quality
            (docs/results-toys.md).
    """

    name: ClassVar[str]
    quantises: ClassVar[bool] = False  # whether it can use the second moments of a layer's inputs
    uncalibrated: ClassVar[str] = "none: rounded"  # what the report says of the calibration if there is none
    factored: ClassVar[bool] = False  # whether it encodes singular components
    shares_budget: ClassVar[bool] = False  # whether it allocates one byte budget to all matrices by their spectra
    drops_entries: ClassVar[bool] = True  # whether it drops entries, so that the seed has an effect

    compression_ratio: float = setting(32.0, "checkpoint bytes over repository bytes, above 1", option="ratio")
    seed: int = setting(0, "seed of the masks, 0 to 2**32 - 1")
    embeddings: str = setting(
        "lowrank",
        f"how embeddings are compressed, {' or '.join(EMBEDDINGS)}: by leading components, or as other matrices",
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            return
        if not cls.__name__.endswith("Config"):  # by which `impart_hf` tells methods from its other names
            raise TypeError(f"the name of the method's class {cls.__name__} must end in 'Config'")
        for other in _METHODS.values():
            # The decorator may make the class a second time (`slots=True`).
            same = (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
            if not same and (other.name == cls.name or other.__name__ == cls.__name__):
                raise TypeError(
                    f"the method '{cls.name}' ({cls.__name__}) has the name of the method '{other.name}' "
                    f"({other.__name__} in {other.__module__}): choose another name"
                )
        _METHODS[cls.name] = cls

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        check_number("compression_ratio", self.compression_ratio)
        if not 1 < self.compression_ratio < float("inf"):
            raise ValueError(f"compression_ratio must be above 1, got {self.compression_ratio}")
        self.compression_ratio = float(self.compression_ratio)  # so that 32 and 32.0 are written the same way
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
        sigma: np.ndarray | None = None,
        relative_norm: float | None = None,
        vocabulary: bool = False,
        transposed: bool = False,
    ) -> Encoded:
        """Encode one matrix's delta into a record of at most `max_bytes` bytes.

        Args:
            delta: float32 of shape (m, n), finite and not all zero, on the device to compute on.
            max_bytes: at least `least_bytes(m, n)`.
            mask_seed: the record's 32-bit mask seed.
            hessian: float32 (n, n), or (m, m) if `transposed`: the second moments X X^T / tokens of the layer's
                inputs, or None; ignored by methods that do not quantise.
            svd: returns the delta's leading singular components; `coding.spectrum.decomposed` if None.
            sigma: float64 (min(m, n),), all singular values of the delta, if they are known; for methods with
                `shares_budget`.
            relative_norm: the delta's Frobenius norm over the fine-tuned matrix's, if it is known.
            vocabulary: whether the matrix has a row for every token.
            transposed: whether the layer has an input for each row, not for each column, as GPT-2's Conv1D. Without a
                Hessian this has no effect.
        """
        from ..coding.spectrum import decomposed

        transposed = transposed and hessian is not None
        task = EncodingTask(
            delta, max_bytes, mask_seed, hessian, svd or decomposed, sigma, relative_norm, vocabulary, transposed
        )
        return self.encode_all([task])[0]

    def encode_all(self, tasks: list[EncodingTask]) -> list[Encoded]:
        """Encode matrices, on an accelerator together if the method can; see `encode`.

        Args:
            tasks: of one shape, on one device; either all with a Hessian, and all transposed or none, or all without.
        """
        from ..coding.gptq import StackError
        from ..modeling.precision import full_float32

        with full_float32():
            if len(tasks) > 1 and tasks[0].delta.device.type != "cpu":
                try:
                    return self._encode_stack(tasks)
                except StackError:
                    pass  # one of them needs what only `_encode` can do
            return [self._encode(task) for task in tasks]

    @abc.abstractmethod
    def _encode(self, task: EncodingTask) -> Encoded:
        """Implement `encode`."""

    def _encode_stack(self, tasks: list[EncodingTask]) -> list[Encoded]:
        """Implement `encode_all` for several matrices on an accelerator, where launches should not grow with them.

        Raises:
            coding.gptq.StackError: if they have to be encoded one by one.
        """
        return [self._encode(task) for task in tasks]

    @abc.abstractmethod
    def least_bytes(self, rows: int, columns: int) -> int:
        """Return the size of the smallest useful record of a matrix of this shape, in bytes."""

    def rank_for(self, spectrum: np.ndarray, rows: int, columns: int, max_bytes: int) -> int:
        """Estimate how many components a factored method stores from the leading singular values (see `RankRule`)."""
        raise NotImplementedError(f"{self.name} does not work on singular components")

    def allocate(self, spectra: list[Spectrum], max_bytes: int) -> list[int]:
        """Return the bytes of every matrix's record, in total at most `max_bytes`, for methods with `shares_budget`."""
        raise NotImplementedError(f"{self.name} does not allocate a byte budget")

    def check_shapes(self, shapes: list[tuple[int, int]]) -> None:
        """Check that the settings fit matrices of these shapes.

        Raises:
            ValueError: if they do not.
        """
        return None  # the settings of most methods fit any matrix

    def to_dict(self) -> dict[str, Any]:
        """Return the method's name and all its settings, as config.json stores them."""
        return {"name": self.name, **dataclasses.asdict(self)}


def method_names() -> list[str]:
    """Return the names of all methods, as used in config files and on the command line."""
    return sorted(_METHODS)


def method_class(name: str) -> type[MethodConfig]:
    """Return the configuration class of a method.

    Raises:
        ValueError: if no method has the name.
    """
    if name not in _METHODS:
        raise ValueError(f"unknown method '{name}'; choose one of {', '.join(method_names())}")
    return _METHODS[name]
