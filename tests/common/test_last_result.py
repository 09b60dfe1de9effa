"""A function's last result is kept while its tensor lives."""

from __future__ import annotations

import gc
import weakref

import torch

from impart_hf.common.last_result import LastResult


def test_the_last_result_is_kept_while_its_tensor_lives_unchanged() -> None:
    calls = []

    def double(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor.clone())
        return 2 * tensor

    last = LastResult(double)
    one, other = torch.ones(3), torch.ones(3)
    result = last(one)
    assert last(one) is result and len(calls) == 1
    assert last(other) is not result and len(calls) == 2
    assert last(one) is not result and len(calls) == 3  # only the last is kept
    one.add_(1)
    assert torch.equal(last(one), torch.full((3,), 4.0)) and len(calls) == 4
    kept = weakref.ref(last(one))
    del one, result
    gc.collect()
    assert kept() is None  # it takes no memory any longer
    with torch.inference_mode():
        frozen = torch.ones(2)
        assert last(frozen) is last(frozen)
