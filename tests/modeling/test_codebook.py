"""Codebooks by their definition in docs/FORMAT.md: levels, rounding to the nearest, packing."""

import numpy as np
import pytest
import torch

from impart_hf.modeling.codebook import (
    BFLOAT16,
    CODEBOOKS,
    FLOAT16,
    NORMAL_LEVELS,
    Floats,
    Levels,
    level_codebook,
)
from impart_hf.modeling.width_codes import level_widths

LEVELS = [width for width, book in CODEBOOKS.items() if isinstance(book, Levels)]


def defined_levels(width: int) -> np.ndarray:
    """float64, rising, as the page on the format defines them."""
    if width in NORMAL_LEVELS:
        above = np.array(NORMAL_LEVELS[width])
        return np.concatenate([-above[::-1], above])
    top = 2**width - 1
    return 2 * np.arange(top + 1) / top - 1


def some_values(count: int, seed: int = 0) -> torch.Tensor:
    """Some beyond the outermost levels."""
    return 1.5 * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_which_there_are() -> None:
    assert sorted(CODEBOOKS) == [*range(1, 9), FLOAT16, BFLOAT16, *NORMAL_LEVELS]
    assert [level_widths(bits) for bits in (1, 2, 4, 8)] == [[1], [2, 34], [4, 36], [8]]
    with pytest.raises(KeyError):
        level_codebook(FLOAT16)


@pytest.mark.parametrize("width", LEVELS)
def test_levels_and_edges(width: int) -> None:
    book, expected = level_codebook(width), defined_levels(width)
    np.testing.assert_allclose(book.levels().numpy(), expected, atol=1e-7)
    np.testing.assert_allclose(book.edges().numpy(), (expected[1:] + expected[:-1]) / 2, atol=1e-7)
    assert len(expected) == 2**book.bits == book.top + 1
    # On the axis on which values are rounded, evenly spaced levels are the whole numbers
    positions = book.levels().double() * book.density + book.zero
    if width <= 8:
        np.testing.assert_allclose(positions.numpy(), np.arange(book.top + 1), atol=1e-4)


def codebook(width: int) -> Levels:
    """A codebook of its own, which has made nothing yet."""
    return type(level_codebook(width))(width)


@pytest.mark.parametrize("width", LEVELS)
def test_the_process_s_default_dtype_does_not_matter(width: int) -> None:
    packed = level_codebook(width).pack(some_values(50))
    torch.set_default_dtype(torch.bfloat16)
    try:
        book = codebook(width)
        values = book.unpack(torch.from_numpy(packed), 50)
        np.testing.assert_allclose(book.levels().numpy(), defined_levels(width), atol=1e-7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(values, level_codebook(width).unpack(torch.from_numpy(packed), 50))


@pytest.mark.parametrize("width", LEVELS)
def test_what_inference_has_made_serves_training(width: int) -> None:
    book, scale = codebook(width), torch.ones(1, requires_grad=True)
    packed = torch.from_numpy(level_codebook(width).pack(some_values(50)))
    with torch.inference_mode():
        book.nearest(some_values(8))
        book.unpack(packed, 50)
    (book.unpack(packed, 50) * scale).sum().backward()
    (book.levels() * scale).sum().backward()
    (book.edges() * scale).sum().backward()


@pytest.mark.parametrize("width", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_level(width: int, dtype: torch.dtype) -> None:
    book, values = level_codebook(width), some_values(500, width).to(dtype)
    codes = book.nearest(values)
    assert codes.dtype == torch.uint8
    distance = np.abs(values.double().numpy()[:, None] - defined_levels(width))
    chosen = distance[np.arange(500), codes.numpy()]
    np.testing.assert_allclose(chosen, distance.min(1), atol=1e-6)
    assert book.values(codes, dtype).dtype == dtype
    assert torch.equal(book.nearest(book.values(codes, dtype)), codes)


@pytest.mark.parametrize("width", sorted(CODEBOOKS))
@pytest.mark.parametrize("count", [0, 1, 7, 64, 333])
def test_what_is_packed_is_what_is_rounded(width: int, count: int) -> None:
    book, values = CODEBOOKS[width], some_values(count, count)
    packed = book.pack(values)
    assert packed.dtype == np.uint8 and len(packed) == book.packed_bytes(count) == -(-count * book.bits // 8)
    unpacked = book.unpack(torch.from_numpy(packed.copy()), count)
    assert unpacked.dtype == torch.float32 and torch.equal(unpacked, book.round(values))
    compact = book.compact(torch.from_numpy(packed.copy()), count)
    assert compact.element_size() <= 2 and torch.equal(book.expand(compact), unpacked)
    assert not book.expand(torch.zeros_like(compact)).any()


@pytest.mark.parametrize("width", [FLOAT16, BFLOAT16])
def test_floats_may_lie_at_any_address(width: int) -> None:
    book, values = CODEBOOKS[width], some_values(5)
    assert isinstance(book, Floats)
    shifted = torch.zeros(11, dtype=torch.uint8)
    shifted[1:] = torch.from_numpy(book.pack(values).copy())
    assert torch.equal(book.unpack(shifted[1:], 5), values.to(book.dtype).float())
