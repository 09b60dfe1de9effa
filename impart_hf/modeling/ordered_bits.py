"""Numbers as integers in their order, so that the difference of two near numbers is a small integer (docs/FORMAT.md).

The bits of a float are a sign and a magnitude; counted in steps from one number to the next, two numbers of one dtype
are as many steps apart as their integers differ. Every bit pattern, NaN with its payload included, has an integer of
its own, so that nothing is lost.
"""

import torch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# Bits of the mantissa, which the exponent is above.
_MANTISSA_BITS = {
    torch.float32: 23,
    torch.float16: 10,
    torch.bfloat16: 7,
    torch.float8_e4m3fn: 3,
    torch.float8_e4m3fnuz: 3,
    torch.float8_e5m2: 2,
    torch.float8_e5m2fnuz: 2,
}
_WITH_STEPS = {*_MANTISSA_BITS, *_INTEGERS.values(), torch.uint8}
# Between these, a base is rounded alike on every device.
_CASTS = {torch.float32, torch.float16, torch.bfloat16}


def has_steps(dtype: torch.dtype, base: torch.dtype) -> bool:
    """Return whether steps from numbers of a base to numbers of a dtype are defined: else they are stored as they are.

    They are for floats and integers of 8, 16 and 32 bits of one dtype, unsigned ones of 8 bits only, and if both are
    float32, float16 or bfloat16.
    """
    return {base, dtype} <= _CASTS or (base == dtype and dtype in _WITH_STEPS)


def rounded(base: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a base in the dtype of a fine-tune, with one bit pattern for all NaN if it has another dtype.

    The payload of a NaN in another dtype depends on the device.
    """
    if base.dtype == dtype:
        return base
    cast = base.to(dtype)
    return torch.where(cast.isnan(), torch.full_like(cast, float("nan")), cast)


def integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bits as signed integers of the same size, one axis; a view if the tensor is contiguous."""
    return tensor.contiguous().flatten().view(_INTEGERS[tensor.itemsize])


def ordered(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return integers in the order of the numbers that have these bits; applied to its own result, the bits.

    Args:
        bits: signed integers, as from `integers`.
        dtype: of the numbers. The bits of signed integers are in order already; those of unsigned ones are not, but
            their differences, modulo their size, are the same.
    """
    if not dtype.is_floating_point:
        return bits
    return bits ^ ((bits >> (8 * bits.itemsize - 1)) & torch.iinfo(bits.dtype).max)


def steps(base: torch.Tensor, finetuned: torch.Tensor) -> torch.Tensor:
    """Return how far every number of a fine-tune is from its base's: 0, 1 for a step down, 2 for one up, 3, …

    Args:
        base: of the same dtype as the fine-tune.

    Returns:
        Integers with as many bits as the numbers, one axis, to be read as unsigned.
    """
    change = ordered(integers(finetuned), finetuned.dtype) - ordered(integers(base), base.dtype)
    return (change << 1) ^ (change >> (8 * change.itemsize - 1))


def moved(base: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the fine-tune, of the base's shape and dtype, from its base and the result of `steps`."""
    unsigned_half = (numbers >> 1) & torch.iinfo(numbers.dtype).max
    change = unsigned_half ^ -(numbers & 1)
    bits = ordered(ordered(integers(base), base.dtype) + change, base.dtype)
    return bits.view(base.dtype).view(base.shape)


def exponents(base: torch.Tensor) -> torch.Tensor:
    """Return what the size of a step depends on: uint8, the exponents of floats without bias, one axis; 0 of integers.

    Args:
        base: in the dtype of the fine-tune.
    """
    bits = integers(base)
    if not base.dtype.is_floating_point:
        return torch.zeros(bits.shape, dtype=torch.uint8, device=bits.device)
    shift = _MANTISSA_BITS[base.dtype]
    width = 8 * base.itemsize - 1 - shift
    return ((bits >> shift) & ((1 << width) - 1)).to(torch.uint8)
