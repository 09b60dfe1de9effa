"""Matrices encoded together have the records that they have alone, up to rounding.

The sign of a singular vector is arbitrary, so levels are compared by their sizes. A value that lies within rounding of
an edge may get either level, as with GPTQ's kernel.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.random_deltas import make_deltas, make_hessian, make_tasks

from impart_hf.coding.gptq import Grid, StackError, inverse_factor
from impart_hf.coding.spectrum import leading_components, leading_components_of_all, singular_values
from impart_hf.coding.svd import SvdStack, leading_svd, leading_svds
from impart_hf.methods import Encoded, ImPartRdConfig, method_class
from impart_hf.modeling.delta_decode import decode_planes, decode_record
from impart_hf.modeling.delta_record import Record, parse_record

RATIO = 8.0


def parsed(encoded: Encoded, shape: tuple[int, int]) -> Record:
    return parse_record(np.frombuffer(encoded.data, np.uint8), shape, "the matrix")[0]


@pytest.mark.parametrize("name", ["impart-rd", "impart-qt", "delta-come"])
@pytest.mark.parametrize("inputs", ["unknown", "columns", "rows"])
@pytest.mark.parametrize("shape", [(64, 128), (150, 70)])
def test_records_are_those_of_single_matrices(name: str, inputs: str, shape: tuple[int, int]) -> None:
    method = method_class(name)(compression_ratio=RATIO)
    deltas = make_deltas(*shape, 5)
    deltas[1] *= 3
    one, other = (make_hessian(shape[inputs == "columns"], seed) for seed in (0, 1))
    hessians = None if inputs == "unknown" else [one, other, one, one, other]
    tasks = make_tasks(deltas, RATIO, hessians, inputs == "rows")
    together = method._encode_stack(tasks)
    assert len({parsed(encoded, shape).rank for encoded in together}) > 1 or name == "delta-come"
    for task, encoded in zip(tasks, together, strict=True):
        records = [parsed(each, shape) for each in (method._encode(task), encoded)]
        assert len(encoded.data) <= task.max_bytes and records[0].rank == records[1].rank
        assert records[0].mask_seed == records[1].mask_seed
        decoded = [decode_record(record, "the matrix") for record in records]
        errors = [float((each - task.delta).norm() / task.delta.norm()) for each in decoded]
        assert errors[1] == pytest.approx(errors[0], rel=1e-4)
        assert records[1].relative_error == pytest.approx(errors[1], rel=1e-4)
        for side in (0, 1):
            sizes = [decode_planes(record, "the matrix")[side].dense().abs() for record in records]
            assert ((sizes[0] - sizes[1]).abs() < 1e-4).double().mean() >= 0.999


def test_matrices_that_are_not_worth_a_byte_are_dropped() -> None:
    tasks = make_tasks(make_deltas(64, 128, 3), RATIO)
    tasks[1] = replace(tasks[1], max_bytes=40)
    method = ImPartRdConfig(compression_ratio=RATIO)
    together, alone = method._encode_stack(tasks), [method._encode(task) for task in tasks]
    assert together[1] == alone[1] and together[1].notes
    assert [len(each.data) for each in together] == pytest.approx([len(each.data) for each in alone], abs=40)


def test_one_that_needs_more_damping_is_encoded_alone() -> None:
    hessians = torch.stack([make_hessian(16, 0), torch.diag(torch.tensor([1.0] * 15 + [-0.05]))])
    with pytest.raises(StackError):
        inverse_factor(hessians)
    assert inverse_factor(hessians[1]).notes
    factor = inverse_factor(hessians[:1].expand(3, -1, -1))
    torch.testing.assert_close(factor.upper[2], inverse_factor(hessians[0]).upper)


def test_all_levels_of_a_stack() -> None:
    widths = np.array([[1, 2, 3, 4], [34, 35, 36, 8]])
    values = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0))
    for by_row in (True, False):
        given = values if by_row else values.mT
        scale = torch.rand(2, 4, generator=torch.Generator().manual_seed(1)) + 0.5
        scale = scale[..., None] if by_row else scale[:, None]
        codes = Grid(scale, widths).codes(given)
        for number in (0, 1):
            grid = Grid(scale[number], widths[number])
            assert torch.equal(codes[number], grid.codes(given[number]))
            torch.testing.assert_close(Grid(scale, widths).values(codes)[number], grid.values(codes[number]))


def errors_of(matrices: torch.Tensor, stack: SvdStack, ranks: list[int]) -> list[tuple[float, float]]:
    """The squared error of the components of each matrix, and the least possible."""
    u, sigma, v = stack
    found = []
    for number, rank in enumerate(ranks):
        assert not u[number, :, rank:].any() and not sigma[number, rank:].any() and not v[number, :, rank:].any()
        exact = torch.linalg.svdvals(matrices[number].double())
        rest = matrices[number] - u[number] * sigma[number] @ v[number].t()
        found.append((float(rest.double().square().sum()), float(exact[rank:].square().sum())))
    return found


@pytest.mark.parametrize("shape", [(40, 64), (300, 280)])
def test_components(shape: tuple[int, int]) -> None:
    """Of matrices that suit a block, of one of low rank, of tiny ones and of one of which most is wanted."""
    matrices = torch.stack(make_deltas(*shape, 6))
    matrices[1] = matrices[1][:, :4] @ matrices[1][:, :4].t() @ matrices[2] * 1e4
    matrices[3] *= 1e-9
    ranks = [5, 9, 20, 6, 12, 30]
    if shape[0] == 300:
        ranks[5] = 200
    sigmas = list(singular_values(matrices))
    stack = leading_components_of_all(matrices, ranks, sigmas)
    for number, (found, least) in enumerate(errors_of(matrices, stack, ranks)):
        norm = float(matrices[number].double().square().sum())
        assert found <= 1.005 * least + 1e-6 * norm, number
        alone = leading_components(matrices[number], ranks[number], sigmas[number])[1]
        torch.testing.assert_close(stack[1][number, : ranks[number]], alone, rtol=5e-2, atol=1e-4 * norm**0.5)


def test_whole_decompositions() -> None:
    matrices = torch.stack(make_deltas(48, 30, 4))
    wanted = [3, 30, 7, 99]
    rules = [lambda sigma, most=most: most if most < 99 else int((sigma > sigma[0] / 2).sum()) for most in wanted]
    u, sigma, v, counts = *(stack := leading_svds(matrices, rules))[0], stack[1]
    assert counts[:3] == wanted[:3]
    for number, rule in enumerate(rules):
        alone = leading_svd(matrices[number], rule)
        count = counts[number]
        assert len(alone[1]) == count
        torch.testing.assert_close(sigma[number, :count], alone[1], rtol=1e-4, atol=1e-7)
        product = u[number] * sigma[number] @ v[number].t()
        torch.testing.assert_close(product, alone[0] * alone[1] @ alone[2].t(), rtol=1e-3, atol=1e-6)
