"""The largest entries of many, of equal ones the first."""

from __future__ import annotations

import pytest
import torch

from impart_hf.common.largest import kth_smallest, largest


def test_the_first_of_equal_entries_are_chosen() -> None:
    values = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0])
    by_rank = [1, 3, 2, 4, 5, 0, 6]
    for count in range(len(values) + 1):
        assert largest(values, count).nonzero().squeeze(1).tolist() == sorted(by_rank[:count])


def test_many_ties_against_a_stable_sort() -> None:
    values = torch.randint(0, 20, (1000,), generator=torch.Generator().manual_seed(0)).float()
    order = values.argsort(descending=True, stable=True)
    for count in (1, 10, 499, 999):
        assert set(largest(values, count).nonzero().squeeze(1).tolist()) == set(order[:count].tolist())


@pytest.mark.parametrize(
    "values",
    [
        torch.randn(999, generator=torch.Generator().manual_seed(0)),
        torch.randn(999, generator=torch.Generator().manual_seed(1)) * 1e-42,  # subnormal
        torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, 3.4e38, -3.4e38, 1e-45, -1e-45, 1.0, 0.0]),
        1 + torch.arange(300) * 2**-23,  # neighbours
        torch.tensor([5.0]),
    ],
    ids=["normal", "subnormal", "special", "neighbours", "one"],
)
def test_the_entry_of_a_rank_by_its_bits(values: torch.Tensor) -> None:
    assert [kth_smallest(values, rank) for rank in range(len(values))] == values.sort().values.tolist()
