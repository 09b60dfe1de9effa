"""What all encoders of few bits have in common: inputs' second moments, seeds, small deltas, settings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.messages import naming
from support.quantised import (
    FACTORED,
    NAMES,
    QUANTISING,
    encode,
    exact_svd,
    factors,
    levels_of,
    naive_mask,
    output_error,
    parse,
)
from support.random_deltas import make_delta, make_hessian
from support.tiny_models import Pair

from impart_hf import compress
from impart_hf.coding.svd import RankRule
from impart_hf.methods import BitDeltaConfig, DareQtConfig, DeltaComeConfig, ImPartQtConfig, MethodConfig, method_class
from impart_hf.modeling.delta_decode import decode_record
from impart_hf.modeling.delta_record import Record

# --- with a Hessian


@pytest.mark.parametrize(
    "method, most",
    [(ImPartQtConfig(), 0.8), (ImPartQtConfig(bits=(2,), groups=()), 0.8), (DeltaComeConfig(), 0.8),
     (DareQtConfig(), 0.6), (DareQtConfig(value_bits=4), 0.98)],
    ids=["impart-qt", "impart-qt at 2 bits", "delta-come", "dare-qt", "dare-qt at 4 bits"],
)  # fmt: skip
def test_a_hessian_lowers_the_output_error(method: MethodConfig, most: float) -> None:
    errors = np.zeros(2)
    for seed in range(3):
        for shape in ((96, 96), (64, 128), (128, 64)):
            delta, hessian = make_delta(*shape, seed), make_hessian(shape[1], seed)
            for i, given in enumerate((None, hessian)):
                record, _ = encode(method, delta, 4, seed, given)
                errors[i] += output_error(decode_record(record, "delta"), delta, hessian)
    assert errors[1] < most * errors[0]


def encode_transposed(method: MethodConfig, delta: torch.Tensor, budget: int, hessian: torch.Tensor | None) -> Record:
    """Encode a matrix whose rows are the layer's inputs."""
    data = method.encode(delta, budget, 1, hessian=hessian, svd=exact_svd, transposed=True).data
    assert len(data) <= budget
    return parse(data, (delta.shape[0], delta.shape[1]))


