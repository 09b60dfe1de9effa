"""Checks that a base and a fine-tune are a pair, so that a delta can be made."""

from collections.abc import Collection

import torch

from ..modeling.base_tensors import BaseTensors
from ..modeling.checkpoints import DTYPE_NAMES, TIED_OUTPUT, text_config
from ..modeling.delta_file import BASE_CHECKSUMS, CRC_ENTRY, EXACT_SUFFIX, RECORD_SUFFIX, ROWS_SUFFIX
from ..modeling.tensors import Model, StoredModel

# Matrices of fewer entries are stored whole: their records would be mostly header.
_SMALL_MATRIX = 4096
_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class IncompatibleModelsError(ValueError):
    """The base and the fine-tune are not a pair, so that no delta can be made."""


def check_tensors(base: BaseTensors, finetuned: Model, heads: Collection[str] = ()) -> dict[str, int]:
    """Check that the dtypes and shapes of a pair match; only headers are read.

    Args:
        heads: tensors of the fine-tune that have no counterpart, and share no row with the base's.

    Returns:
        By name, how many rows of the base's tensor a tensor has, if not all: its vocabulary was cut.

    Raises:
        IncompatibleModelsError: naming the first difference.
    """
    cut = {}
    for name in finetuned.names():
        for model in (base, finetuned):
            dtype = model.dtype(name)
            if dtype not in DTYPE_NAMES or (dtype.is_floating_point and dtype not in _FLOAT_DTYPES):
                raise IncompatibleModelsError(
                    f"{name} in '{model.source}' has the unsupported dtype {dtype}: convert it to float weights"
                )
        if base.dtype(name).is_floating_point != finetuned.dtype(name).is_floating_point:
            raise IncompatibleModelsError(
                f"{name} has dtype {finetuned.dtype(name)} in '{finetuned.source}' and {base.dtype(name)} in "
                f"'{base.source}': both must be floating-point, or neither"
            )
        if name in heads:
            cut[name] = 0
            continue
        ours, theirs = finetuned.shape(name), base.shape(name)
        if ours == theirs or _grew(finetuned, ours, theirs):
            continue
        if 0 in ours:
            raise IncompatibleModelsError(
                f"{name} of '{finetuned.source}' is empty: it was saved before its parts were gathered (DeepSpeed "
                "ZeRO-3, FSDP); save it again"
            )
        if not _was_cut(finetuned, ours, theirs):
            raise IncompatibleModelsError(
                f"{name} has shape {list(ours)} in '{finetuned.source}' and {list(theirs)} in '{base.source}': only "
                "embeddings and output projection may differ, by rows of the vocabulary that were added or cut off"
            )
        cut[name] = ours[0]
    return cut


def check_names(model: Model) -> None:
    """Check that a model has weights, and no names that the delta format reserves.

    Raises:
        IncompatibleModelsError: if not.
    """
    names = model.names()
    if not any(model.dtype(name).is_floating_point for name in names):
        raise IncompatibleModelsError(f"'{model.source}' holds no floating-point weights: check the model")
    suffixes = (RECORD_SUFFIX, EXACT_SUFFIX, ROWS_SUFFIX)
    reserved = {BASE_CHECKSUMS, CRC_ENTRY, *(name + suffix for name in names for suffix in suffixes)}
    if taken := sorted(reserved & set(names)):
        raise IncompatibleModelsError(
            f"'{model.source}' has a tensor named {taken[0]}, a name that the delta format reserves: rename it"
        )


def _grew(finetuned: Model, ours: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """Return whether a tensor's first axis is a vocabulary with rows added."""
    return len(theirs) > 0 and ours[1:] == theirs[1:] and theirs[0] < ours[0] == vocabulary_size(finetuned)


def _was_cut(finetuned: Model, ours: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """Return whether a tensor's first axis is a vocabulary of which rows were cut off."""
    return len(ours) > 0 and ours[1:] == theirs[1:] and theirs[0] > ours[0] == vocabulary_size(finetuned)


def vocabulary_size(model: Model) -> int | None:
    """Return the size of a model's vocabulary, which a vision model's configuration has in a nested one."""
    return getattr(text_config(model.config), "vocab_size", None)


def check_tied_output(checkpoint: StoredModel) -> None:
    """Check that a tied checkpoint stores no separate output projection, which no reader would load.

    Raises:
        IncompatibleModelsError: if it does.
    """
    if not checkpoint.tied or TIED_OUTPUT not in checkpoint.stored_names():
        return
    stored, shape = checkpoint.tensor(TIED_OUTPUT), checkpoint.shape(TIED_OUTPUT)
    same = (name for name in checkpoint.names() if checkpoint.shape(name) == shape)
    if not any(torch.equal(checkpoint.tensor(name), stored) for name in same):
        raise IncompatibleModelsError(
            f"config.json of '{checkpoint.source}' ties the output projection to the input embeddings, but its "
            f"{TIED_OUTPUT} is another matrix: set tie_word_embeddings to false in config.json"
        )


def is_matrix_shape(shape: tuple[int, ...]) -> bool:
    """Return whether a shape is that of a matrix, or a stack of matrices, large enough to be encoded."""
    return len(shape) in (2, 3) and shape[-1] * shape[-2] >= _SMALL_MATRIX
