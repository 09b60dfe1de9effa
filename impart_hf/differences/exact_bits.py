"""What it takes to store the difference of two tensors exactly, estimated by the entropy of what the codec codes."""

import math

import numpy as np
import torch

from ..coding.number_encoder import count_tokens, entropy_bits, symbols_of, tokens_of
from ..modeling.coded_numbers import TOKENS
from ..modeling.ordered_bits import exponents, has_steps, rounded, steps

_CHUNK = 1 << 22  # entries that are looked at together


def exact_bits(base: torch.Tensor, finetuned: torch.Tensor) -> float:
    """Estimate the bits that the exact difference of a fine-tuned tensor takes; 0 if it equals its base.

    They are the entropy of the steps from the base's numbers to the fine-tune's, as tokens and bits below these, given
    the exponents of the base's numbers: of all rows, or, if that is less, of those that changed and of which they are.
    Tables and headers are left out. Where steps are not defined, or take more, the tensor is stored as it is.

    Args:
        base, finetuned: of one shape, on one device; the base in its own dtype.
    """
    whole = 8.0 * finetuned.numel() * finetuned.itemsize
    if not finetuned.numel():
        return 0.0
    if not has_steps(finetuned.dtype, base.dtype):
        same = base.dtype == finetuned.dtype or finetuned.dtype.is_floating_point
        return 0.0 if same and torch.equal(base.to(finetuned.dtype), finetuned) else whole
    columns = finetuned.shape[-1] if finetuned.dim() > 1 else finetuned.numel()
    before, after = (tensor.reshape(-1, columns) for tensor in (base, finetuned))
    counts, unchanged, changed_rows = np.zeros((256, TOKENS), np.int64), np.zeros(256, np.int64), 0
    block = max(1, _CHUNK // columns)
    for start in range(0, len(after), block):
        new = after[start : start + block]
        old = rounded(before[start : start + block], new.dtype)
        moves = steps(old, new).cpu().numpy().view(f"u{new.itemsize}")
        keys = exponents(old).cpu().numpy()
        counts += count_tokens(symbols_of(tokens_of(moves), keys))
        moved = moves.reshape(-1, columns).any(axis=1)
        changed_rows += int(moved.sum())
        unchanged += np.bincount(keys.reshape(-1, columns)[~moved].ravel(), minlength=256)
    every = float(entropy_bits(counts).sum())
    counts[:, 0] -= unchanged
    chosen = float(entropy_bits(counts).sum()) + _choice_bits(changed_rows, len(after))
    return min(whole, every, chosen)


def _choice_bits(chosen: int, count: int) -> float:
    """Return the bits that it takes to say which so many of some are meant."""
    parts = (part for part in (chosen, count - chosen) if part)
    return sum(part * math.log2(count / part) for part in parts)
