"""Full float32 precision inside, the process's setting outside; and how exact a reader has to be."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support import naive_reader
from support.random_deltas import make_delta

from impart_hf.coding.svd import eigh, leading_svd
from impart_hf.methods import method_class, method_names
from impart_hf.modeling.delta_decode import add_delta, decode_planes, decode_record
from impart_hf.modeling.delta_record import FACTORED, parse_record
from impart_hf.modeling.precision import full_float32

READERS_ERROR = 1e-5  # docs/FORMAT.md, "Rounding"


@pytest.fixture(params=["highest", "high", "medium"])
def setting(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


def products_are_full() -> bool:
    """Whether torch computes float32 products in float32."""
    return torch.backends.cuda.matmul.fp32_precision == "ieee" == torch.backends.mkldnn.matmul.fp32_precision


def test_the_setting_comes_back(setting: str) -> None:
    with full_float32():
        assert products_are_full()
        with pytest.raises(KeyError), full_float32():
            raise KeyError
        assert products_are_full()
    assert torch.get_float32_matmul_precision() == setting


def test_threads_share_the_setting(setting: str) -> None:
    """The first to leave does not take it from those that are still inside."""
    first_left, seen = threading.Event(), []

    def second(entered: threading.Event) -> None:
        with full_float32():
            entered.set()
            first_left.wait(10)
            seen.append(products_are_full())

    entered = threading.Event()
    thread = threading.Thread(target=second, args=[entered])
    with full_float32():
        thread.start()
        entered.wait(10)
    first_left.set()
    thread.join()
    assert seen == [True] and torch.get_float32_matmul_precision() == setting


@pytest.mark.parametrize("name", method_names())
def test_encoding_and_decoding_are_in_full_precision(name: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    delta = make_delta(48, 72)
    product, in_place = torch.Tensor.__matmul__, torch.Tensor.addmm_

    def watched(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        seen.append(products_are_full())
        return product(self, other)

    def watched_in_place(self: torch.Tensor, *factors: torch.Tensor, **options: float) -> torch.Tensor:
        seen.append(products_are_full())
        return in_place(self, *factors, **options)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    monkeypatch.setattr(torch.Tensor, "addmm_", watched_in_place)
    data = method_class(name)(compression_ratio=4).encode(delta, delta.numel() // 2, 1).data
    add_delta(torch.zeros(48, 72), np.frombuffer(data, np.uint8), "delta", torch.float32)
    leading_svd(delta, 3)
    assert seen and all(seen)


def test_an_eigendecomposition_that_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    decompose = torch.linalg.eigh

    def only_float64(matrix: torch.Tensor) -> object:
        if matrix.dtype != torch.float64:
            raise torch.linalg.LinAlgError("failed to converge")
        return decompose(matrix)

    delta = make_delta(300, 200)
    gram = delta.t() @ delta
    wanted, (_, sigma, _) = decompose(gram)[0], leading_svd(delta, 20)
    monkeypatch.setattr(torch.linalg, "eigh", only_float64)
    values, vectors = eigh(gram)
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))
    torch.testing.assert_close(leading_svd(delta, 20)[1], sigma, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", method_names())
def test_what_a_reader_may_round(name: str) -> None:
    """float32 and three bfloat16 products stay below the document's bound, one bfloat16 product does not."""
    delta = make_delta(96, 160)
    data = method_class(name)(compression_ratio=4).encode(delta, delta.numel() // 2, 1).data
    record, _ = parse_record(np.frombuffer(data, np.uint8), (96, 160), "delta")
    exact = torch.from_numpy(naive_reader.decode_record(data)[0])

    def error(decoded: torch.Tensor) -> float:
        return float((decoded.double() - exact).norm() / exact.norm())

    assert error(decode_record(record, "delta")) < READERS_ERROR / 10
    if record.layout != FACTORED:
        return
    u, v = (plane.dense() for plane in decode_planes(record, "delta"))
    sigma = torch.from_numpy(record.sigma.astype(np.float32) * np.float32(record.scale))
    left, right = (u * sigma[:, None]).t(), v
    high_left, high_right = left.bfloat16().float(), right.bfloat16().float()
    low_left, low_right = (
        (whole - high).bfloat16().float() for whole, high in ((left, high_left), (right, high_right))
    )
    assert error(high_left @ high_right) > READERS_ERROR
    assert error(high_left @ high_right + high_left @ low_right + low_left @ high_right) < READERS_ERROR
