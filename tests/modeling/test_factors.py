"""Deltas in the form in which they are stored do what the dense matrix does."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support import naive_reader
from torch.nn import functional

from impart_hf import DareConfig, DareQtConfig, ImPartConfig, ImPartRdConfig
from impart_hf.methods import MethodConfig
from impart_hf.modeling.delta_decode import matrix_delta
from impart_hf.modeling.delta_record import parse_record
from impart_hf.modeling.factors import DirectDelta, Factors, MatrixDelta

ROWS, COLUMNS, RANK = 12, 7, 3


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors() -> Factors:
    return Factors(numbers(RANK, ROWS, seed=1), numbers(RANK, seed=2), numbers(RANK, COLUMNS, seed=3))


DELTAS: dict[str, Callable[[], MatrixDelta]] = {
    "factors": factors,
    "one number": lambda: DirectDelta(numbers(ROWS, COLUMNS, seed=4), 0.3),
    "one scale": lambda: DirectDelta(numbers(ROWS, COLUMNS, seed=4), torch.tensor([0.3])),
    "row scales": lambda: DirectDelta(numbers(ROWS, COLUMNS, seed=4), numbers(ROWS, seed=5)),
}


def dense(delta: MatrixDelta) -> torch.Tensor:
    """float64 (m, n), by the definition."""
    if isinstance(delta, Factors):
        return torch.einsum("km,k,kn->mn", delta.u.double(), delta.sigma.double(), delta.v.double())
    scale = torch.as_tensor(delta.scale).double()
    return delta.values.double() * (scale[:, None] if scale.dim() else scale)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", DELTAS)
def test_it_is_its_matrix(kind: str) -> None:
    delta = DELTAS[kind]()
    close(delta.matrix(), dense(delta))
    base = numbers(ROWS, COLUMNS, seed=6)
    close(delta.add_to(base.clone()), base + dense(delta))


@pytest.mark.parametrize("kind", DELTAS)
def test_rows_of_it(kind: str) -> None:
    delta, rows = DELTAS[kind](), slice(3, 9)
    close(delta.select(rows).matrix(), dense(delta)[rows])
    tile = numbers(6, COLUMNS, seed=7)
    close(delta.select(rows).add_to(tile.clone()), tile + dense(delta)[rows])


@pytest.mark.parametrize("kind", DELTAS)
def test_inputs_and_tokens(kind: str) -> None:
    delta = DELTAS[kind]()
    inputs, tokens = numbers(2, 5, COLUMNS, seed=8), torch.tensor([[0, 11, 3], [3, 3, 7]])
    close(delta.multiply(inputs), functional.linear(inputs.double(), dense(delta)))
    close(delta.rows(tokens), dense(delta)[tokens])


@pytest.mark.parametrize("use", ["matrix", "multiply", "rows"])
def test_gradients_flow_to_what_is_stored(use: str) -> None:
    given = [numbers(RANK, ROWS, seed=1), numbers(RANK, seed=2), numbers(RANK, COLUMNS, seed=3)]
    uses: dict[str, Callable[[MatrixDelta], torch.Tensor]] = {
        "matrix": lambda delta: delta.matrix(),
        "multiply": lambda delta: delta.multiply(numbers(4, COLUMNS, seed=9).double()),
        "rows": lambda delta: delta.rows(torch.tensor([1, 5])),
    }
    leaves = [part.double().requires_grad_() for part in given]
    assert torch.autograd.gradcheck(lambda *parts: uses[use](Factors(*parts)), leaves)
    values, scale = numbers(ROWS, COLUMNS, seed=4).double().requires_grad_(), numbers(ROWS).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *parts: uses[use](DirectDelta(*parts)), [values, scale])


@pytest.mark.parametrize("method", [ImPartConfig(8.0), ImPartRdConfig(8.0), DareConfig(8.0), DareQtConfig(8.0)])
def test_of_a_record(method: MethodConfig) -> None:
    delta = numbers(40, 8, seed=10) @ numbers(8, 56, seed=11)
    data = np.frombuffer(method.encode(delta, 2 * delta.numel() // 8, 5).data, np.uint8)
    found = matrix_delta(parse_record(data, (40, 56), "matrix")[0], "matrix")
    assert isinstance(found, DirectDelta if method.name.startswith("dare") else Factors)
    expected = naive_reader.decode_record(data.tobytes())[0]
    np.testing.assert_allclose(found.matrix().numpy(), expected, atol=1e-5 * np.abs(expected).max())
    inputs = numbers(3, 56, seed=12)
    product = inputs.double() @ torch.from_numpy(expected).double().t()
    np.testing.assert_allclose(found.multiply(inputs).numpy(), product, atol=1e-6 * float(product.abs().max()))