@pytest.mark.parametrize("name", [*QUANTISING, "impart-rd"])
def test_a_hessian_of_the_rows_lowers_the_output_error(name: str) -> None:
    """Also for square matrices, whose Hessian fits both sides."""
    errors, method = np.zeros(2), method_class(name)()
    for seed in range(3):
        for shape in ((96, 96), (64, 128), (128, 64)):
            delta, hessian = make_delta(*shape, seed), make_hessian(shape[0], seed)
            for i, given in enumerate((None, hessian)):
                record = encode_transposed(method, delta, delta.numel() // 2, given)
                errors[i] += output_error(decode_record(record, "delta").T, delta.T, hessian)
    assert errors[1] < (0.95 if name == "impart-rd" else 0.8) * errors[0]


@pytest.mark.parametrize("shape", [(96, 96), (64, 128)])
def test_without_masks_a_transposed_matrix_is_encoded_like_the_other(shape: tuple[int, int]) -> None:
    delta, hessian, method = make_delta(*shape), make_hessian(shape[0]), DeltaComeConfig()
    mirrored = decode_record(encode_transposed(method, delta, 3000, hessian), "delta").T

    def swapped_svd(
        matrix: torch.Tensor, wanted: int | RankRule, known: np.ndarray | None = None, /
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        u, sigma, v = exact_svd(matrix.T.contiguous(), wanted)
        return v, sigma, u

    data = method.encode(delta.T.contiguous(), 3000, 1, hessian=hessian, svd=swapped_svd).data
    expected = decode_record(parse(data, (shape[1], shape[0])), "delta")
    torch.testing.assert_close(mirrored, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*QUANTISING, "impart-rd"])
def test_without_a_hessian_it_does_not_matter_whose_inputs_the_rows_are(name: str) -> None:
    delta, method = make_delta(64, 96), method_class(name)()
    one, other = (method.encode(delta, 3000, 1, svd=exact_svd, transposed=whose).data for whose in (True, False))
    assert one == other


@pytest.mark.parametrize("name", QUANTISING)
def test_only_directions_and_not_sizes_of_a_hessian_count(name: str) -> None:
    delta, hessian = make_delta(80, 96), make_hessian(96)
    method = method_class(name)()
    plain, one, other = (method.encode(delta, 2000, 1, hessian=h).data for h in (None, hessian, 1024 * hessian))
    assert one == other != plain


def test_inputs_that_are_not_correlated_change_nothing() -> None:
    """Then nothing can make up for an entry's error; and of the components, V sees the inputs themselves."""
    delta = make_delta(80, 96)
    same, inputs = 4 * torch.eye(96), torch.diag(torch.linspace(0.5, 2, 96))
    for method in (DareQtConfig(), DareQtConfig(value_bits=5)):
        one, other = (decode_record(encode(method, delta, 8, 1, h)[0], "delta") for h in (None, same))
        torch.testing.assert_close(one, other, rtol=2e-3, atol=0)
    for name in FACTORED:
        records = [encode(method_class(name)(), delta, 8, 1, hessian)[0] for hessian in (None, inputs)]
        (u, v), (other_u, other_v) = map(levels_of, records)
        assert torch.equal(v, other_v) and not torch.equal(u, other_u)


def test_u_is_quantised_for_what_v_passes_on() -> None:
    """Inputs that the first components answer to alike: in U, later components make up for errors of earlier ones."""
    delta, hessian = make_delta(96, 96), make_hessian(96)
    errors = []
    for given in (None, hessian):
        record, _ = encode(DeltaComeConfig(bits=(3,), groups=()), delta, 5, hessian=given)
        (u, _), sigma = factors(delta, record.rank)
        found, v = levels_of(record)
        weights = torch.from_numpy(record.scale * record.sigma.astype(np.float64))
        passed = v * weights[:, None]
        passed = passed @ hessian.double() @ passed.T
        # The unit in which U is stored is not in the file: the one that fits best.
        unit = (found * u).sum() / found.square().sum()
        error = (u - unit * found).T
        errors.append((((error @ passed) * error).sum() / ((u.T @ passed) * u.T).sum()).item())
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("live", [0, 60])
@pytest.mark.parametrize("name", QUANTISING)
def test_inputs_that_are_always_zero(name: str, live: int) -> None:
    """Nothing is known of them, and text other than the calibration text may well reach them."""
    delta = make_delta(64, 64)
    rounded, _ = encode(method_class(name)(), delta, 6)
    record, _ = encode(method_class(name)(), delta, 6, hessian=torch.diag((torch.arange(64) < live).float()))
    assert record.relative_error < 1.3 * rounded.relative_error


def test_rows_that_answer_to_no_live_input_are_kept() -> None:
    delta = make_delta(64, 64)
    hessian = torch.diag((torch.arange(64) < 3).float())
    record, _ = encode(DareQtConfig(), delta, 20, hessian=hessian)
    kept = naive_mask(record, 0, 64)
    assert (kept.any(1) & ~kept[:, :3].any(1)).sum() > 5, "this is about some rows"
    assert torch.equal(decode_record(record, "delta").any(1), kept.any(1))


# --- the same for every method


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bytes(name: str) -> None:
    delta, hessian = make_delta(64, 96), make_hessian(96)
    method = method_class(name)(compression_ratio=24)
    for given in (None, hessian):
        one, same, other = (method.encode(delta.clone(), 500, seed, hessian=given).data for seed in (5, 5, 6))
        assert one == same != other
        if name == "delta-come":  # without masks, the seed is a number in the header
            assert one[:16] == other[:16] and one[20:] == other[20:]


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_small_deltas_keep_their_precision(name: str, calibrated: bool) -> None:
    """Light fine-tunes change weights by millionths, under float16's normal range."""
    delta, hessian = make_delta(96, 96), make_hessian(96) if calibrated else None
    large, _ = encode(method_class(name)(), delta, 5, hessian=hessian)
    for factor in (1e-6, 1e6):
        record, _ = encode(method_class(name)(), delta * factor, 5, hessian=hessian)
        assert record.relative_error == pytest.approx(large.relative_error, rel=0.02)
        assert record.scale == pytest.approx(large.scale * factor, rel=0.02)


@pytest.mark.parametrize("name", QUANTISING)
def test_rows_and_columns_of_zeros(name: str) -> None:
    delta = make_delta(96, 96)
    delta[::3] = 0
    delta[:, 40:60] = 0
    record, _ = encode(method_class(name)(), delta, 5)
    decoded = decode_record(record, "delta")
    assert torch.isfinite(decoded).all() and record.relative_error < 1
    # Levels are never zero, but those of a row without a value are next to nothing.
    assert decoded[::3].norm() < 0.5 * decoded.norm() * (name != "dare-qt") + 1e-3 * decoded.norm()


# --- settings


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("bits", [0, 1, 9, -3, True, 2.5, "8", None])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_bits_are_from_2_to_8(name: str, bits: object, place: int) -> None:
    settings = [8, 3, 2]
    settings[place] = bits  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=naming("bits", 2, 8, repr(bits))):
        method_class(name)(bits=settings)


