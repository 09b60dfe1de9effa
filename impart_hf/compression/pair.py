"""A base and a fine-tune of it: whether they are a pair, and what changed between them."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.text import CalibrationSource, load_tokenizer, model_tokens
from ..common.progress import Progress
from ..evaluation.metrics import load
from ..modeling.checkpoints import DTYPE_NAMES, TIED_OUTPUT, Checkpoint, HubOptions, all_finite, pinned
from ..modeling.checksums import tensor_checksum
from ..modeling.delta_repository import BASE_CHECKSUMS, CRC_ENTRY, RECORD_SUFFIX, ROWS_SUFFIX

# Matrices of fewer entries than this are kept as they are: a record of them would be mostly header.
_SMALL_MATRIX = 4096
# Squares of larger numbers, summed over a column, leave float32's range.
_LARGEST = 1e15
_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class IncompatibleModelsError(ValueError):
    """Base and fine-tuned model are not a pair that a delta can be made of."""


@dataclass
class TensorPlan:
    """What becomes of one fine-tuned tensor.

    Attributes:
        kind: "equal" (to the base; costs nothing), "kept" (stored as it is) or "encoded".
        shape: of the part that base and fine-tune share.
        dtype: of the fine-tuned tensor.
        vocabulary: whether it has a row for every token: an embedding or output projection.
        added_rows: rows that the fine-tune has beyond the base's.
        max_bytes: budget of the tensor's records, for "encoded".
        base_checksum, checksum: of the base's and of the fine-tuned tensor.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    vocabulary: bool = False
    added_rows: int = 0
    max_bytes: int = 0
    base_checksum: int = 0
    checksum: int = 0

    @property
    def dense_bytes(self) -> int:
        """Bytes of the shared part in the fine-tuned checkpoint."""
        return element_count(self.shape) * self.dtype.itemsize

    @property
    def added_bytes(self) -> int:
        return self.added_rows * element_count(self.shape[1:]) * self.dtype.itemsize

    @property
    def matrices(self) -> int:
        """How many matrices it is a stack of."""
        return element_count(self.shape[:-2])


def element_count(shape: tuple[int, ...]) -> int:
    """How many numbers a tensor of this shape has."""
    return torch.Size(shape).numel()


def check_pair(base: Checkpoint, finetuned: Checkpoint) -> None:
    """Compare architectures, names and shapes; only headers are read.

    Raises:
        IncompatibleModelsError: naming the first difference.
    """
    types = base.config.get("model_type"), finetuned.config.get("model_type")
    if types[0] != types[1]:
        advice = "; give the pruned model that it was trained from as the base" if types[1] == "pruned_llama" else ""
        raise IncompatibleModelsError(f"the base is a '{types[0]}' model, the fine-tune a '{types[1]}' model{advice}")
    base_names, names = set(base.names()), set(finetuned.names())
    if base_names != names:
        lost, extra = sorted(base_names - names), sorted(names - base_names)
        what = f"lacks {lost[0]}" if lost else f"has {extra[0]}, which the base lacks"
        raise IncompatibleModelsError(
            f"'{finetuned.source}' is not a fine-tune of '{base.source}': it {what} "
            f"({len(lost)} tensors missing, {len(extra)} extra)"
        )
    _check_names(finetuned)
    for name in finetuned.names():
        for checkpoint in (base, finetuned):
            dtype = checkpoint.dtype(name)
            if dtype not in DTYPE_NAMES or (dtype.is_floating_point and dtype not in _FLOAT_DTYPES):
                raise IncompatibleModelsError(f"'{checkpoint.source}': {name} has the unsupported dtype {dtype}")
        if base.dtype(name).is_floating_point != finetuned.dtype(name).is_floating_point:
            raise IncompatibleModelsError(
                f"{name} has dtype {finetuned.dtype(name)} in '{finetuned.source}' and {base.dtype(name)} in "
                f"'{base.source}'"
            )
        ours, theirs = finetuned.shape(name), base.shape(name)
        if ours != theirs and not _grew(finetuned, name, ours, theirs):
            raise IncompatibleModelsError(
                f"{name} has shape {list(ours)} in '{finetuned.source}' and {list(theirs)} in '{base.source}'; only "
                "embeddings and output projection may differ, by rows added to the vocabulary"
            )


def _check_names(checkpoint: Checkpoint) -> None:
    names = checkpoint.names()
    if not any(checkpoint.dtype(name).is_floating_point for name in names):
        raise IncompatibleModelsError(f"'{checkpoint.source}' holds no weights")
    reserved = {BASE_CHECKSUMS, CRC_ENTRY, *(n + suffix for n in names for suffix in (RECORD_SUFFIX, ROWS_SUFFIX))}
    if taken := sorted(reserved & set(names)):
        raise IncompatibleModelsError(
            f"'{checkpoint.source}' has a tensor named {taken[0]}, which the delta format uses itself"
        )


