"""Which matrices are worked on together."""

from __future__ import annotations

import pytest
import torch

from impart_hf.compression import batches
from impart_hf.compression.batches import Batches


def batches_of(device: str, items: list[tuple[str, int]]) -> list[list[int]]:
    found: list[list[int]] = []
    several = Batches[int](torch.device(device), found.append)
    for number, (kind, size) in enumerate(items):
        several.add(kind, number, size)
    several.finish()
    return found


def test_of_one_kind_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_BATCH", 10)
    monkeypatch.setattr(batches, "_ALONE", 6)
    items = [("a", 4), ("b", 4), ("a", 4), ("a", 4), ("a", 7), ("b", 6)]
    assert sorted(batches_of("cuda", items)) == [[0, 2], [1, 5], [3], [4]]


def test_a_cpu_takes_one_at_a_time() -> None:
    assert batches_of("cpu", [("a", 1), ("a", 1)]) == [[0], [1]]
