"""impart-rd on light matrices at few bytes: some are stored by entries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.random_deltas import delta_and_vectors

from impart_hf import ImPartRdConfig
from impart_hf.coding.allocation import allocate
from impart_hf.coding.entry_codes import EntryCodes, entry_code
from impart_hf.coding.rate_distortion import ErrorWeights, Matrix
from impart_hf.methods import EncodingTask, Spectrum
from impart_hf.modeling.delta_decode import decode_record
from impart_hf.modeling.delta_record import DIRECT, FACTORED, Record, parse_record

LIGHT = 0.01


def flat(rows: int, columns: int) -> torch.Tensor:
    """A delta without strong components."""
    return 1e-3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def encode(delta: torch.Tensor, budget: int, relative_norm: float | None = LIGHT, **arguments: bool) -> Record:
    encoded = ImPartRdConfig().encode(delta, budget, 1, relative_norm=relative_norm, **arguments)
    assert len(encoded.data) <= budget
    record = parse_record(np.frombuffer(encoded.data, np.uint8), tuple(delta.shape), "delta")[0]
    assert (record.layout == DIRECT) == any("entries" in note for note in encoded.notes)
    return record


@pytest.mark.parametrize("bits_per_entry", [0.05, 0.1, 0.3])
def test_a_flat_light_delta_is_stored_by_entries_without_bias(bits_per_entry: float) -> None:
    delta = flat(300, 400)
    record = encode(delta, int(delta.numel() * bits_per_entry / 8))
    assert record.layout == DIRECT
    decoded = decode_record(record, "delta")
    along = torch.dot(decoded.flatten(), delta.flatten()) / delta.square().sum()
    assert float(along) == pytest.approx(1, abs=0.05)
    kept = float((decoded != 0).float().mean())
    assert kept == pytest.approx(bits_per_entry / 2, rel=0.1)
    # As EntryCode's error says, without the part for what does not average out.
    assert float((decoded - delta).square().sum() / delta.square().sum()) == pytest.approx(1.1331 / kept - 1, rel=0.1)


def test_what_is_stored_by_components() -> None:
    """Deltas that are heavy, or of unknown weight; tokens' rows; strong components; enough bytes."""
    delta, budget = flat(300, 400), 1500
    assert encode(delta, budget).layout == DIRECT
    for other in (encode(delta, budget, 0.2), encode(delta, budget, None), encode(delta, budget, vocabulary=True)):
        assert other.layout == FACTORED
    assert encode(delta_and_vectors(300, 400, decay=2.0)[0], budget).layout == FACTORED
    assert encode(delta, delta.numel()).layout == FACTORED


def test_several_at_once_are_stored_as_one_by_one() -> None:
    deltas = [flat(96, 128), delta_and_vectors(96, 128, decay=2.0)[0]]
    method = ImPartRdConfig()
    tasks = [
        EncodingTask(delta, 400, seed, None, lambda *_: None, None, LIGHT, False, False)  # type: ignore[arg-type]
        for seed, delta in enumerate(deltas)
    ]
    layouts = [
        parse_record(np.frombuffer(encoded.data, np.uint8), (96, 128), "delta")[0].layout
        for encoded in method._encode_stack(tasks)
    ]
    assert layouts == [DIRECT, FACTORED]


def test_a_code_of_one_matrix_is_that_of_its_price() -> None:
    matrix = Matrix(np.empty(0), 200, 300, ErrorWeights(3, 1, 0.25, 0.06), 5.0)
    for price in (1e-6, 1e-5, 1e-4):
        (size,), (error,) = EntryCodes([matrix]).choose(price)
        assert entry_code(matrix, int(np.ceil(size))).error == pytest.approx(error, rel=0.01)
        for other in (0.8, 1.25):  # no other size costs less
            assert entry_code(matrix, int(other * size)).error + 8 * price * other * size > error + 8 * price * size
    assert entry_code(matrix, 45).error == np.inf
    assert entry_code(replace(matrix, entry_energy=np.inf), 4000).error == np.inf


@pytest.mark.parametrize("budget", [2_000, 20_000, 200_000])
def test_a_budget_is_shared_among_both_kinds(budget: int) -> None:
    """It is used up, and by matrices that are stored as their shares were planned."""
    method, draw = ImPartRdConfig(), np.random.default_rng(0)
    spectra = []
    for number in range(12):
        sigma = np.sort(draw.random(96))[::-1] if number % 2 else np.arange(1.0, 97.0) ** -1.5
        energy = float(np.square(sigma).sum())
        spectra.append(Spectrum(sigma, 96, 128, energy, relative_norm=LIGHT if number % 3 else 0.2))
    sizes = np.array(method.allocate(spectra, budget))
    assert 0.97 * budget - 600 < sizes.sum() <= budget
    same = allocate([replace(method.matrix(s), entry_energy=np.inf) for s in spectra], budget)
    if budget == 2_000:
        assert any(abs(own - other) > 20 for own, other in zip(sizes, same, strict=True))
    if budget == 200_000:
        assert same == sizes.tolist()  # enough for components


@pytest.mark.parametrize("budget", [0, 500, 600])
def test_a_budget_for_hardly_more_than_headers(budget: int) -> None:
    sigma = np.linspace(1, 0.9, 96)
    spectra = [Spectrum(sigma, 96, 128, float(np.square(sigma).sum()), relative_norm=LIGHT) for _ in range(12)]
    sizes = ImPartRdConfig().allocate(spectra, budget)
    assert sum(sizes) <= max(budget, 12 * 40)


@pytest.mark.parametrize(
    ("side", "energy", "weight", "ratio"), [(768, 23.0, 1000.0, 400), (1024, 42.0, 1000.0, 400), (256, 1e6, 1.0, 400)]
)
def test_errors_that_count_for_much_are_shared_out_as_well(side: int, energy: float, weight: float, ratio: int) -> None:
    """The price is found whatever the unit of errors, where no components are left."""
    sigma = np.linspace(1, 0.9, side)
    sigma *= (energy / np.square(sigma).sum()) ** 0.5
    spectra = [Spectrum(sigma, side, side, energy, weight=weight, relative_norm=0.04) for _ in range(3)]
    budget = 3 * 2 * side**2 // ratio
    sizes = ImPartRdConfig().allocate(spectra, budget)
    assert 0.9 * budget < sum(sizes) <= budget


def test_entries_that_levels_do_not_fit_are_not_stored() -> None:
    """Of a delta that is mostly zero, levels without a zero make noise of many times the rest."""
    delta = flat(300, 400)
    sparse = delta * (torch.rand(delta.shape, generator=torch.Generator().manual_seed(0)) < 0.01)
    assert encode(delta, 1500).layout == DIRECT and encode(sparse, 1500).layout == FACTORED
