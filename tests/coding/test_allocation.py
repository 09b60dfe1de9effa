"""The errors that an allocation foretells, against those of records that are made of the same bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.random_deltas import make_delta

from impart_hf import ImPartRdConfig
from impart_hf.coding.rate_distortion import NOISE, Table
from impart_hf.coding.record_sizes import thresholds_of
from impart_hf.methods import Spectrum
from impart_hf.modeling.delta_record import parse_stack


def spectrum_of(delta, relative_norm: float) -> Spectrum:
    sigma = np.linalg.svd(delta.double().numpy(), compute_uv=False)
    return Spectrum(sigma, *delta.shape, float(np.square(sigma).sum()), relative_norm=relative_norm)


@pytest.mark.parametrize("relative_norm", [0.02, 0.2])
@pytest.mark.parametrize("ratio", [4, 8, 16, 64])
def test_expected_errors_are_those_of_records(ratio: int, relative_norm: float) -> None:
    """Within a factor of two: how well rounding one vector makes up for the other's errors, no spectrum tells."""
    deltas = [make_delta(192, 160, seed, 0.4 + 0.3 * seed) for seed in range(3)]
    spectra = [spectrum_of(delta, relative_norm) for delta in deltas]
    budget = sum(2 * delta.numel() for delta in deltas) // ratio
    method = ImPartRdConfig()
    found = method.allocation(spectra, budget)
    assert found.bytes == method.allocate(spectra, budget)
    for number, (delta, spectrum) in enumerate(zip(deltas, spectra, strict=True)):
        encoded = method.encode(delta, found.bytes[number], number, sigma=spectrum.sigma, relative_norm=relative_norm)
        (record,) = parse_stack(np.frombuffer(encoded.data, np.uint8), "delta")
        expected = ((found.dropped[number] + found.noise[number]) / spectrum.energy) ** 0.5
        assert 0.5 < record.relative_error / expected < 1.3
        assert encoded.record.dropped == pytest.approx(found.dropped[number] / spectrum.energy, abs=0.12)


def test_noise_of_a_component() -> None:
    """Each vector has the noise of its levels and of its own mask."""
    table = Table(np.ones((6, 3)))
    pair = table.bit_pairs.tolist().index([2, 3])
    noise = table.noise(np.array([pair, pair, -1]), thresholds_of(np.array([1.0, 0.5, 1.0])))
    whole = (1 + NOISE[2]) * (1 + NOISE[3])
    assert noise == pytest.approx([whole - 1, whole / 0.25 - 1, 0])


def test_entries_drop_nothing() -> None:
    sigma = np.ones(96)  # components of one size are worth no bytes each
    spectra = [Spectrum(sigma, 96, 128, 96.0, relative_norm=0.01) for _ in range(4)]
    found = ImPartRdConfig().allocation(spectra, 4 * 96 * 128 * 2 // 128)
    assert found.by_entries.all() and not found.dropped.any() and (found.noise > 96).all()
    forced = ImPartRdConfig().allocation([replace(one, relative_norm=0.5) for one in spectra], 4 * 96 * 128 * 2 // 128)
    assert not forced.by_entries.any() and (forced.dropped > 0).all()