def _grew(finetuned: Checkpoint, name: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """Whether the tensor's first axis is a vocabulary that has grown."""
    vocabulary = finetuned.config.get("vocab_size")
    return len(ours) == len(theirs) == 2 and ours[1] == theirs[1] and theirs[0] < ours[0] == vocabulary


def scan(base: Checkpoint, finetuned: Checkpoint, progress: Progress) -> list[TensorPlan]:
    """Read both checkpoints once: find what is equal, take checksums, refuse what is not finite.

    Raises:
        IncompatibleModelsError: if a tensor holds NaN or infinity, or a stored output projection would be lost.
    """
    check_tied_output(finetuned)
    plans = []
    names = finetuned.names()
    for name in progress.track(names, "Scanning"):
        before, after = base.tensor(name), finetuned.tensor(name)
        for source, tensor in ((base.source, before), (finetuned.source, after)):
            _check_numbers(tensor, f"{name} of '{source}'")
        shared = after[: before.shape[0]] if before.dim() else after
        # Readers convert floats to the fine-tune's dtype, and leave whole numbers as they are.
        comparable = after.is_floating_point() or before.dtype == after.dtype
        equal = comparable and torch.equal(before.to(after.dtype), shared)
        plans.append(
            TensorPlan(
                name=name,
                kind="equal" if equal else "encoded" if _is_matrix(before) else "kept",
                shape=tuple(before.shape),
                dtype=after.dtype,
                vocabulary=after.dim() == 2 and after.shape[0] == finetuned.config.get("vocab_size"),
                added_rows=after.shape[0] - before.shape[0] if before.dim() else 0,
                base_checksum=tensor_checksum(before),
                checksum=tensor_checksum(after),
            )
        )
    return plans


def check_tied_output(checkpoint: Checkpoint) -> None:
    """See that a tied checkpoint stores no output projection of its own, which nobody would read.

    Raises:
        IncompatibleModelsError: if it does.
    """
    if checkpoint.has_untied_output():
        raise IncompatibleModelsError(
            f"config.json of '{checkpoint.source}' ties the output projection to the input embeddings, but its "
            f"{TIED_OUTPUT} is another matrix: set tie_word_embeddings to false there"
        )


def _check_numbers(tensor: torch.Tensor, name: str) -> None:
    if not tensor.is_floating_point():
        return
    if not all_finite(tensor):
        raise IncompatibleModelsError(f"{name} holds NaN or infinity")
    if _is_matrix(tensor) and max(map(abs, torch.stack(tensor.aminmax()).tolist())) > _LARGEST:
        raise IncompatibleModelsError(f"{name} holds numbers beyond {_LARGEST:g}, of which no delta can be taken")


def _is_matrix(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a matrix, or a stack of matrices, large enough to be encoded."""
    return tensor.is_floating_point() and is_matrix_shape(tuple(tensor.shape))


def is_matrix_shape(shape: tuple[int, ...]) -> bool:
    """Whether a shape is that of a matrix, or a stack of matrices, large enough for a method to work on."""
    return len(shape) in (2, 3) and shape[-1] * shape[-2] >= _SMALL_MATRIX


def describe_base(base: str, options: HubOptions, base_name: str | None) -> tuple[str, str | None]:
    """What config.json records of the base: Hub id and commit, or the absolute path of a local folder.

    Args:
        base: local folder or Hub id.
        options: pinned to a commit, if it is on the Hub.
        base_name: the id to record instead of a folder.

    Raises:
        ValueError: if that cannot be an id.
    """
    if base_name:
        try:
            validate_repo_id(base_name)
        except HFValidationError as error:
            raise ValueError(f"base_name: '{base_name}' is not a Hub id (owner/name)") from error
    if os.path.isdir(base):
        return (base_name, options.revision) if base_name else (os.path.abspath(base), None)
    return base_name or base, options.revision


class ModelPair:
    """A base and a fine-tune of it, read through once however often they are compressed.

    Attributes:
        base, finetuned: the two checkpoints.
        recorded_base: what config.json records of the base, from `describe_base`.
        device: where matrices are decomposed.
        progress: shows bars.
    """

    def __init__(
        self,
        base: str,
        finetuned: str,
        base_options: HubOptions,
        finetuned_options: HubOptions,
        *,
        base_name: str | None = None,
        device: torch.device,
        progress: Progress,
    ):
        """Open both checkpoints; only headers are read.

        Raises:
            CheckpointError: if one of them cannot be read.
            IncompatibleModelsError: if they are not a pair.
        """
        base, finetuned = os.fspath(base), os.fspath(finetuned)
        finetuned_options, base_options = pinned(finetuned, finetuned_options), pinned(base, base_options)
        self.device, self.progress = device, progress
        self.finetuned = Checkpoint(finetuned, finetuned_options)
        self.base = Checkpoint(base, base_options, tied=self.finetuned.tied)
        check_pair(self.base, self.finetuned)
        self.recorded_base = describe_base(base, base_options, base_name)

    @cached_property
    def tensors(self) -> list[TensorPlan]:
        """What is to become of every tensor, before any method has a say."""
        return scan(self.base, self.finetuned, self.progress)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The fine-tune's.

        Raises:
            ValueError: if it has none that can be read.
        """
        return load_tokenizer(self.finetuned.source, self.finetuned.options)

    def load(self, repository: Path | None = None) -> PreTrainedModel:
        """A delta repository of this pair, or the fine-tune itself, in float32 on the device, to be judged."""
        if repository is None:
            source, options = self.finetuned.source, self.finetuned.options
            return load(
                source, torch.float32, self.device,
                revision=options.revision, token=options.token, cache_dir=options.cache_dir,
            )  # fmt: skip
        source, options = self.base.source, self.base.options
        return load(
            str(repository), torch.float32, self.device,
            # The name recorded for a folder is for others, and need not exist yet
            base_model=source if os.path.isdir(source) else None, token=options.token, cache_dir=options.cache_dir,
        )  # fmt: skip

    def tokens(self, source: CalibrationSource, samples: int, length: int) -> torch.Tensor:
        """int64 (at most `samples`, `length` or as many positions as the model has): sequences of a text."""
        return model_tokens(self.finetuned, source, samples, length)
