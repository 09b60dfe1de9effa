"""What it takes to store the difference of two tensors exactly, estimated by an entropy."""

import functools
from collections.abc import Iterator

import torch

from ..modeling.ordered_bits import exponents, has_steps, rounded, steps

# Steps below this are symbols of their own; of larger ones the symbol has the leading bit and the next three.
_OWN, _OWN_BITS, _NEXT_BITS = 16, 4, 3
_SYMBOLS = _OWN + 8 * (32 - _OWN_BITS)
_EXPONENTS = 256
_CHUNK = 1 << 22  # entries that are looked at together


def exact_bits(base: torch.Tensor, finetuned: torch.Tensor) -> float:
    """Estimate the bits that the exact difference of a fine-tuned tensor takes; 0 if it equals its base.

    The steps from the base's numbers to the fine-tune's become symbols and raw bits: a step z below 16 is a symbol;
    above, with b = floor(log2 z), the symbol is 16 + 8 (b - 4) + the three bits after the leading one, and b - 3 raw
    bits follow. The estimate is the entropy of a symbol, given the exponent of the base's number, and the raw bits.
    Where steps are not defined, or take more, the tensor is stored as it is.

    Args:
        base, finetuned: of one shape, on one device; the base in its own dtype.
    """
    whole = 8.0 * finetuned.numel() * finetuned.itemsize
    if not finetuned.numel():
        return 0.0
    if not has_steps(finetuned.dtype, base.dtype):
        same = base.dtype == finetuned.dtype or finetuned.dtype.is_floating_point
        return 0.0 if same and torch.equal(base.to(finetuned.dtype), finetuned) else whole
    counts = torch.zeros(_SYMBOLS * _EXPONENTS, dtype=torch.int64, device=finetuned.device)
    for old, new in _chunks(base, finetuned):
        old = rounded(old, new.dtype)
        counts += torch.bincount(
            _symbols(steps(old, new)) * _EXPONENTS + exponents(old).to(torch.int64), minlength=len(counts)
        )
    table = counts.double().view(_SYMBOLS, _EXPONENTS).cpu()
    information = torch.special.entr(table).sum() - torch.special.entr(table.sum(0)).sum()  # in nats
    symbols = torch.arange(_OWN, _SYMBOLS)
    raw = (table.sum(1)[_OWN:] * ((symbols - _OWN) // 8 + _OWN_BITS - _NEXT_BITS)).sum()
    return min(whole, float(information / torch.log(torch.tensor(2.0, dtype=torch.float64)) + raw))


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(tensor.reshape(-1).split(_CHUNK) for tensor in tensors), strict=True)


def _symbols(numbers: torch.Tensor) -> torch.Tensor:
    """Return the symbols, int64, of steps as `steps` returns them."""
    if numbers.itemsize == 4:
        return _symbols_of(numbers.to(torch.int64) & 0xFFFFFFFF)
    unsigned = numbers.to(torch.int32) & ((1 << 8 * numbers.itemsize) - 1)
    return _table(numbers.device)[unsigned]


@functools.cache
def _table(device: torch.device) -> torch.Tensor:
    """Return the symbols of all steps of 16 bits."""
    return _symbols_of(torch.arange(1 << 16, device=device))


def _symbols_of(numbers: torch.Tensor) -> torch.Tensor:
    # The exponent of a double is the position of the leading bit.
    leading = (numbers.clamp(min=1).double().view(torch.int64) >> 52) - 1023
    beyond = _OWN + 8 * (leading - _OWN_BITS) + ((numbers >> (leading - _NEXT_BITS).clamp(min=0)) & 7)
    return torch.where(numbers < _OWN, numbers, beyond)
