"""Whether a base and a fine-tune are a pair that a delta can be made of."""

import torch

from ..modeling.checkpoints import DTYPE_NAMES, TIED_OUTPUT, Checkpoint
from ..modeling.delta_repository import BASE_CHECKSUMS, CRC_ENTRY, RECORD_SUFFIX, ROWS_SUFFIX

# Matrices of fewer entries than this are kept as they are: a record of them would be mostly header.
_SMALL_MATRIX = 4096
_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class IncompatibleModelsError(ValueError):
    """Base and fine-tuned model are not a pair that a delta can be made of."""


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


def is_matrix_shape(shape: tuple[int, ...]) -> bool:
    """Whether a shape is that of a matrix, or a stack of matrices, large enough for a method to work on."""
    return len(shape) in (2, 3) and shape[-1] * shape[-2] >= _SMALL_MATRIX