@pytest.mark.parametrize("bits", [0, 1, 9, True, 2.5, "8", None, (2,)])
def test_value_bits_are_from_2_to_8(bits: object) -> None:
    with pytest.raises(ValueError, match=naming("value_bits", 2, 8, repr(bits))):
        DareQtConfig(value_bits=bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FACTORED)
def test_bits_and_groups_fit_each_other(name: str) -> None:
    method = method_class(name)
    for bits, groups in (((8, 3, 2), (2,)), ((8, 3), (2, 32)), ((), ()), ((8,), (1,))):
        with pytest.raises(ValueError, match=naming("groups", str(groups), "bits", str(bits))):
            method(bits=bits, groups=groups)
    for groups in ((0, 32), (2, -1), (2, 1.5), (True, 2), ("2", 3)):
        with pytest.raises(ValueError, match=naming("groups", str(groups))):
            method(groups=groups)


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("setting", [{"bits": 8}, {"bits": None}, {"bits": "832"}, {"groups": 2}, {"groups": None}])
def test_bits_and_groups_are_sequences(name: str, setting: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        method_class(name)(**setting)


@pytest.mark.parametrize("name", FACTORED)
def test_groups_that_exceed_the_rank(name: str, tiny_pair: Pair, tmp_path: Path) -> None:
    pair, output = (str(tiny_pair.base), str(tiny_pair.finetuned)), tmp_path / "delta"
    method = method_class(name)
    with pytest.raises(ValueError, match=naming("groups", "(2, 63)", 65, 64)) as caught:
        compress(*pair, output, method(compression_ratio=4, groups=(2, 63)))
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
    report = compress(*pair, output, method(compression_ratio=3, groups=(2, 62)))
    assert report.ratio >= 3 and output.exists()


@pytest.mark.parametrize(
    "method",
    [
        BitDeltaConfig(compression_ratio=20, seed=3, embeddings="method"),
        DareQtConfig(compression_ratio=7.5, value_bits=4),
        DeltaComeConfig(bits=(6, 2), groups=(5,)),
        ImPartQtConfig(beta=0.7, c=0.5, bits=[8, 2], groups=[9]),  # type: ignore[arg-type]
    ],
    ids=NAMES,
)
def test_settings_survive_json(method: MethodConfig) -> None:
    settings = json.loads(json.dumps(method.to_dict()))
    again = method_class(settings.pop("name"))(**settings)
    assert again == method and again.to_dict() == method.to_dict() and type(again) is type(method)
    delta = make_delta(64, 64)
    assert again.encode(delta, 900, 1).data == method.encode(delta, 900, 1).data
