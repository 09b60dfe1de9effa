"""Checks that a base and a fine-tune are a pair, so that a delta can be made."""

import torch

from ..modeling.checkpoints import DTYPE_NAMES, TIED_OUTPUT, Checkpoint
from ..modeling.delta_repository import BASE_CHECKSUMS, CRC_ENTRY, RECORD_SUFFIX, ROWS_SUFFIX

# Matrices of fewer entries are stored unchanged: their records would be mostly header.
_SMALL_MATRIX = 4096
_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class IncompatibleModelsError(ValueError):
    """The base and the fine-tune are not a pair, so that no delta can be made."""


def check_pair(base: Checkpoint, finetuned: Checkpoint) -> None:
    """Check that architectures, tensor names, dtypes and shapes match; only headers are read.

    Raises:
        IncompatibleModelsError: naming the first difference.
    """
    types = base.config.get("model_type"), finetuned.config.get("model_type")
    if types[0] != types[1]:
        advice = ": give the pruned model that it was trained from as the base" if types[1] == "pruned_llama" else ""
        raise IncompatibleModelsError(f"the base is a '{types[0]}' model, the fine-tune a '{types[1]}' model{advice}")
    base_names, names = set(base.names()), set(finetuned.names())
    if base_names != names:
        lost, extra = sorted(base_names - names), sorted(names - base_names)
        what = f"lacks {lost[0]}" if lost else f"has {extra[0]}, which the base lacks"
        raise IncompatibleModelsError(
            f"'{finetuned.source}' is not a fine-tune of '{base.source}': it {what} "
            f"({len(lost)} tensors missing, {len(extra)} extra); check both models"
        )
    _check_names(finetuned)
    for name in finetuned.names():
        for checkpoint in (base, finetuned):
            dtype = checkpoint.dtype(name)
            if dtype not in DTYPE_NAMES or (dtype.is_floating_point and dtype not in _FLOAT_DTYPES):
                raise IncompatibleModelsError(
                    f"{name} in '{checkpoint.source}' has the unsupported dtype {dtype}: convert it to float weights"
                )
        if base.dtype(name).is_floating_point != finetuned.dtype(name).is_floating_point:
            raise IncompatibleModelsError(
                f"{name} has dtype {finetuned.dtype(name)} in '{finetuned.source}' and {base.dtype(name)} in "
                f"'{base.source}': both must be floating-point, or neither"
            )
        ours, theirs = finetuned.shape(name), base.shape(name)
        if ours != theirs and not _grew(finetuned, name, ours, theirs):
            raise IncompatibleModelsError(
                f"{name} has shape {list(ours)} in '{finetuned.source}' and {list(theirs)} in '{base.source}': only "
                "embeddings and output projection may differ, by rows added to the vocabulary"
            )


def _check_names(checkpoint: Checkpoint) -> None:
    names = checkpoint.names()
    if not any(checkpoint.dtype(name).is_floating_point for name in names):
        raise IncompatibleModelsError(f"'{checkpoint.source}' holds no floating-point weights: check the model")
    reserved = {BASE_CHECKSUMS, CRC_ENTRY, *(n + suffix for n in names for suffix in (RECORD_SUFFIX, ROWS_SUFFIX))}
    if taken := sorted(reserved & set(names)):
        raise IncompatibleModelsError(
            f"'{checkpoint.source}' has a tensor named {taken[0]}, a name that the delta format reserves: rename it"
        )


def _grew(finetuned: Checkpoint, name: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """Return whether the tensor's first axis is a vocabulary with rows added."""
    vocabulary = finetuned.config.get("vocab_size")
    return len(ours) == len(theirs) == 2 and ours[1] == theirs[1] and theirs[0] < ours[0] == vocabulary


def check_tied_output(checkpoint: Checkpoint) -> None:
    """Check that a tied checkpoint stores no separate output projection, which no reader would load.

    Raises:
        IncompatibleModelsError: if it does.
    """
    if checkpoint.has_untied_output():
        raise IncompatibleModelsError(
            f"config.json of '{checkpoint.source}' ties the output projection to the input embeddings, but its "
            f"{TIED_OUTPUT} is another matrix: set tie_word_embeddings to false in config.json"
        )


def is_matrix_shape(shape: tuple[int, ...]) -> bool:
    """Return whether a shape is that of a matrix, or a stack of matrices, large enough to be encoded."""
    return len(shape) in (2, 3) and shape[-1] * shape[-2] >= _SMALL_MATRIX
